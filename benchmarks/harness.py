"""Measuring side by side: every run in a process of its own, in turns, with the peak of its anonymous memory.

Each run is forked from a parent that has imported what the contestants use and done nothing else, so that a run costs no
import, and no run finds anything that another left behind. A contestant prepares (builds its model, unmeasured) and gives the
action that is measured. The parent samples the child's memory from outside. Linux only.
"""

from __future__ import annotations

import gc
import os
import platform
import select
import socket
import statistics
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

Action = Callable[[], object]
Prepare = Callable[[], Action]

_EVERY = 0.004  # seconds between two samples of memory


class SkippedError(Exception):
    """A contestant cannot run here: the message says why."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run: wall-clock seconds, and bytes of anonymous memory at the peak above the start."""

    seconds: float
    peak: int


@dataclass(slots=True)
class Result:
    """All runs of one contestant, or why there are none."""

    runs: list[Run] = field(default_factory=list)
    skipped: str = ""

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak(self) -> int:
        return max(run.peak for run in self.runs)


def in_turns(contestants: dict[str, Prepare], rounds: int, before: Action | None = None) -> dict[str, Result]:
    """Run every contestant once in each round, so that a machine that drifts does so for all of them.

    Args:
        contestants: By name, what prepares each of them.
        rounds: How many runs each has; one more comes first and does not count.
        before: What is done in the parent before every run, such as dropping a file from the page cache.
    """
    results = {name: Result() for name in contestants}
    for number in range(rounds + 1):
        for name, prepare in contestants.items():
            result = results[name]
            if result.skipped:
                continue
            if before is not None:
                before()
            try:
                run = forked(prepare)
            except SkippedError as why:
                result.skipped = str(why)
                continue
            if number:
                result.runs.append(run)
    return results


def forked(prepare: Prepare) -> Run:
    """One run in a child process.

    Raises:
        SkippedError: The contestant cannot run here.
        RuntimeError: It failed; its traceback is on standard error.
    """
    ours, its = socket.socketpair()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        ours.close()
        _child(its, prepare)
    its.close()
    with ours:
        said = ours.recv(1024)
        if said.startswith(b"skip "):
            os.waitpid(child, 0)
            raise SkippedError(said[5:].decode())
        base = peak = _anonymous(child) if said else 0
        if said:
            ours.sendall(b"go")
            while not select.select([ours], [], [], _EVERY)[0]:
                peak = max(peak, _anonymous(child))
            said = ours.recv(64)
            peak = max(peak, _anonymous(child)) if said else 0
            if said:
                ours.sendall(b"end")
    os.waitpid(child, 0)
    if not said:
        raise RuntimeError("a contestant failed; see above")
    return Run(struct.unpack("d", said)[0], peak - base)


def _child(link: socket.socket, prepare: Prepare) -> None:
    try:
        try:
            action = prepare()
        except (SkippedError, ImportError) as why:
            link.sendall(f"skip {why}"[:1000].encode())
            os._exit(0)
        gc.collect()
        link.sendall(b"ready")
        link.recv(2)
        start = time.perf_counter()
        kept = action()
        seconds = time.perf_counter() - start
        link.sendall(struct.pack("d", seconds))
        link.recv(3)  # what the action made is still alive while the parent looks
        del kept
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def spawned(commands: dict[str, list[str]], rounds: int) -> dict[str, Result]:
    """Whole processes, in turns: wall-clock seconds from start to end; memory is not sampled."""
    results = {name: Result() for name in commands}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    for number in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            child = os.posix_spawn(command[0], command, environment, file_actions=quiet)
            if os.waitpid(child, 0)[1]:
                raise RuntimeError(f"{' '.join(command)} failed")
            if number:
                results[name].runs.append(Run(time.perf_counter() - start, 0))
    return results


def ratio(ours: Result, theirs: Result) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(ours.runs, theirs.runs, strict=True))


def drop_from_cache(path: Path) -> None:
    """Write a file to disk and take it out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def into_cache(paths: Iterable[Path]) -> None:
    """Have files in the page cache."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def machine() -> str:
    """The machine in words: cores, processor, memory, kernel."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    total = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {model}), {total >> 20} GB, Linux {platform.release()}"


def _anonymous(process: int) -> int:
    try:
        lines = _lines(f"/proc/{process}/status")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines()
