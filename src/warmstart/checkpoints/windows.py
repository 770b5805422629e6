"""A part of a file that is read as if it were a file of its own: an item of a DCP file, a member of an archive."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor

from warmstart.checkpoints.files import MappedFile


class Window(MappedFile):
    """The bytes `start` to `start + size` of a mapped file."""

    def __init__(self, file: MappedFile, start: int, size: int) -> None:
        self.path = file.path
        self.stamp = file.stamp
        self.size = size
        # Readers only ever take slices of a map, which a view of part of it can give as well.
        self.map = cast(mmap.mmap, _Bytes(file.map, start, size))
        self._file = file
        self._start = start

    def check(self) -> None:
        self._file.check()

    @contextmanager
    def scattered(self) -> Iterator[None]:
        with self._file.scattered():
            yield

    def take(self, start: int, stop: int, alignment: int) -> Tensor:
        return self._file.take(self._start + start, self._start + stop, alignment)


class _Bytes:
    def __init__(self, data: mmap.mmap, start: int, size: int) -> None:
        self._data = data
        self._start = start
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        return self._data[self._start + start : self._start + max(start, stop)]
