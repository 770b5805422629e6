"""Two real processes under accelerate's FSDP2: loaded before `prepare`, and after it."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import loops
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    torch.save(loops.trained_encoder(loops.Smooth), folder / "encoder.pt")
    forked.run_well(Path(__file__).with_name("fsdp_script.py"), 2, folder, folder)
    source = {f"encoder.{k}": v.tolist() for k, v in torch.load(folder / "encoder.pt").items()}
    return source, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", ["before_prepare", "after_prepare"])
def test_field_note_6_the_shards_hold_what_the_file_has_and_train(ranks, case):
    source, seen = ranks
    for each in seen:
        assert "error" not in each[case], each[case]["trace"]
        assert {k: v for k, v in each[case]["start"].items() if k.startswith("encoder")} == source
        assert each[case]["status"] == "applied"
        assert each[case]["end"] == seen[0][case]["end"]
        assert each[case]["end"]["encoder.2.weight"] != source["encoder.2.weight"]


def test_field_note_21_what_is_frozen_before_prepare_stays(ranks):
    source, seen = ranks
    for each in seen:
        assert each["before_prepare"]["kinds"] == ["DTensor"]
        assert each["before_prepare"]["end"]["encoder.0.weight"] == source["encoder.0.weight"]


def test_what_one_rank_overwrites_in_its_shard_is_named_on_all(ranks):
    for each in ranks[1]:
        assert each["overwritten"]["error"] == "VerificationError"
        assert "encoder.0.weight" in each["overwritten"]["message"]
