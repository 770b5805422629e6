"""speechbrain, composer, Lightning, torchtitan and torchtune: strictness, freezing, and whole models of other names."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import warmstart
from warmstart import MappingError, Pretrained


def test_sb_1_one_layer_from_a_file_in_a_folder(tmp_path):
    source, model = nn.Linear(32, 32), nn.Linear(32, 32)
    torch.save(source.state_dict(), tmp_path / "model.ckpt")
    for place in (tmp_path / "model.ckpt", tmp_path):
        nn.init.zeros_(model.weight)
        warmstart.load(model, place)
        assert torch.equal(model.weight, source.weight)
        assert torch.equal(model.bias, source.bias)


@pytest.mark.parametrize(("more_here", "more_there"), [(False, False), (False, True), (True, False), (True, True)])
def test_co_1_whatever_only_one_side_has_is_an_error(more_here, more_there, fingerprint):
    source, model = (nn.ModuleDict({"body": nn.Linear(2, 2)}) for _ in range(2))
    if more_here:
        model["missing_dummy"] = nn.Linear(1, 1)
    if more_there:
        source["unexpected_dummy"] = nn.Linear(1, 1)
    before = fingerprint(model)
    plan = warmstart.plan(model, source.state_dict())
    kinds = ["missing"] * more_here + ["unexpected"] * more_there
    assert [problem.kind for problem in plan.errors] == kinds
    if kinds:
        with pytest.raises(MappingError):
            plan.apply()
        assert fingerprint(model) == before
    else:
        plan.apply()
        assert torch.equal(model["body"].weight, source["body"].weight)


def test_co_2_globs_leave_out_a_part_or_everything():
    source, model = (nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)}) for _ in range(2))
    own = model["body"].weight.clone()
    warmstart.load(model, source.state_dict(), exclude="body.*")
    assert torch.equal(model["body"].weight, own)
    assert torch.equal(model["head"].weight, source["head"].weight)
    assert [p.kind for p in warmstart.plan(model, source.state_dict(), exclude="*").errors] == ["into"]


@pytest.mark.parametrize("fields", [{}, {"allow_missing": "*"}])
def test_pl_2_an_empty_state_dict_is_an_error(fields):
    with pytest.raises(warmstart.WarmStartError):
        warmstart.load(nn.Linear(2, 2), {}, **fields)


def trained(model: nn.Module, steps: int = 2) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("with_norm", [True, False])
def test_pl_3_a_frozen_body_with_or_without_its_norm(with_norm):
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    frozen = warmstart.freeze(model, ["0", "1"] if with_norm else "0")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(model)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    norm = {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert moved == {"3.weight", "3.bias"} | (set() if with_norm else norm)
    assert (
        model[1].training != with_norm
    )  # held in eval, with its statistics as they are: track_running_stats is not touched
    assert model[1].track_running_stats
    frozen.check()
    frozen.release("*")
    assert all(p.requires_grad for p in model.parameters())
    assert model[1].training


def test_pl_4_a_module_with_parameters_of_its_own_is_frozen_with_its_children_once():
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.child = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))

    model = nn.ModuleDict({"parent": Parent(), "head": nn.Linear(1, 1)})
    frozen = warmstart.freeze(model, "parent")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    names = list(frozen.names)
    assert len(names) == len(set(names)) == 8
    assert "parent.scale" in names


def test_tt_4_stacked_experts_are_taken_apart():
    """(8, 2, 3) to eight keys of (2, 3), and the reverse."""
    stacked = torch.arange(48.0).view(8, 2, 3)
    name = "model.layers.1.mlp.experts"
    model = nn.ModuleDict({str(e): nn.ModuleDict({"gate_proj": nn.Linear(3, 2, bias=False)}) for e in range(8)})
    for part in reversed(name.split(".")):
        model = nn.ModuleDict({part: model})
    rule = warmstart.Conversion(f"{name}.w1", f"{name}.{{e}}.gate_proj.weight", [warmstart.Unstack(over="e", dim=0)])
    plan = warmstart.plan(model, {f"{name}.w1": stacked}, convert=[rule])
    assert plan.errors == ()
    plan.apply()
    for e in range(8):
        assert torch.equal(model.get_parameter(f"{name}.{e}.gate_proj.weight"), stacked[e])
    back = plan.reverse()
    assert list(back.keys()) == [f"{name}.w1"]
    assert torch.equal(back.read(f"{name}.w1"), stacked)


def test_tt_5_a_wrapper_that_is_in_the_parameters_names_and_not_in_the_state_dict_s():
    model = nn.Sequential(OrderedDict(layer=checkpoint_wrapper(nn.Linear(2, 2))))
    assert list(dict(model.named_parameters())) != list(model.state_dict())
    source = {name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()}
    report = warmstart.load(model, source, freeze="layer.bias")
    assert {key for (key,) in report.mapping.values()} == {"layer.weight", "layer.bias"}
    assert all((p == 3).all() for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, False]


# ---- torchtune: llama2 as Hugging Face names it ----

TU_RULES = [
    {r"^model\.": ""},
    {"embed_tokens": "tok_embeddings", r"self_attn\.o_proj": "attn.output_proj", "self_attn": "attn",
     r"mlp\.gate_proj": "mlp.w1", r"mlp\.up_proj": "mlp.w3", r"mlp\.down_proj": "mlp.w2",
     r"input_layernorm\.weight": "sa_norm.scale", r"post_attention_layernorm\.weight": "mlp_norm.scale",
     r"^norm\.weight": "norm.scale", "lm_head": "output"},
]  # fmt: skip
TU_LAYER = {
    "self_attn.q_proj.weight": "attn.q_proj.weight", "self_attn.k_proj.weight": "attn.k_proj.weight",
    "self_attn.v_proj.weight": "attn.v_proj.weight", "self_attn.o_proj.weight": "attn.output_proj.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight", "mlp.up_proj.weight": "mlp.w3.weight", "mlp.down_proj.weight": "mlp.w2.weight",
    "input_layernorm.weight": "sa_norm.scale", "post_attention_layernorm.weight": "mlp_norm.scale",
}  # fmt: skip
TU_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "output.weight",
}
TU_NAMES |= {f"model.layers.{i}.{k}": f"layers.{i}.{v}" for i in range(2) for k, v in TU_LAYER.items()}


def tune() -> nn.Module:
    """A tree with torchtune's names, two elements each."""
    model = nn.Module()
    for name in TU_NAMES.values():
        *path, leaf = name.split(".")
        module = model
        for segment in path:
            module = module._modules.setdefault(segment, nn.Module())
        module.register_parameter(leaf, nn.Parameter(torch.zeros(2)))
    return model


def hf_keys() -> dict[str, torch.Tensor]:
    keys = {key: torch.full((2,), i + 1.0) for i, key in enumerate(TU_NAMES)}
    return keys | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}


def test_tu_1_llama_as_hugging_face_names_it():
    model, keys = tune(), hf_keys()
    report = warmstart.load(model, keys, rename=TU_RULES, allow_unexpected="*.rotary_emb.inv_freq")
    assert report.mapping == {name: (key,) for key, name in TU_NAMES.items()}
    assert len(report.unexpected) == 2  # one a layer: the model computes them
    for key, name in TU_NAMES.items():
        assert torch.equal(model.get_parameter(name), keys[key])


def test_tu_2_two_files_with_a_layer_each(tmp_path):
    keys = {key: tensor for key, tensor in hf_keys().items() if "inv_freq" not in key}
    second = {key for key in keys if ".layers.1." in key}
    torch.save({key: keys[key] for key in keys.keys() - second}, tmp_path / "1.bin")
    torch.save({key: keys[key] for key in second}, tmp_path / "2.bin")
    model = tune()
    rules = [TU_RULES[0], {f"?{rule}": text for rule, text in TU_RULES[1].items()}]
    report = warmstart.load(model, [Pretrained(tmp_path / name, rename=rules) for name in ("1.bin", "2.bin")])
    assert report.mapping == {name: (key,) for key, name in TU_NAMES.items()}
    assert [a.part for a in report.assignments] == [int(".1." in f".{a.target}.") for a in report.assignments]
    for key, name in TU_NAMES.items():
        assert torch.equal(model.get_parameter(name), keys[key])
