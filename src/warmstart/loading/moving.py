"""Bytes from files into the model's memory, or compared with it, by threads.

What is compared as well goes from the mapped file, in chunks that fit a processor's cache. What is copied alone the system
reads straight into the model's memory, where it can: no page of the file has to be mapped for that.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Lock
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from warmstart.checkpoints.files import MappedFile
from warmstart.tensors import wide_words

# Words: below the size from which torch would start threads of its own, and within a core's cache.
_CHUNK = 30_720
_BATCH = 8 << 20  # bytes that a thread takes at a time


class _Piece(NamedTuple):
    """A run of an entry's elements, flat: where they go and where they lie."""

    name: str
    to: Tensor
    source: Tensor
    file: MappedFile
    copy: bool


class _Read(NamedTuple):
    """How a mapped file is read past its mapping: its descriptor, and where the mapping starts in memory."""

    descriptor: int
    address: int


class _Own(NamedTuple):
    """A mapping that entries have for their memory.

    Attributes:
        file: The second mapping of a file.
        address: Where the first one starts.
        taken: What entries have of it, sorted: the first byte, and the one past the last.
    """

    file: MappedFile
    address: int
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
        infinite: Names of the entries in which a value may be NaN or infinite.
    """

    def __init__(self, *, copy: bool, compare: bool) -> None:
        self.begun = False
        self.done: list[str] = []
        self.different: set[str] = set()
        self.infinite: set[str] = set()
        self._copy = copy
        self._lock = Lock()
        self._compare = compare
        self._batch: list[_Piece] = []
        self._bytes = 0
        self.compared: set[str] = set()
        self._left: dict[str, int] = {}
        self._futures: list[Future[None]] = []
        self._own: dict[MappedFile, _Own] = {}
        self._reads: dict[MappedFile, _Read] = {}
        self._opened = ExitStack()
        # As many as torch computes with here: where processes share a machine, they were told to share its cores.
        threads = min(torch.get_num_threads(), 8)
        self._pool = ThreadPoolExecutor(threads, "warmstart") if threads > 1 else None

    def assign(self, name: str, tensor: Tensor, value: Tensor, file: MappedFile) -> None:
        """Let `tensor`, whose memory holds nothing yet, have the bytes of `value` in a second mapping of `file`.

        Pages are copied when they are first written to, so that training reaches neither the file nor what it is compared
        with. Bytes that another entry has already are copied.

        Raises:
            CheckpointError: The file was replaced, or has become shorter.
        """
        self.begun = True
        if file not in self._own:
            self._own[file] = _Own(file.again(), file.address, [])
        own = self._own[file]
        start = value.data_ptr() - own.address
        if not own.claim(start, start + value.nbytes):
            self.add(name, tensor, value, file)
            return
        with torch.device("cpu"):
            raw = own.file.take(start, start + value.nbytes, value.element_size())
        tensor.data = raw.view(value.dtype).view(value.shape)
        if self._compare:
            self.add(name, tensor, value, file, copy=False)
        else:
            self.done.append(name)

    def add(self, name: str, tensor: Tensor, value: Tensor, file: MappedFile, *, copy: bool = True) -> None:
        """Copy `value`, which lies in `file`, into `tensor`, and compare them, as was asked for: now or soon.

        Args:
            name: The entry.
            tensor: Its memory.
            value: A view of `file`.
            file: The file.
            copy: False where the value is there already.

        Raises:
            CheckpointError: The file was replaced, or has become shorter.
        """
        copy = copy and self._copy
        if copy and not self._compare and hasattr(os, "preadv") and file not in self._reads:
            opened = self._opened.enter_context(file.opened())
            self._reads[file] = _Read(opened.fileno(), file.address)
        pieces = list(_pieces(name, tensor.detach(), value, file, copy))
        self._left[name] = len(pieces)
        if self._compare:
            self.compared.add(name)
        for piece in pieces:
            self._batch.append(piece)
            self._bytes += piece.to.nbytes
            if self._bytes >= _BATCH:
                self._send()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._send()
                for future in self._futures:
                    future.result()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            self._opened.close()

    def _send(self) -> None:
        batch, self._batch, self._bytes = self._batch, [], 0
        if self._pool is None:
            self._run(batch)
        elif batch:
            self._futures.append(self._pool.submit(self._run, batch))

    def _run(self, batch: list[_Piece]) -> None:
        for piece in batch:
            piece.file.check()
            self.begun = True
            self._move(piece)
            with self._lock:
                self._left[piece.name] -= 1
                if not self._left[piece.name]:
                    self.done.append(piece.name)

    def _move(self, piece: _Piece) -> None:
        if (read := self._reads.get(piece.file)) is not None:
            _fill(piece.to, read.descriptor, piece.source.data_ptr() - read.address)
            return
        to, source = wide_words(piece.to, piece.source)
        for a, b in zip(torch.split(to, _CHUNK), torch.split(source, _CHUNK), strict=True):
            if piece.copy:
                a.copy_(b)
            if not self._compare:
                continue
            if not torch.equal(a, b):
                self.different.add(piece.name)
        if self._compare and self._copy and not _surely_finite(piece.to):
            self.infinite.add(piece.name)


def _surely_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return not tensor.is_complex()
    # A finite sum has finite terms; types of one byte have no sum.
    return tensor.element_size() > 1 and math.isfinite(tensor.sum().item())


def _fill(tensor: Tensor, descriptor: int, start: int) -> None:
    memory = tensor.view(torch.uint8).numpy().data
    while memory:
        count = os.preadv(descriptor, [memory], start)
        if not count:
            raise EOFError("the file has become shorter while it was read; open it again when it is at rest")
        memory, start = memory[count:], start + count


def _pieces(name: str, tensor: Tensor, value: Tensor, file: MappedFile, copy: bool) -> Iterator[_Piece]:
    step = _BATCH // tensor.element_size()
    for to, source in zip(torch.split(tensor.view(-1), step), torch.split(value.view(-1), step), strict=True):
        yield _Piece(name, to, source, file, copy)


def is_plain(tensor: Tensor, value: Tensor) -> bool:
    """Whether an entry is a piece of this machine's memory that a value of the same bytes can be copied to as it is."""
    return (
        type(tensor) in {Tensor, nn.Parameter}
        and tensor.dtype == value.dtype
        and tensor.shape == value.shape
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and bool(tensor.numel())
        and tensor.is_contiguous()
        and value.is_contiguous()
    )
