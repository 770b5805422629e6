"""Strategies whose processes come from the user's own: `ddp_spawn`, and the forks of `ddp_notebook` and `ddp_fork`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).with_name("spawn_script.py")
LIMIT = 500  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT + 60)]


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_processes_that_come_from_this_one_load_and_resume(tmp_path, strategy):
    torch.manual_seed(7)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
    encoder(torch.randn(64, 4) * 3 + 1)
    torch.save(encoder.state_dict(), tmp_path / "source.pt")
    command = [sys.executable, str(SCRIPT), strategy, str(tmp_path), str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT + 20, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    source = {name: value.tolist() for name, value in encoder.state_dict().items()}

    fit = found["fit"]
    assert ("resume" in found) is (strategy == "ddp_notebook")
    assert len({fit["process"], *(rank["process"] for rank in fit["ranks"])}) == 3
    for rank in fit["ranks"]:
        assert rank["start"] == source
        assert rank["status"] == "applied"
        assert rank["end"] == fit["here"]  # Lightning brings the weights back into the user's own process
    assert {n: v for n, v in fit["here"].items() if n.startswith(("encoder.0", "encoder.1"))} == {
        f"encoder.{n}": v for n, v in source.items() if not n.startswith("2")
    }
    assert fit["here"]["encoder.2.weight"] != source["2.weight"]
    assert json.loads((tmp_path / "fit" / "warmstart.json").read_text())["status"] == "applied"

    for rank in found["resume"]["ranks"] if "resume" in found else ():
        assert {f"encoder.{n}": v for n, v in rank["start"].items()} == {
            n: v for n, v in fit["here"].items() if n.startswith("encoder")
        }
        assert rank["status"] == "superseded-by-resume"
        assert rank["end"] == found["resume"]["here"] != fit["here"]
