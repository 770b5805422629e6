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
    torch.save(encoder := loops.trained_encoder(loops.Smooth), folder / "encoder.pt")
    torch.save({f"encoder.{name}": value for name, value in encoder.items()}, folder / "whole.pt")
    forked.run_well(Path(__file__).with_name("fsdp_script.py"), 2, folder, folder)
    source = {f"encoder.{k}": v.tolist() for k, v in torch.load(folder / "encoder.pt").items()}
    return source, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


LOADED = [
    "before_prepare", "before_prepare_that_shards_what_rank_0_has", "on_meta_before_prepare", "after_prepare",
    "on_meta_sharded_before_prepare",
]  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_field_note_6_the_shards_hold_what_the_file_has_and_train(ranks, case):
    source, seen = ranks
    for each in seen:
        assert "error" not in each[case], each[case]["trace"]
        assert {k: v for k, v in each[case]["start"].items() if k.startswith("encoder")} == source
        assert each[case]["status"] == "applied"
        assert each[case]["end"] == seen[0][case]["end"]
        assert each[case]["end"]["encoder.2.weight"] != source["encoder.2.weight"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("on_meta_in_part_before_prepare", "2 parameters of the FSDPSmooth are on the meta device"),
        ("on_meta_after_prepare", "has 1 of its 6 parameters now"),
    ],
)
def test_field_note_23_what_would_train_in_part_is_refused_with_the_lines_in_the_right_order(ranks, case, words):
    for each in ranks[1]:
        assert each[case]["error"] == "TimingError", each[case]
        said = each[case]["message"]
        assert words in said
        assert said.index("fully_shard(model)") < said.index("warm_start(accelerator, model, ...)")
        assert said.index("warm_start(accelerator, model, ...)") < said.index("accelerator.prepare(model, optimizer)")


@pytest.mark.parametrize("case", LOADED)
def test_field_note_21_what_is_frozen_before_prepare_stays(ranks, case):
    source, seen = ranks
    for each in seen:
        assert each[case]["kinds"] == ["DTensor"]
        assert each[case]["end"]["encoder.0.weight"] == source["encoder.0.weight"]


def test_what_one_rank_overwrites_in_its_shard_is_named_on_all(ranks):
    for each in ranks[1]:
        assert each["overwritten"]["error"] == "VerificationError"
        assert "encoder.0.weight" in each["overwritten"]["message"]
