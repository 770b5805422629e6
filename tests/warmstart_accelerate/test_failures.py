"""What one of two processes runs into ends both, in time, with words that say what it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import loops
import pytest
import torch

SCRIPT = Path(__file__).parent / "fail_script.py"
LAUNCH = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}

pytestmark = pytest.mark.slow


def fail(case: str, folder: Path, launcher: str = "torchrun") -> str:
    torch.save(loops.trained_encoder(loops.Smooth), folder / "encoder.pt")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH[launcher], str(SCRIPT), case, str(folder)],
        capture_output=True,
        text=True,
        timeout=180,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WARMSTART_TIMEOUT": "15",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_rank_1_without_the_file(tmp_path):
    said = fail("no file", tmp_path)
    assert said.count("CheckpointError: on rank 1 of 2") == 2
    assert "nowhere.pt" in said


def test_rank_1_with_another_model(tmp_path):
    said = fail("another model", tmp_path)
    assert said.count("MappingError: on rank 1 of 2") == 2


def test_rank_0_killed(tmp_path):
    said = fail("killed", tmp_path, "accelerate")
    assert "Signal 9 (SIGKILL) received by PID" in said


def test_rank_0_only(tmp_path):
    said = fail("rank 0 only", tmp_path)
    assert "TimingError" in said
    assert "rank 1" in said[said.index("TimingError") :].splitlines()[0]
