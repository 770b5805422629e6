"""Two processes save a fully sharded model and its optimizer: `python dcp_script.py RANK FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).eval()


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    net = model()
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)
    net(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optim": moments, "step": 3}, checkpoint_id=folder / "nested")
    dcp.save(weights, checkpoint_id=folder / "plain")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
