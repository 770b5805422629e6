"""Runs of several real processes without a launcher, forked from a server that imports torch once for all of them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [  # those that are installed
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "safetensors.torch",
    "pytest",
    "warmstart_accelerate",
    "peft",
    "deepspeed",
]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "MASTER_ADDR": "127.0.0.1"}


def run(
    script: Path, world: int, folder: Path, *arguments: object, timeout: float = 240
) -> tuple[list[int], list[str]]:
    """Run a script as `world` ranks, as torchrun would: RANK, WORLD_SIZE and the like are in their environment.

    Returns:
        Exit status and output of each rank; all of them are over when this returns or raises.
    """
    _serve()
    argv = [str(script), *map(str, arguments)]
    env = _ENVIRONMENT | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(_free_port())}
    logs = [folder / f"{'-'.join([script.stem, *map(_word, arguments)])}-{rank}.log" for rank in range(world)]
    running = [
        _CONTEXT.Process(target=_rank, args=(argv, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, logs[rank]))
        for rank in range(world)
    ]
    until = time.monotonic() + timeout
    try:
        for process in running:
            process.start()
        for process in running:
            process.join(max(0.1, until - time.monotonic()))
    finally:
        for process in running:
            process.kill()
            process.join()
    return [process.exitcode for process in running], [log.read_text() for log in logs]


def run_well(script: Path, world: int, folder: Path, *arguments: object, timeout: float = 240) -> None:
    """The same, of ranks that are all expected to end well."""
    codes, logs = run(script, world, folder, *arguments, timeout=timeout)
    assert codes == [0] * world, "\n".join(f"--- rank {rank}\n{log[-3000:]}" for rank, log in enumerate(logs))


def _serve() -> None:
    """Start the server, if it does not run."""
    _CONTEXT.set_forkserver_preload(_IMPORTED)
    before = os.environ.copy()
    os.environ.update(_ENVIRONMENT, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(argv: list[str], env: Mapping[str, str], log: Path) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.pop("WARMSTART_TIMEOUT", None)
    os.environ.update(env)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _word(argument: object) -> str:
    return Path(str(argument)).name
