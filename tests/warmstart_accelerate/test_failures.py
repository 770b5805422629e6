"""What one of two processes runs into ends both, in time, with words that say what it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import loops
import pytest
import torch

SCRIPT = Path(__file__).with_name("fail_script.py")
CONFIG = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    torch.save(loops.trained_encoder(loops.Smooth), tmp_path / "encoder.pt")
    return tmp_path


def launched(case: str, folder: Path, *launcher: str) -> str:
    """What a launcher says of the case, once both processes have started well, and they and it have ended badly."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), case, str(folder)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode != 0
    assert done.stdout.count("2 processes started: applied") == 2
    return done.stdout + done.stderr


def test_rank_1_without_the_file_under_torchrun(folder):
    said = launched("no file", folder, "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert said.count("CheckpointError: on rank 1 of 2") == 2
    assert "nowhere.pt" in said
    assert said.count('read="broadcast"') == 2


def test_rank_0_killed_under_a_launch_by_a_config_file(folder):
    (folder / "config.yaml").write_text(CONFIG)
    said = launched("killed", folder, "accelerate.commands.launch", "--config_file", str(folder / "config.yaml"))
    assert "Signal 9 (SIGKILL) received by PID" in said


def test_rank_1_with_another_model(folder):
    codes, logs = forked.run(SCRIPT, 2, folder, "another model", folder)
    assert codes == [1, 1]
    assert all("MappingError: on rank 1 of 2" in log for log in logs)


def test_rank_0_only(folder):
    codes, (zero, _) = forked.run(SCRIPT, 2, folder, "rank 0 only", folder)
    assert codes == [1, 1]
    assert "TimingError: rank 1 of 2 did not come to 'warm_start' within" in zero
