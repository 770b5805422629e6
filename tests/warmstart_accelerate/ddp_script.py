"""Run by test_ddp.py under a launcher: two gloo processes; each rank writes what it saw to a file of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import loops
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

import warmstart
from warmstart import WarmStartError
from warmstart_accelerate import warm_start

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found: dict[str, object] = {}


def values(module):
    return {name: value.tolist() for name, value in module.items()}


def cell(name, run):
    """One case; what it raised, or what it saw."""
    try:
        found[name] = run() or {}
    except WarmStartError as error:
        found[name] = {
            "error": type(error).__name__,
            "message": str(error),
            "tensors": list(getattr(error, "tensors", ())),
        }


def told(seen):
    return {
        "start": values(seen.start),
        "end": values(loops.weights(seen.model)),
        "losses": seen.losses,
        "status": seen.report.status if seen.report else None,
        "digest": seen.report.plan.digest() if seen.report else None,
        "trainable": sorted(n for n, p in seen.model.named_parameters() if p.requires_grad),
        "wrapped": type(seen.prepared).__name__,
    }


def train(name, source, **options):
    # Every rank starts from another random model: what is equal at the start was made so.
    options = {"seed": rank, "kind": loops.Smooth, "size": 4, **options}
    cell(name, lambda: told(loops.train(folder / source, **options)))


def finds_unused():
    return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])


def late():
    accelerator, model = Accelerator(cpu=True), loops.Smooth()
    prepared = accelerator.prepare(model)
    warm_start(accelerator, prepared, folder / "encoder.pt", into="encoder")


def late_freeze():
    accelerator, model = Accelerator(cpu=True), loops.Smooth()
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder", log=False)
    prepared = accelerator.prepare(model)
    warmstart.freeze(prepared, "encoder")


def late_release():
    accelerator, model = Accelerator(cpu=True), loops.Smooth()
    report = warm_start(accelerator, model, folder / "encoder.pt", into="encoder", freeze=True, log=False)
    accelerator.prepare(model)
    report.frozen.release("encoder.0")


def overwritten():
    accelerator, model = Accelerator(cpu=True), loops.Smooth()
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder")
    prepared = accelerator.prepare(model)
    if rank == 1:
        torch.nn.init.zeros_(model.encoder[0].bias)
    prepared(torch.randn(4, 4))


if __name__ == "__main__":
    train("loaded", "encoder.pt", folder=folder / "run", freeze="encoder.0", save=folder / "state")
    train("resumed", "encoder.pt", freeze="encoder.0", resume=folder / "state")
    train("file is gone", "nowhere.pt", freeze="encoder.0", resume=folder / "state")
    cell("staged", lambda: told(loops.train(
        folder / "encoder.pt", seed=rank, kind=loops.Smooth, size=4, freeze=True, unfreeze={2: "encoder.0"},
        accelerator=finds_unused(),
    )))  # fmt: skip
    train("cannot bear unused", "encoder.pt", freeze=True, unfreeze={2: "encoder.0"})
    cell("load after prepare", late)
    cell("freeze after prepare", late_freeze)
    cell("release after prepare", late_release)
    cell("overwritten on rank 1", overwritten)
    train("rank 1 has no file", f"only-{rank}.pt")
    train("rank 0 reads for rank 1", f"only-{rank}.pt", freeze="encoder.0", read="broadcast")
    cell("fetched", lambda: told(loops.train(os.environ["FETCHED"], seed=rank, kind=loops.Smooth, size=4)))
    train("nobody has a file", "nowhere.pt", read="broadcast")
    train("rank 1 has no file, frozen by name", f"only-{rank}.pt", freeze="encoder")
    train("rank 1 has another file", f"other-{rank}.pt")
    train("rank 1 has another model", "encoder.pt", kind=loops.Smooth if rank == 0 else loops.Net)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
