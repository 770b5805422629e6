"""`Plan.reverse()`: the model in its checkpoint's own layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import warmstart
from warmstart import (
    AdaptInChannels,
    CheckpointError,
    Concat,
    Conversion,
    MappingError,
    MapRows,
    SliceOrPad,
    Split,
    Stack,
    Transpose,
)


def saved(checkpoint) -> dict[str, torch.Tensor]:
    return {key: checkpoint.read(key).clone() for key in checkpoint.keys()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


class Attention(nn.Module):
    """Grouped queries: 4 query rows, 2 of keys and values each."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(3, 2)
        self.out = nn.Linear(4, 3)


QKV = [
    Conversion("{p...}.qkv.{leaf}", ["{p...}.q.{leaf}", "{p...}.k.{leaf}", "{p...}.v.{leaf}"], [Split(0)]),
]


def fused() -> dict[str, torch.Tensor]:
    return {
        "model.attn.qkv.weight": torch.randn(8, 3),
        "model.attn.qkv.bias": torch.randn(8),
        "model.attn.proj.weight": torch.randn(3, 4),
        "model.attn.proj.bias": torch.randn(3),
    }


def test_a_fused_projection_comes_back_bit_for_bit_under_its_old_names(tmp_path):
    model = nn.ModuleDict({"layer": Attention()})
    save_file(fused_state := fused(), tmp_path / "old.safetensors")
    plan = warmstart.plan(
        model, tmp_path / "old.safetensors", rename={"model.attn": "layer", "proj": "out"}, convert=QKV
    )
    plan.apply()
    assert torch.equal(model["layer"].k.weight, fused_state["model.attn.qkv.weight"][4:6])
    back = plan.reverse()
    assert same(saved(back), fused_state)
    save_file(saved(back), tmp_path / "new.safetensors")
    assert same(load_file(tmp_path / "new.safetensors"), fused_state)


def test_after_training_it_holds_the_model_as_it_is_now():
    model, source = nn.Linear(2, 2), {"old.weight": torch.zeros(2, 2), "old.bias": torch.zeros(2)}
    plan = warmstart.plan(model, source)
    plan.apply()
    with torch.no_grad():
        model.weight.add_(3)
    assert torch.equal(plan.reverse().read("old.weight"), torch.full((2, 2), 3.0))


def test_experts_and_a_transpose_come_back():
    state = {f"experts.{e}.w": torch.randn(2, 3) for e in range(11)} | {"c.weight": torch.randn(3, 2)}
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(11, 2, 3))
    model.fc = nn.Linear(3, 2, bias=False)
    convert = [
        Conversion("experts.{e}.w", "experts", [Stack("e", 0)]),
        Conversion("c.weight", "fc.weight", [Transpose(0, 1)]),
    ]
    plan = warmstart.plan(model, state, convert=convert)
    plan.apply()
    assert torch.equal(model.experts[10], state["experts.10.w"])
    assert same(saved(plan.reverse()), state)


def test_padding_and_new_rows_have_an_inverse():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2), "fc": nn.Linear(4, 2, bias=False)})
    state = {"embed.weight": torch.randn(3, 2), "fc.weight": torch.randn(2, 3)}
    adapt = {"embed": MapRows(["a", "b", "c"], ["c", "n", "a", "b", "m"]), "fc": SliceOrPad(0.0)}
    plan = warmstart.plan(model, state, adapt=adapt)
    plan.apply()
    assert same(saved(plan.reverse()), state)


def test_a_wider_model_gives_the_checkpoint_s_dtype_back():
    state = {k: v.bfloat16() for k, v in nn.Linear(2, 2).state_dict().items()}
    plan = warmstart.plan(nn.Linear(2, 2), state)
    plan.apply()
    assert same(saved(plan.reverse()), state)


def test_steps_without_an_inverse_are_named():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 1), "fc": nn.Linear(2, 2).bfloat16(), "embed": nn.Embedding(2, 2)})
    state = {
        "conv.weight": torch.randn(2, 3, 1, 1),
        "conv.bias": torch.randn(2),
        "fc.weight": torch.randn(2, 2),
        "fc.bias": torch.randn(2),
        "embed.weight": torch.randn(3, 2),
    }
    adapt = {"conv.weight": AdaptInChannels(), "embed": MapRows(["a", "b", "c"], ["a", "c"], allow_drop=True)}
    with pytest.raises(MappingError) as caught:
        warmstart.plan(model, state, adapt=adapt).reverse()
    text = str(caught.value)
    assert "AdaptInChannels" in text
    assert "MapRows" in text
    assert "narrowing float32 to bfloat16" in text


def test_an_output_that_went_nowhere_cannot_be_reversed():
    model = nn.Linear(3, 4, bias=False)
    plan = warmstart.plan(
        model,
        {"kv": torch.randn(8, 3)},
        convert=[Conversion("kv", ["weight", "value"], [Split(0, [4, 4])])],
        allow_unexpected="kv",
    )
    plan.apply()
    with pytest.raises(MappingError, match=r"value.*went nowhere"):
        plan.reverse()


def test_of_several_sources_one_has_to_be_named():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    states = [nn.Linear(2, 2).state_dict(), {f"x.{k}": v for k, v in nn.Linear(2, 2).state_dict().items()}]
    plan = warmstart.plan(model, [warmstart.Pretrained(s, into=into) for s, into in zip(states, "ab", strict=True)])
    plan.apply()
    with pytest.raises(MappingError, match=r"reverse\(0\)"):
        plan.reverse()
    assert same(saved(plan.reverse(1)), states[1])


def test_a_tied_tensor_comes_back_under_every_key_it_came_from():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    value = torch.randn(3, 2)
    plan = warmstart.plan(model, {"embed.weight": value, "head.weight": value.clone()})
    plan.apply()
    assert set(plan.reverse().keys()) == {"embed.weight", "head.weight"}


def test_concat_of_several_keys_comes_back():
    state = {"a.w": torch.randn(2, 3), "b.w": torch.randn(4, 3)}
    model = nn.Linear(3, 6, bias=False)
    plan = warmstart.plan(model, state, convert=[Conversion(["a.w", "b.w"], "weight", [Concat(0)])])
    plan.apply()
    assert torch.equal(model.weight, torch.cat([state["a.w"], state["b.w"]]))
    assert same(saved(plan.reverse()), state)


def test_a_part_that_is_not_there_is_an_error():
    plan = warmstart.plan(nn.Linear(2, 2), nn.Linear(2, 2))
    for part in (3, -1):
        with pytest.raises(MappingError, match="parts 0 to 0"):
            plan.reverse(part)


def test_rows_that_were_copied_and_differ_by_now_are_not_one_row():
    model = nn.Embedding(3, 2)
    plan = warmstart.plan(model, {"weight": torch.randn(2, 2)}, adapt={"weight": MapRows(["a", "b"], ["a", "a", "b"])})
    plan.apply()
    plan.reverse().read("weight")
    with torch.no_grad():
        model.weight[1] += 1
    with pytest.raises(CheckpointError, match="different values by now"):
        plan.reverse().read("weight")


def test_each_conversion_is_undone_once_when_its_keys_are_read_in_order(monkeypatch):
    from warmstart.mapping.conversions.converted import Converted

    undone = []
    undo = Converted.undo
    monkeypatch.setattr(Converted, "undo", lambda self, outputs: undone.append(self) or undo(self, outputs))
    state = {f"e.{i}.{w}": torch.randn(2) for i in range(20) for w in ("a", "b")}
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(20, 2)), nn.Parameter(torch.zeros(20, 2))
    plan = warmstart.plan(
        model, state, convert=[Conversion("e.{i}.a", "a", [Stack("i", 0)]), Conversion("e.{i}.b", "b", [Stack("i", 0)])]
    )
    plan.apply()
    assert same(saved(plan.reverse()), state)
    assert len(undone) == 2
