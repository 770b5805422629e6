"""Two processes on one GPU: shards on the device, read by each rank or sent by one, on meta, and offloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

CELLS = {
    "cuda local": "cuda",
    "cuda broadcast": "cuda",
    "meta local": "cuda",
    "meta broadcast": "cuda",
    "offloaded": "cpu",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5))
    model(torch.randn(64, 7) * 3 + 1)
    save_file(model.state_dict(), folder / "w.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("ranks.py")), str(folder)],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return model.state_dict(), [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("cell", CELLS)
def test_each_rank_holds_its_part_on_the_device(ran, cell):
    state, ranks = ran
    for rank, found in enumerate(ranks):
        local = found[cell]["local"]
        for name, value in state.items():
            whole = "running" in name or "tracked" in name
            part = value if whole else (value.chunk(2)[rank] if rank < len(value.chunk(2)) else value[:0])
            assert torch.equal(torch.tensor(local[name]).view(part.shape), part), (cell, rank, name)
        assert CELLS[cell] in found[cell]["devices"]
