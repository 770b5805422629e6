"""Run by test_ranks.py under torchrun: two processes that share one GPU, sharded by FSDP2, over gloo."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import warmstart
from warmstart.shards import local_of

folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5))


def sharded(device: str, **options: object) -> nn.Module:
    with torch.device(device):
        model = net()
    mesh = init_device_mesh("cuda", (world,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def seen(model: nn.Module) -> dict[str, object]:
    state = model.state_dict()
    return {
        "local": {n: local_of(t).tolist() for n, t in state.items()},
        "devices": sorted({local_of(t).device.type for t in state.values()}),
    }


torch.cuda.set_device(0)
dist.init_process_group("cpu:gloo,cuda:gloo")
found: dict[str, object] = {}
for device in ("cuda", "meta"):
    for read in ("local", "broadcast"):
        torch.manual_seed(rank)
        model = sharded(device)
        source = folder / ("w.safetensors" if read == "local" or rank == 0 else "nowhere.safetensors")
        report = warmstart.load(model, source, read=read)
        report.check(model)
        found[f"{device} {read}"] = seen(model)
model = sharded("meta", offload_policy=CPUOffloadPolicy())
warmstart.load(model, folder / "w.safetensors").check(model)
found["offloaded"] = seen(model)
(folder / f"rank-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
