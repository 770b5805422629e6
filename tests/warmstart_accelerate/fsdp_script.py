"""Run by test_fsdp2.py: two gloo processes under accelerate's FSDP2; each leaves what it saw in a file."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import loops
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

import warmstart
from warmstart_accelerate import warm_start

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found: dict[str, object] = {}


def fsdp2() -> Accelerator:
    """Accelerate selects FSDP on accelerators only: on CPUs its state is told."""
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    return accelerator


def whole(model: nn.Module) -> dict[str, object]:
    values = model.state_dict()
    return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).tolist() for n, v in values.items()}


def step(accelerator, model, optimizer):
    accelerator.backward(model(torch.randn(4, 4)).square().mean())
    optimizer.step()


def before_prepare():
    accelerator, model = fsdp2(), loops.Smooth()
    report = warm_start(accelerator, model, folder / "encoder.pt", into="encoder", freeze="encoder.0")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    start = whole(model)
    step(accelerator, model, optimizer)
    report.frozen.check()
    kinds = {type(p).__name__ for p in model.parameters()}
    return {"start": start, "end": whole(model), "status": report.status, "kinds": sorted(kinds)}


def after_prepare():
    accelerator, model = fsdp2(), loops.Smooth()
    frozen = warmstart.freeze(model, "encoder.0")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    report = warm_start(accelerator, model, folder / "encoder.pt", into="encoder")
    start = whole(model)
    step(accelerator, model, optimizer)
    return {"start": start, "end": whole(model), "status": report.status, "frozen": len(frozen)}


def overwritten():
    accelerator, model = fsdp2(), loops.Smooth()
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    if rank == 1:
        with torch.no_grad():
            model.encoder[0].weight.to_local().zero_()
    model(torch.randn(4, 4))


if __name__ == "__main__":
    for case in (before_prepare, after_prepare, overwritten):
        loops.fresh()
        torch.manual_seed(rank)
        try:
            found[case.__name__] = case()
        except Exception as error:
            found[case.__name__] = {
                "error": type(error).__name__,
                "message": str(error),
                "trace": traceback.format_exc(),
            }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)
