"""One record for every entry and every unused key, with what became of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart.rendering.records import elements, entries, unused
from warmstart.rendering.replaying import Replay


def replays(plan):
    return [Replay(plan, number) for number in range(len(plan.parts))]


def test_every_status_once(mixed_plan):
    records = {e.name: e for e in entries(mixed_plan, None, replays(mixed_plan))}
    assert list(records) == list(mixed_plan.targets.entries)
    assert {name: e.status for name, e in records.items()} == {
        **{f"encoder.layer.{i}.{leaf}": "loaded" for i in range(3) for leaf in ("weight", "bias")},
        "position": "adapted", "gate": "filled", "embed.weight": "loaded", "decoder.weight": "tied",
        "head.weight": "own init", "head.bias": "own init", "other.weight": "out of scope", "other.bias": "out of scope",
    }  # fmt: skip
    assert records["position"].how == "strip_prefix, SliceOrPad from (3, 4)"
    assert records["head.weight"].how == "checkpoint has (5, 4)"
    assert records["head.weight"].keys == ("net.head.weight",)
    assert records["decoder.weight"].keys == ("net.embed.weight",)
    assert [name for name, e in records.items() if e.frozen] == ["encoder.layer.0.weight", "encoder.layer.0.bias"]


def test_elements_count_what_is_tied_once(mixed_plan):
    sizes = elements(entries(mixed_plan, None, replays(mixed_plan)))
    assert sizes == {
        "loaded": 3 * 20 + 32, "adapted": 24, "filled": 4, "tied": 0, "own init": 10, "out of scope": 20, "error": 0,
    }  # fmt: skip


def test_unused_keys_say_why(mixed_plan):
    assert {u.key: (u.why, u.error) for u in unused(mixed_plan, replays(mixed_plan))} == {
        "net.fc.weight": ("fits nothing, allowed", False),
        "net.steps": ("non-persistent buffer, which the model computes itself", False),
        "temperature": ("not selected", False),
    }


def test_what_an_error_names_has_that_status(failed_plan):
    records = {e.name: e for e in entries(failed_plan, None, replays(failed_plan))}
    assert {name: e.how for name, e in records.items() if e.status == "error"} == {
        "head.weight": "mismatched: checkpoint has (5, 4)",
        "head.bias": "missing: no key",
    }
    assert [u.key for u in unused(failed_plan, replays(failed_plan)) if u.error] == ["net.fc.weight"]


@pytest.mark.parametrize(("verify", "said"), [("full", "full"), ("sample", "sample"), ("off", "no")])
def test_verified_is_what_was_compared(verify, said):
    report = warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2), verify=verify)
    assert {e.verified for e in entries(report.plan, report, replays(report.plan))} == {said}
    assert {e.verified for e in entries(report.plan, None, replays(report.plan))} == {""}


def test_casts_and_several_sources_are_told_apart():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}).to(torch.bfloat16)
    left, right = (
        {"weight": torch.ones(2, 2), "more": torch.ones(1)},
        {"weight": torch.ones(2, 2), "more": torch.ones(1)},
    )
    parts = [
        warmstart.Pretrained(left, into="a", allow_unexpected="more"),
        warmstart.Pretrained(right, into="b", allow_unexpected="more"),
    ]
    plan = warmstart.plan(model, parts)
    records = entries(plan, None, replays(plan))
    assert [(e.dtype, e.how, e.source) for e in records] == [
        ("float32 to bfloat16", "into a", "a state dict in memory"),
        ("float32 to bfloat16", "into b", "a state dict in memory"),
    ]
    assert [(u.key, u.source) for u in unused(plan, replays(plan))] == [("more", "a state dict in memory")] * 2
