"""Loads into a model that lies on a GPU, side by side: seconds, and device memory at the peak above the model.

`python benchmarks/gpu.py [--blocks 24] [--rounds 7]`. All runs are in one process, in turns, since a process' first use of a
device costs seconds; the file is in the page cache, the device is waited for, and one round comes first that does not count.
`fastsafetensors` is measured if it is installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import local

import accelerate
import safetensors.torch
import torch
from harness import into_cache, machine
from models import Transformer, on_meta, write_safetensors
from torch import Tensor, nn

import warmstart
from loading import fast_safetensors_into, places


def on_gpu(blocks: int) -> nn.Module:
    return on_meta(partial(Transformer, blocks)).to_empty(device="cuda")


def pinned(model: nn.Module, path: Path, threads: int = 8, size: int = 8 << 20) -> None:
    """The limit: threads read the file into pinned memory, from which the device copies."""
    at, own, jobs = places(path), local(), []
    for name, tensor in model.state_dict().items():
        offset, count = at[name]
        memory = tensor.view(-1).view(torch.uint8)
        jobs += [(memory[start : start + size], offset + start) for start in range(0, count, size)]

    def move(job: tuple[Tensor, int]) -> None:
        to, offset = job
        if not hasattr(own, "buffer"):
            own.buffer, own.stream = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Stream()
        os.preadv(file.fileno(), [own.buffer.numpy().data[: to.numel()]], offset)
        with torch.cuda.stream(own.stream):
            to.copy_(own.buffer[: to.numel()], non_blocking=True)
        own.stream.synchronize()

    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
        list(pool.map(move, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    build = partial(Transformer, options.blocks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_safetensors(path, build)
        into_cache([path])
        model = on_gpu(options.blocks)
        contestants: dict[str, Callable[[], object]] = {
            "load_file on the device, load_state_dict": lambda: model.load_state_dict(
                safetensors.torch.load_file(path, device="cuda")
            ),
            "load_file, load_state_dict": lambda: model.load_state_dict(safetensors.torch.load_file(path)),
            "accelerate.load_checkpoint_in_model": lambda: accelerate.load_checkpoint_in_model(model, str(path)),
            "fastsafetensors, load_state_dict": lambda: fast_safetensors_into(model, path, "cuda:0"),
            "bare read through pinned memory": lambda: pinned(model, path),
            "warmstart, off": lambda: warmstart.load(model, path, verify="off"),
            "warmstart, sample": lambda: warmstart.load(model, path, verify="sample"),
            "warmstart, full": lambda: warmstart.load(model, path, verify="full"),
        }
        if find_spec("fastsafetensors") is None:
            del contestants["fastsafetensors, load_state_dict"]
        report = warmstart.load(model, path, verify="off")
        contestants["warmstart, check at train start"] = lambda: report.check(model)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        peaks = dict.fromkeys(contestants, 0)
        for turn in range(options.rounds + 1):
            for name, run in contestants.items():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before, start = torch.cuda.memory_allocated(), time.perf_counter()
                run()
                torch.cuda.synchronize()
                taken = time.perf_counter() - start
                if turn:
                    seconds[name].append(taken)
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
        print(
            f"{machine()}; {torch.cuda.get_device_name()}; torch {torch.__version__}; {path.stat().st_size / 1e9:.2f} GB"
        )
        for name, taken in seconds.items():
            print(f"| {name} | {statistics.median(taken) * 1e3:,.0f} ms | {peaks[name] >> 20:,} MiB |")


if __name__ == "__main__":
    main()
