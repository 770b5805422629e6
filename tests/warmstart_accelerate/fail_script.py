"""Run by test_failures.py: all processes start well, then one goes another way, and all have to end."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import traceback
from pathlib import Path

import loops
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from warmstart_accelerate import warm_start


def start_well(accelerator: Accelerator, folder: Path) -> None:
    model = loops.Smooth()
    report = warm_start(accelerator, model, folder / "encoder.pt", into="encoder", name="well", log=False)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.randn(4, 4))
    print(f"{accelerator.num_processes} processes started: {report.status}", flush=True)


def run(case: str, folder: Path) -> None:
    wait = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=20))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[wait])
    main = accelerator.is_main_process
    start_well(accelerator, folder)
    accelerator.wait_for_everyone()
    model = loops.Net() if case == "another model" and not main else loops.Smooth()

    if case == "killed" and main:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "rank 0 only":
        os.environ["WARMSTART_TIMEOUT"] = "3"
        if main:
            warm_start(accelerator, model, folder / "encoder.pt", into="encoder", freeze=True)
    else:
        name = "nowhere.pt" if case == "no file" and not main else "encoder.pt"
        warm_start(accelerator, model, folder / name, into="encoder", freeze=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    model(torch.randn(4, 4))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        run(sys.argv[1], Path(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # gloo's threads can hold up an interpreter that ends by itself
    os._exit(0)
