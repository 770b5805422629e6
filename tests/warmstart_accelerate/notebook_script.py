"""Run by test_launching.py as one process, as a notebook is: accelerate's launchers fork the ranks from it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import loops
import torch
from accelerate import PartialState, debug_launcher, notebook_launcher


def train(launcher: str, folder: str) -> None:
    rank = PartialState(cpu=True).process_index
    seen = loops.train(Path(folder, "encoder.pt"), seed=rank, kind=loops.Smooth, size=4, freeze="encoder.0")
    found = {
        "world": torch.distributed.get_world_size(),
        "start": {name: value.tolist() for name, value in seen.start.items()},
        "end": {name: value.tolist() for name, value in loops.weights(seen.model).items()},
        "status": seen.report.status,
        "digest": seen.report.plan.digest(),
    }
    Path(folder, f"{launcher}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    port = os.environ["MASTER_PORT"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        del os.environ[name]
    debug_launcher(train, ("debug", sys.argv[1]), num_processes=2)
    notebook_launcher(train, ("notebook", sys.argv[1]), num_processes=2, use_port=port)
