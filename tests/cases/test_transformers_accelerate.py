"""transformers and accelerate: tables of names, first match wins, and keys that nobody asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart import MappingError
from warmstart.mapping.planning.renames import Renamer

HF_1 = {
    r"model\.layers\.[^.]+\.mlp\.gate_up_proj\.weight": "first",
    r"model\.layers\.[^.]+\.self_attn\.q_proj\.weight": "second",
    r"embed_tokens\.weight": "third",
}


@pytest.mark.parametrize(
    ("key", "renamed"),
    [
        ("embed_tokens.weight", "third"),
        ("model.layers.0.mlp.gate_up_proj.weight", "first"),
        ("model.layers.12.self_attn.q_proj.weight", "second"),
        ("model.layers.a.mlp.gate_up_proj.weight", "first"),
        ("model.layers.00x.mlp.gate_up_proj.weight", "first"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.gate_up_proj.weight.bar", "first.bar"),  # a rule ends where a segment does
        ("model.layers.0.mlp.gate_up_proj.weight_bar", "model.layers.0.mlp.gate_up_proj.weight_bar"),
    ],
)
def test_hf_1_a_table_of_rules(key, renamed):
    assert Renamer([HF_1])(key) == renamed


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("model.layers.0.mlp.gate_up_proj.weight", "0"),
        ("model.layers.00x.mlp.gate_up_proj.weight", "00x"),
        ("model.layers.0.mlp.gate_up_proj.weight.bar", None),  # a template is a whole name
        ("model.layers.0.1.mlp.gate_up_proj.weight", None),  # and a placeholder one segment
    ],
)
def test_hf_1_a_template_stands_for_whole_names(key, target):
    model = nn.ModuleDict({"w": nn.ParameterDict({target or "0": torch.zeros(2)})})
    rule = warmstart.Conversion("model.layers.{i}.mlp.gate_up_proj.weight", "w.{i}")
    plan = warmstart.plan(model, {key: torch.ones(2)}, convert=[rule], strip_prefix="")
    assert (plan.errors == ()) == (target is not None)
    assert plan.mapping == ({f"w.{target}": (key,)} if target else {})


def test_hf_2_where_rules_overlap_the_first_one_listed_wins():
    key = "model.layers.0.mlp.gate_up_proj.weight"
    rules = {
        r"model\.layers\.[^.]+\.mlp\..+\.weight": "first",
        r"model\.layers\.0\.mlp\.gate_up_proj\.weight": "second",
    }
    assert Renamer([rules])(key) == "first"
    assert Renamer([dict(reversed(rules.items()))])(key) == "second"


def test_hf_2_two_hundred_rules():
    rules = {rf"model\.layers\.[^.]+\.mlp\.block{i}\.weight": f"block{i}" for i in range(200)}
    assert Renamer([rules])("model.layers.123.mlp.block57.weight") == "block57"
    assert Renamer([rules])("model.layers.123.mlp.block5.weight") == "block5"


HF_3 = {
    r"block_sparse_moe\.experts\.[^.]+\.w1\.weight": "mlp.experts.gate_up_proj",
    r"block_sparse_moe\.experts\.[^.]+\.w2\.weight": "mlp.experts.down_proj",
    r"model\.language_model\..*": "language_model",
}


@pytest.mark.parametrize(
    ("key", "renamed"),
    [
        ("foo.block_sparse_moe.experts.3.w1.weight", "foo.mlp.experts.gate_up_proj"),
        ("foo.block_sparse_moe.experts.3.w2.weight", "foo.mlp.experts.down_proj"),
        ("model.language_model.lm_head.weight", "language_model"),
        ("unrelated.key", "unrelated.key"),
    ],
)
def test_hf_3_what_is_before_and_behind_a_match_stays(key, renamed):
    assert Renamer([HF_3])(key) == renamed


def test_hf_3_experts_are_stacked_in_natural_order_and_gate_and_up_put_together():
    """Twelve experts, so that `10` would come before `2` in the order of words."""
    keys = {}
    for e in range(12):
        for name in ("w1", "w3", "w2"):
            keys[f"block_sparse_moe.experts.{e}.{name}.weight"] = torch.full(
                (2, 2), e + {"w1": 0.1, "w3": 0.3, "w2": 0.2}[name]
            )
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = nn.Module()
    model.mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(12, 4, 2))
    model.mlp.experts.down_proj = nn.Parameter(torch.zeros(12, 2, 2))
    experts = "block_sparse_moe.experts.{e}"
    rules = [
        warmstart.Conversion(
            [f"{experts}.w1.weight", f"{experts}.w3.weight"],
            "mlp.experts.gate_up_proj",
            [warmstart.Stack(over="e", dim=0), warmstart.Concat(dim=1)],
        ),
        warmstart.Conversion(f"{experts}.w2.weight", "mlp.experts.down_proj", [warmstart.Stack(over="e", dim=0)]),
    ]
    report = warmstart.load(model, keys, convert=rules)
    assert report.coverage == 1
    index = torch.arange(12.0)
    assert torch.equal(model.mlp.experts.gate_up_proj[:, 0, 0], index + 0.1)
    assert torch.equal(model.mlp.experts.gate_up_proj[:, 2, 1], index + 0.3)
    assert torch.equal(model.mlp.experts.down_proj[:, 1, 0], index + 0.2)


class ModelForTest(nn.Module):
    """accelerate's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.batchnorm = nn.BatchNorm1d(4)
        self.linear2 = nn.Linear(4, 5)


def test_ac_2_a_key_that_fits_nothing_is_an_error_until_it_is_allowed(fingerprint):
    model, source = ModelForTest(), ModelForTest()
    before = fingerprint(model)
    keys = {**source.state_dict(), "foo": torch.rand(4, 5)}
    with pytest.raises(MappingError, match=r'foo  \(4, 5\)\n  -> to leave them unused: allow_unexpected=\["foo"\]'):
        warmstart.load(model, keys)
    assert fingerprint(model) == before
    report = warmstart.load(model, keys, allow_unexpected="foo")
    assert report.unexpected == ("foo",)
    assert fingerprint(model) == fingerprint(source)
