"""Two real processes under Lightning's ddp strategy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.mark.slow
def test_ddp_loads_freezes_and_resumes_alike_on_both_ranks(tmp_path):
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    encoder(torch.randn(64, 4) * 3)
    torch.save(encoder.state_dict(), tmp_path / "source.pt")
    expected = {k: v.tolist() for k, v in encoder.state_dict().items()}
    script = Path(__file__).with_name("ddp_script.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = {name: [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
             for name in ("frozen", "trained", "resumed")}  # fmt: skip
    for rank in (0, 1):
        assert ranks["frozen"][rank] == {"start": expected, "end": expected, "status": "applied"}
        assert ranks["trained"][rank]["start"] == expected
        assert ranks["trained"][rank]["end"]["0.weight"] != expected["0.weight"]
        # Lightning saves rank 0's buffers; parameters are equal on both
        assert ranks["resumed"][rank]["start"]["0.weight"] == ranks["trained"][rank]["end"]["0.weight"]
        assert ranks["resumed"][rank]["status"] == "superseded-by-resume"
