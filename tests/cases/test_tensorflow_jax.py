"""TensorFlow's warm start, Orbax and big_vision: maps of scopes, fan-out, partial loads, two trees compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart import CheckpointError, MappingError


def flat(**shapes: tuple[int, ...]) -> nn.Module:
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return model


def test_tf_5_one_key_to_two_entries_is_a_conversion():
    model, v1 = flat(v1=(2,), v2=(2,)), torch.tensor([1.0, 2.0])
    plan = warmstart.plan(model, {"v1": v1}, convert=[warmstart.Conversion("v1", ["v1", "v2"])])
    assert plan.errors == ()
    assert plan.mapping == {"v1": ("v1",), "v2": ("v1",)}
    plan.apply()
    assert torch.equal(model.v1, v1)
    assert torch.equal(model.v2, v1)


@pytest.mark.parametrize("pattern", ["norm", ["norm.*"], "*norm*"])
def test_tf_8_a_pattern_sees_statistics_as_well_as_parameters(pattern):
    source, model = (nn.ModuleDict({"norm": nn.BatchNorm1d(2), "out": nn.Linear(2, 2)}) for _ in range(2))
    source["norm"](torch.randn(8, 2))
    report = warmstart.load(model, source.state_dict(), include=pattern)
    assert len(report.mapping) == 5
    assert torch.equal(model["norm"].running_var, source["norm"].running_var)


@pytest.mark.parametrize(
    ("keys", "rename", "expected"),
    [
        (["old.v"], {"^old": "new"}, {"new.v": "old.v"}),  # a scope
        (["old.v"], {r"^old\.v$": "new.v"}, {"new.v": "old.v"}),  # a variable
        (["v"], {"^": "new."}, {"new.v": "v"}),  # the root
    ],
)
def test_tf_init_from_checkpoint_maps_scopes_variables_and_the_root(keys, rename, expected):
    model = nn.ModuleDict({"new": flat(v=(2,))})
    report = warmstart.load(model, {key: torch.ones(2) for key in keys}, rename=rename, strip_prefix="")
    assert report.mapping == {name: (key,) for name, key in expected.items()}
    assert model["new"].v.tolist() == [1, 1]


def test_tf_init_from_checkpoint_a_tensor_that_is_not_there_or_of_another_shape_is_an_error():
    model = nn.ModuleDict({"new": flat(v=(2,))})
    with pytest.raises(MappingError, match=r"rename rule .gone. matches no checkpoint key"):
        warmstart.load(model, {"old.v": torch.ones(2)}, rename={"gone": "new"})
    with pytest.raises(MappingError, match=r"new\.v  checkpoint \(3,\), model \(2,\)"):
        warmstart.load(model, {"old.v": torch.ones(3)}, rename={"old": "new"})


def test_or_2_and_or_5_only_what_is_listed_is_taken_and_the_rest_keeps_its_value():
    model = nn.ModuleDict(
        {"a": flat(w=(1,)), "b1": flat(w=(1,)), "c": nn.ModuleDict({"a": flat(w=(1,)), "e": flat(w=(1,))})}
    )
    for value, parameter in enumerate(model.parameters(), start=10):
        nn.init.constant_(parameter, value)
    keys = {"a.w": 0.0, "b.w": 1.0, "c.a.w": 2.0, "c.e.w": 3.0}
    source = {key: torch.tensor([value]) for key, value in keys.items()}
    report = warmstart.load(model, source, rename={"^b": "b1"}, include=["a", "b1"])
    values = {name: p.item() for name, p in model.named_parameters()}
    assert values == {"a.w": 0, "b1.w": 1, "c.a.w": 12, "c.e.w": 13}
    assert report.excluded == ("c.a.w", "c.e.w")
    warmstart.load(model, source, rename={"^b": "b1"}, include=["a", "c.e"])
    assert model["c"]["e"].w.item() == 3
    assert model["c"]["a"].w.item() == 12


def test_or_3_a_rule_for_a_key_that_is_not_there_is_an_error():
    keys = {"v": torch.ones(2)}
    assert [p.kind for p in warmstart.plan(flat(v=(2,)), keys, rename={"gone": "v2"}).errors] == ["unused"]
    with pytest.raises(MappingError, match="gone"):
        warmstart.load(flat(v=(2,)), keys, convert=[warmstart.Conversion("gone", "v2", [warmstart.Transpose(0, 1)])])


def test_bv_2_two_trees_are_compared_by_name_and_by_dtype():
    model = nn.Module()
    model.a = flat(b=(2,))
    model.register_buffer("c", torch.zeros(2, dtype=torch.int64))
    plan = warmstart.plan(model, {"a.B": torch.ones(2), "c": torch.ones(2)})
    assert (plan.missing, plan.unexpected) == (("a.b",), ("a.B",))
    assert [(p.kind, p.names) for p in plan.errors] == [
        ("dtype", ("c",)),
        ("missing", ("a.b",)),
        ("unexpected", ("a.B",)),
    ]


def test_bv_2_an_unknown_tree_is_an_error_that_lists_the_known():
    with pytest.raises(CheckpointError, match=r"(?s)params_em.*params_ema"):
        warmstart.plan(
            flat(v=(2,)),
            {"params": {"v": torch.ones(2)}, "params_ema": {"v": torch.ones(2)}},
            checkpoint_key="params_em",
        )
