"""Whatever spreads the model, a load gives it what one process gives a plain one, bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path

import cells
import pytest
import torch
from cells import CASES, SOURCES, WORLD
from stories import STORIES

import warmstart
from warmstart import Pretrained
from warmstart.tensors import same_bits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(660)]


@functools.cache
def alone(folder: Path, name: str, device: str) -> dict[str, torch.Tensor]:
    """What one process gives a plain model."""
    case = CASES[name]
    with torch.device(device):
        net = cells.fresh(case)
    warmstart.load(net, Pretrained(cells.path_of(folder, name, "safetensors"), **case.fields))
    return cells.whole(net)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", WORLD)
def test_every_engine_holds_what_one_process_holds(engine, name, source, ranks, checkpoints):
    """field_note_6, field_note_7, field_note_14, field_note_15, field_note_23, field_note_25, field_note_37."""
    expected = alone(checkpoints, name, "meta" if engine == "fsdp2-meta" else "cpu")
    case = CASES[name]
    for rank in ranks(engine):
        facts = rank.facts[f"{name}-{source}"]
        assert "error" not in facts, facts["error"]
        got = rank.tensors[f"{name}-{source}"]
        assert set(got) == set(expected)
        if engine == "ddp" and name == "frozen":  # its reducer would wait for what is frozen
            assert "DistributedDataParallel" in facts["refused"]
            assert all(same_bits(got[key], value) for key, value in cells.whole(cells.fresh(case)).items())
            continue
        assert [key for key in expected if not same_bits(got[key], expected[key])] == []
        assert facts["same_objects"]
        assert facts["meta"] == []
        assert facts["tied"] == case.sizes.get("tied", False)
        assert facts["missing"] == (["blocks.1.up.bias", "head.weight"] if name == "partial" else [])
        frozen = [key for key in expected if name == "frozen" and key.startswith(("embed.", "blocks.0."))]
        parameters = {key for key, _ in cells.fresh(case).named_parameters()}
        assert set(facts["trains"]) == parameters - set(frozen)


@pytest.mark.parametrize(("engine", "story"), [(e, s.__name__) for e, told in STORIES.items() for s in told])
def test_story(engine, story, ranks):
    for rank in ranks(engine):
        assert "error" not in rank.facts[story], rank.facts[story]["error"]
