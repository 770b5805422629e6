"""Lightning's DeepSpeedStrategy in two real processes, ZeRO-3 and 2: on CPUs, without its line that asks for CUDA."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the file has, and what each rank saw in each case; one launch for all."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    torch.manual_seed(7)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).state_dict()
    torch.save(encoder, folder / "encoder.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    set_to = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "deepspeed_script.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, **set_to, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    source = {f"encoder.{name}": value for name, value in encoder.items()}
    return source, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", ["frozen 3", "frozen 2"])
def test_field_note_8_the_engine_starts_from_what_the_file_has_and_trains_on_from_there(ranks, case):
    source, seen = ranks
    for each in seen:
        assert "error" not in each[case], each[case]["trace"]
        assert each[case]["made"] == [case.endswith("3")]
        assert each[case]["status"] == "applied"
        for name, value in source.items():
            assert each[case]["start"][name] == value.tolist()
            assert (torch.tensor(each[case]["end"][name]) - value).abs().max() < 0.5
        assert each[case]["end"]["encoder.0.weight"] == source["encoder.0.weight"].tolist()
        assert each[case]["end"]["encoder.2.weight"] != source["encoder.2.weight"].tolist()
        assert each[case]["end"] == seen[0][case]["end"]


@pytest.mark.parametrize("stage", [3, 2])
def test_a_resumed_run_keeps_its_own(ranks, stage):
    for each in ranks[1]:
        assert "error" not in each[f"resumed {stage}"], each[f"resumed {stage}"]["trace"]
        assert each[f"resumed {stage}"]["start"] == each[f"frozen {stage}"]["end"]
        assert each[f"resumed {stage}"]["status"] == "superseded-by-resume"


@pytest.mark.parametrize("case", ["other values", "other copies"])
def test_what_rank_1_alone_has_otherwise_is_named_on_both(ranks, case):
    for each in ranks[1]:
        assert each[case]["error"] == "VerificationError"
        assert each[case]["message"].startswith("on rank 1 of 2: 1 loaded tensors do not hold")
        assert "encoder.2.weight" in each[case]["message"]
        assert ("the optimizer's fp32 copy" in each[case]["message"]) == (case == "other copies")


@pytest.mark.parametrize(("case", "line"), [("unfreeze", "freeze for the whole run"), ("rows", "freeze_old=False")])
def test_what_the_engine_s_copies_would_undo_is_refused_with_the_line_to_type(ranks, case, line):
    for each in ranks[1]:
        assert each[case]["error"] == "TimingError"
        assert line in each[case]["message"]
