"""Bytes from files into the model's memory, or compared with it, by threads.

What is compared in full goes from the mapped file, in chunks that fit a processor's cache: each is copied, compared and
searched for NaN before the next one. What is copied alone the system reads straight into the model's memory, where it can: no
page of the file has to be mapped for that. What goes to a CUDA device goes through pinned memory.
"""

from __future__ import annotations

import bisect
import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from ctypes import memmove
from dataclasses import dataclass
from threading import Lock, local
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from warmstart.checkpoints.files import MappedFile, Place
from warmstart.errors import CheckpointError
from warmstart.loading.staging import Stage
from warmstart.mapping.plan.plan import Verify

_CHUNK = 480 << 10  # bytes: with as many of the file they stay in a core's cache
_BATCH = 8 << 20  # bytes that a thread takes at a time
# A sample of a piece: so many runs, or up to twice as many, of as many bytes as memory gives at once.
_RUNS, _RUN = 256, 64

# numpy and torch compare at half the speed of the C library, which like them lets other threads run meanwhile.
memcmp = ctypes.CDLL(None if os.name == "posix" else "msvcrt").memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

# A view of memory for a seventh of what it costs by way of torch and numpy.
_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)

# Of each kind of float the size in bytes, and the least bits that are infinite or NaN, without the sign.
_BEYOND = {
    torch.float16: (2, 0x7C00),
    torch.bfloat16: (2, 0x7F80),
    torch.float32: (4, 0x7F80_0000),
    torch.float64: (8, 0x7FF0_0000_0000_0000),
    torch.complex32: (2, 0x7C00),
    torch.complex64: (4, 0x7F80_0000),
    torch.complex128: (8, 0x7FF0_0000_0000_0000),
}


@dataclass(slots=True)
class _Entry:
    """An entry that is moved.

    Attributes:
        name: Its name.
        tensor: Its memory, which is there for as long as the tensor is.
        address: Where that starts.
        place: Where its bytes lie.
        copy: Whether they are copied, or there already.
        left: How many pieces of it are not done yet.
    """

    name: str
    tensor: Tensor
    address: int
    place: Place
    copy: bool
    left: int = 0


class _Piece(NamedTuple):
    """The bytes of an entry from `start` to `stop`, which one thread moves."""

    entry: _Entry
    start: int
    stop: int


class _Own(NamedTuple):
    """A mapping that entries have for their memory.

    Attributes:
        file: The second mapping of a file.
        taken: What entries have of it, sorted: the first byte, and the one past the last.
    """

    file: MappedFile
    taken: list[tuple[int, int]]

    def claim(self, start: int, end: int) -> bool:
        """Take a range of bytes for an entry; False if one has some of them already, as views of one storage do in a file."""
        at = bisect.bisect(self.taken, (start, end))
        if (at and self.taken[at - 1][1] > start) or (at < len(self.taken) and self.taken[at][0] < end):
            return False
        self.taken.insert(at, (start, end))
        return True


class Mover:
    """Copies and compares what lies plainly in mapped files; a context, at whose end all of it is done.

    Attributes:
        begun: Whether anything was moved, be it part of an entry.
        done: Names of the entries that were moved.
        compared: Names of the entries that were compared with the file.
        different: Names of the entries that do not hold what the file does.
        infinite: Of those that were copied and compared in full, the names of the entries in which a value may be NaN or
            infinite.
    """

    def __init__(self, *, copy: bool, verify: Verify) -> None:
        self.begun = False
        self.done: list[str] = []
        self.compared: set[str] = set()
        self.different: set[str] = set()
        self.infinite: set[str] = set()
        self._copy = copy
        self._verify = verify
        self._lock = Lock()
        self._batch: list[_Piece] = []
        self._bytes = 0
        self._given: list[tuple[Future[None], list[_Piece]]] = []
        self._own: dict[MappedFile, _Own] = {}
        self._known: set[MappedFile] = set()
        self._descriptors: dict[MappedFile, int] = {}
        self._opened = ExitStack()
        self._stages = local()
        self._ready: set[torch.device] = set()
        # As many as torch computes with here: where processes share a machine, they were told to share its cores. This one is
        # one of them, once it knows all that there is to do.
        others = min(torch.get_num_threads(), 8) - 1
        self._pool = ThreadPoolExecutor(others, "warmstart") if others else None

    def memory(self, like: Tensor, place: Place) -> Tensor | None:
        """The bytes of `place` in a second mapping of its file, as memory for a tensor like this one; None if another has them.

        Pages are copied when they are first written to, so that training reaches neither the file nor what it is compared
        with.

        Raises:
            CheckpointError: The file was replaced, or has become shorter.
        """
        file, start, stop = place
        if file not in self._own:
            self._own[file] = _Own(file.again(), [])
        own = self._own[file]
        if not own.claim(start, stop):
            return None
        raw = torch.frombuffer(own.file.map, dtype=like.dtype, count=like.numel(), offset=start)
        return raw.view(like.shape).data  # as no view, which autograd would not let a buffer be written to

    def add(self, name: str, tensor: Tensor, place: Place, *, copy: bool = True) -> None:
        """Copy the bytes of `place` into `tensor`, and compare them, as was asked for: now or soon.

        Args:
            name: The entry.
            tensor: Its memory: contiguous, of as many bytes.
            place: Where they lie.
            copy: False where the value is there already.

        Raises:
            CheckpointError: The file was replaced, or has become shorter.
        """
        copy = copy and self._copy
        if not copy and self._verify == "off":
            self.done.append(name)
            return
        file = place.file
        if file not in self._known:
            file.check()
            self._known.add(file)
        if copy:
            increment_version(tensor)  # written to past torch: a backward that has it saved must know
        staged = not tensor.is_cpu
        read = staged or (copy and self._verify != "full")
        if read and hasattr(os, "preadv") and file not in self._descriptors:
            self._descriptors[file] = self._opened.enter_context(file.opened()).fileno()
        if staged and tensor.device not in self._ready:  # what this thread has asked of the device comes first
            torch.cuda.current_stream(tensor.device).synchronize()
            self._ready.add(tensor.device)
        if self._verify != "off":
            self.compared.add(name)
        pieces = _pieces(_Entry(name, tensor, tensor.data_ptr(), place, copy))
        for piece in pieces:
            self._batch.append(piece)
            self._bytes += piece.stop - piece.start
            if self._bytes >= _BATCH:
                batch, self._batch, self._bytes = self._batch, [], 0
                if self._pool is None:
                    self._run(batch)
                else:
                    self._given.append((self._pool.submit(self._run, batch), batch))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._run(self._batch)
                for future, batch in self._given:
                    if future.cancel():  # no other thread has begun it
                        self._run(batch)
                for future, _ in self._given:
                    if not future.cancelled():
                        future.result()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            self._opened.close()

    def _run(self, batch: list[_Piece]) -> None:
        for file in {piece.entry.place.file for piece in batch}:
            file.check()
        for piece in batch:
            entry = piece.entry
            self.begun = True
            self._move(piece)
            with self._lock:
                entry.left -= 1
                if not entry.left:
                    self.done.append(entry.name)

    def _move(self, piece: _Piece) -> None:
        entry, start, stop = piece
        to, source, count = entry.address + start, _source(entry) + start, stop - start
        if not entry.tensor.is_cpu:
            self._move_through_stage(piece)
        elif self._verify == "full":
            self._move_in_chunks(entry, to, source, count)
        else:
            if entry.copy:
                self._read(entry, start, count, to)
            if self._verify == "sample" and _sampled(_memory(to, count)) != _sampled(_memory(source, count)):
                self.different.add(entry.name)

    def _read(self, entry: _Entry, start: int, count: int, to: int) -> None:
        if (descriptor := self._descriptors.get(entry.place.file)) is not None:
            try:
                _fill(_memory(to, count), descriptor, entry.place.start + start)
            except (OSError, EOFError) as error:
                raise CheckpointError(f"{entry.place.file.path}: cannot read '{entry.name}': {error}") from error
        else:
            memmove(to, _source(entry) + start, count)

    def _move_in_chunks(self, entry: _Entry, to: int, source: int, count: int) -> None:
        dtype = entry.tensor.dtype
        size, least = _BEYOND.get(dtype, (0, 0))
        finite = not self._copy or not (dtype.is_floating_point or dtype.is_complex)
        for start in range(0, count, _CHUNK):
            length = min(_CHUNK, count - start)
            if entry.copy:
                memmove(to + start, source + start, length)
            if memcmp(to + start, source + start, length):
                self.different.add(entry.name)
            if not finite and not (size and _all_below(_memory(to + start, length), size, least)):
                self.infinite.add(entry.name)
                finite = True  # enough is known of it

    def _move_through_stage(self, piece: _Piece) -> None:
        entry, start, stop = piece
        dtype = entry.tensor.dtype
        whole, full = entry.tensor.detach().view(-1).view(torch.uint8), self._verify == "full"
        size, least = _BEYOND.get(dtype, (0, 0))
        finite = not (full and self._copy and (dtype.is_floating_point or dtype.is_complex))
        for begin in range(start, stop, Stage.size) if entry.copy or full else ():
            stage = self._stage(entry.tensor.device)
            to = whole[begin : min(begin + Stage.size, stop)]
            self._read(entry, begin, to.numel(), stage.address)
            if entry.copy:
                stage.put(to)
            if not self._agrees(to, stage):
                self.different.add(entry.name)
            if not finite and not (size and stage.all_finite(to, size, least)):
                self.infinite.add(entry.name)
                finite = True  # enough is known of it
        there = _memory(_source(entry) + start, stop - start)
        if not (entry.copy or full) and not _same_sample(whole[start:stop], there):
            self.different.add(entry.name)

    def _agrees(self, to: Tensor, stage: Stage) -> bool:
        if self._verify == "full":
            return stage.is_at(to)
        return self._verify == "off" or _same_sample(to, _memory(stage.address, to.numel()))

    def _stage(self, device: torch.device) -> Stage:
        mine = self._stages.__dict__
        if str(device) not in mine:
            mine[str(device)] = Stage(device)
        stage: Stage = mine[str(device)]
        return stage


def _pieces(entry: _Entry) -> list[_Piece]:
    total = entry.tensor.nbytes
    pieces = [_Piece(entry, start, min(start + _BATCH, total)) for start in range(0, total, _BATCH)]
    entry.left = len(pieces)
    return pieces


def _source(entry: _Entry) -> int:
    return entry.place.file.address + entry.place.start


def _memory(address: int, count: int) -> memoryview:
    view: memoryview = _view(address, count, 0x200)  # PyBUF_WRITE
    return view


def _fill(left: memoryview, descriptor: int, start: int) -> None:
    while left:
        count = os.preadv(descriptor, [left], start)
        if not count:
            raise EOFError("the file has become shorter while it was read; open it again when it is at rest")
        left, start = left[count:], start + count


def _sampled(memory: memoryview) -> bytes:
    """Runs of bytes spread evenly, and the last ones."""
    rows, step = _spread(len(memory))
    return np.frombuffer(memory, f"V{_RUN}", rows)[::step].tobytes() + memory[-_RUN:]


def _same_sample(there: Tensor, memory: memoryview) -> bool:
    """Whether bytes on a device have the same sample."""
    rows, step = _spread(there.numel())
    held = torch.cat([there[: rows * _RUN].view(rows, _RUN)[::step].reshape(-1), there[-_RUN:]])
    return held.cpu().numpy().tobytes() == _sampled(memory)


def _spread(count: int) -> tuple[int, int]:
    rows = count // _RUN
    return rows, rows // _RUNS | 1  # odd, so that the sample does not run down one column


def _all_below(memory: memoryview, size: int, least: int) -> bool:
    """Whether all floats are finite. As integers those that are not are the largest: with a sign as well as without."""
    signed, unsigned = np.frombuffer(memory, f"i{size}"), np.frombuffer(memory, f"u{size}")
    return bool(np.maximum.reduce(signed) < least and np.maximum.reduce(unsigned) < least + (1 << 8 * size - 1))
