"""Every rule with what it hit, and every value with the rules that brought it."""

from __future__ import annotations

import torch
from torch import nn

import warmstart
from warmstart.rendering.replaying import Replay, Rule


def counted(plan, number=0):
    return {(rule.field, rule.text): (rule.hits, rule.unit) for rule in Replay(plan, number).rules()}


def how(plan):
    replays = [Replay(plan, number) for number in range(len(plan.parts))]
    return {a.target: replays[a.part].how(a) for a in plan.assignments}


def test_every_kind_of_rule_with_its_hits(mixed_plan):
    assert counted(mixed_plan) == {
        ("select", "net"): (11, "keys"),
        ("strip_prefix", "net"): (11, "keys"),
        ("exclude", "other"): (2, "entries"),
        ("rename", r"blocks\.(\d+) to encoder.layer.\1"): (6, "keys"),
        ("adapt", "position: {'slice_or_pad': {}}"): (1, "entries"),
        ("fill", "gate: 1.0"): (1, "entries"),
        ("allow_missing", "head.bias"): (1, "entries"),
        ("allow_mismatched", "head"): (2, "entries"),
        ("allow_unexpected", "net.fc"): (1, "keys"),
        ("freeze", "encoder.layer.0"): (2, "entries"),
    }


def test_every_value_says_what_brought_it(mixed_plan):
    assert how(mixed_plan) == {
        "encoder.layer.0.weight": r"strip_prefix, rename blocks\.(\d+)",
        "encoder.layer.0.bias": r"strip_prefix, rename blocks\.(\d+)",
        "encoder.layer.1.weight": r"strip_prefix, rename blocks\.(\d+)",
        "encoder.layer.1.bias": r"strip_prefix, rename blocks\.(\d+)",
        "encoder.layer.2.weight": r"strip_prefix, rename blocks\.(\d+)",
        "encoder.layer.2.bias": r"strip_prefix, rename blocks\.(\d+)",
        "position": "strip_prefix, SliceOrPad",
        "gate": "fill 1",
        "embed.weight": "strip_prefix",
        "decoder.weight": "tied",
    }


def test_an_inferred_prefix_and_the_longest_suffix_are_counted():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    state = {f"old.name.{k}": v for k, v in model.state_dict().items()}
    plan = warmstart.plan(model, state)
    assert counted(plan) == {("prefix", "inferred: 'old.name' to ''"): (4, "keys")}
    assert set(how(plan).values()) == {"inferred prefix"}

    plan = warmstart.plan(model, state, match="suffix")
    assert counted(plan) == {("match", "suffix"): (4, "keys")}
    assert set(how(plan).values()) == {"longest suffix"}


def test_conversions_count_their_instances_and_into_its_scope():
    model = nn.ModuleDict({"m": nn.ModuleList(nn.Linear(2, 6, bias=False) for _ in range(3)), "z": nn.Linear(1, 1)})
    state = {f"l.{i}.{x}": torch.zeros(2, 2) for i in range(3) for x in "qkv"}
    conversion = warmstart.Conversion(["l.{i}.q", "l.{i}.k", "l.{i}.v"], "{i}.weight", [warmstart.Concat(0)])
    plan = warmstart.plan(model, state, convert=[conversion], into="m", freeze=True)
    assert plan.errors == ()
    assert counted(plan) == {
        ("into", "m"): (3, "entries"),
        ("convert", str(conversion)): (3, "instances"),
        ("freeze", "True"): (3, "entries"),
    }
    assert how(plan)["m.1.weight"] == str(conversion)


def test_a_rule_that_hits_nothing_says_so_and_settings_have_no_count():
    plan = warmstart.plan(nn.Linear(2, 2), nn.Linear(2, 2), rename={"a": "b"}, exclude="x", min_coverage=0.5)
    assert plan.errors
    assert Replay(plan, 0).rules() == [
        Rule("exclude", "x", 0, "entries"),
        Rule("rename", "a to b", 0, "keys"),
        Rule("min_coverage", "0.5"),
    ]


def test_a_rename_that_leaves_nothing_of_a_name_does_not_break_the_page():
    plan = warmstart.plan(nn.Linear(2, 2), nn.Linear(2, 2), rename={"weight": ""})
    assert "leaves nothing" in plan.explain()
    assert [rule.field for rule in Replay(plan, 0).rules()] == ["rename"]


def test_wrapper_segments_and_the_same_name():
    model = nn.Sequential(nn.Linear(2, 2))
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    assert set(how(warmstart.plan(model, wrapped)).values()) == {"wrapper segments"}
    assert set(how(warmstart.plan(model, dict(model.state_dict()))).values()) == {"same name"}
