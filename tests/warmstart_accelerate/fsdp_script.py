"""Run by test_fsdp2.py: two gloo processes under accelerate's FSDP2; each leaves what it saw in a file."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import loops
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import fully_shard

from warmstart_accelerate import warm_start

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found: dict[str, object] = {}


def fsdp2(efficient: bool = False) -> Accelerator:
    """Accelerate selects FSDP on accelerators only: on CPUs its state is told."""
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=efficient
    )
    return accelerator


def whole(model: nn.Module) -> dict[str, object]:
    values = model.state_dict()
    return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).tolist() for n, v in values.items()}


def empty() -> nn.Module:
    with init_empty_weights():
        return loops.Smooth()


def step(accelerator, model, optimizer):
    accelerator.backward(model(torch.randn(4, 4)).square().mean())
    optimizer.step()


def trained(accelerator, model, optimizer, report):
    start = whole(model)
    step(accelerator, model, optimizer)
    report.frozen.check()
    kinds = sorted({type(p).__name__ for p in model.parameters()})
    return {"start": start, "end": whole(model), "status": report.status, "kinds": kinds}


def before_prepare(accelerator=None, model=None, source="encoder.pt", **fields):
    accelerator, model = accelerator or fsdp2(), model or loops.Smooth()
    report = warm_start(accelerator, model, folder / source, freeze="encoder.0", **(fields or {"into": "encoder"}))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return trained(accelerator, *accelerator.prepare(model, optimizer), report)


def before_prepare_that_shards_what_rank_0_has():
    return before_prepare(fsdp2(efficient=True))


def on_meta_before_prepare():
    return before_prepare(model=empty(), source="whole.pt", allow_missing="head")


def on_meta_in_part_before_prepare():
    accelerator, model = fsdp2(), empty()
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(accelerator, *accelerator.prepare(model, optimizer))


def after_prepare():
    accelerator, model = fsdp2(), loops.Smooth()
    model.encoder[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    report = warm_start(accelerator, model, folder / "encoder.pt", into="encoder", freeze="encoder.0")
    return trained(accelerator, model, optimizer, report)


def on_meta_sharded_before_prepare():
    return before_prepare(model=fully_shard(empty()), source="whole.pt", allow_missing="head")


def on_meta_after_prepare():
    accelerator, model = fsdp2(), empty()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    warm_start(accelerator, model, folder / "whole.pt", allow_missing="head")


def overwritten():
    accelerator, model = fsdp2(), loops.Smooth()
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    if rank == 1:
        with torch.no_grad():
            model.encoder[0].weight.to_local().zero_()
    model(torch.randn(4, 4))


CASES = [
    before_prepare, before_prepare_that_shards_what_rank_0_has, on_meta_before_prepare, on_meta_in_part_before_prepare,
    after_prepare, on_meta_sharded_before_prepare, on_meta_after_prepare, overwritten,
]  # fmt: skip

if __name__ == "__main__":
    for case in CASES:
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
