"""Two real processes under accelerate's DeepSpeed: ZeRO-3, 2 and 1 on the CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import forked
import loops
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in each case; one launch for all."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    torch.save(loops.trained_encoder(loops.Smooth), folder / "encoder.pt")
    forked.run_well(Path(__file__).with_name("deepspeed_script.py"), 2, folder, folder, timeout=560)
    source = {f"encoder.{k}": v for k, v in torch.load(folder / "encoder.pt").items()}
    return source, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


CASES = {
    "zero3": "DeepSpeedZeroOptimizer_Stage3", "zero3_float32": "DeepSpeedZeroOptimizer_Stage3",
    "zero_init": "DeepSpeedZeroOptimizer_Stage3", "zero2": "DeepSpeedZeroOptimizer", "zero1": "DeepSpeedZeroOptimizer",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_field_note_8_the_engine_starts_from_what_the_file_has_and_trains_on_from_there(ranks, case):
    source, seen = ranks
    for each in seen:
        assert "error" not in each[case], each[case]["trace"]
        assert each[case]["optimizer"] == CASES[case]
        assert each[case]["status"] == "applied"
        assert each[case]["end"] == seen[0][case]["end"]
        for name, value in source.items():
            kept = value if case == "zero3_float32" else value.bfloat16().float()
            assert each[case]["start"][name] == kept.tolist(), name
            moved = (torch.tensor(each[case]["end"][name]) - value).abs().max()
            assert moved < 0.2, name  # one step with gradients clipped to norm 1, and not back to its first values
        assert each[case]["end"]["encoder.2.weight"] != each[case]["start"]["encoder.2.weight"]
        assert each[case]["end"]["head.weight"] != each[case]["start"]["head.weight"]


@pytest.mark.parametrize("case", CASES)
def test_field_note_21_what_is_frozen_before_prepare_stays(ranks, case):
    for each in ranks[1]:
        for name in ("encoder.0.weight", "encoder.0.bias"):
            assert each[case]["end"][name] == each[case]["start"][name]


def test_what_one_rank_overwrites_in_its_partition_is_named_on_all(ranks):
    for each in ranks[1]:
        assert each["overwritten_on_one_rank"]["error"] == "VerificationError"
        assert each["overwritten_on_one_rank"]["message"].startswith("on rank 1 of 2: 1 loaded tensors")
        assert "encoder.0.weight" in each["overwritten_on_one_rank"]["message"]


@pytest.mark.parametrize("case", ["other_copies_3", "other_copies_2"])
def test_field_note_8_right_values_over_an_optimizer_s_other_copies_are_an_error(ranks, case):
    for each in ranks[1]:
        assert each[case]["error"] == "VerificationError"
        assert each[case]["message"].startswith("on rank 1 of 2")
        assert "the optimizer's fp32 copy of it is not" in each[case]["message"]


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("after_prepare", "model, optimizer = accelerator.prepare(model, optimizer)"),
        ("released_later", "freeze for the whole run"),
        ("rows_held", "MapRows(..., freeze_old=False)"),
    ],
)
def test_what_the_engine_s_copies_would_undo_is_refused_with_the_line_to_type(ranks, case, line):
    for each in ranks[1]:
        assert each[case]["error"] == "TimingError"
        assert line in each[case]["message"]


@pytest.mark.parametrize("case", ["resumed_3", "resumed_2", "resumed_without_the_file_3", "resumed_without_the_file_2"])
def test_a_run_that_is_resumed_keeps_its_own(ranks, case):
    for each in ranks[1]:
        assert "error" not in each[case], each[case]["trace"]
        assert each[case]["start"] == each[case]["left"]
        assert each[case]["status"] == "superseded-by-resume"
        assert each[case]["end"]["encoder.0.weight"] == each[case]["left"]["encoder.0.weight"]
        assert each[case]["end"]["encoder.2.weight"] != each[case]["left"]["encoder.2.weight"]
