"""Files of a source: what they were when they were opened, and their bytes mapped into memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from warmstart.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class FileStamp:
    """One file of a source as it was when it was opened."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, opened: BinaryIO | None = None) -> FileStamp:
        """The file that is at `path`, or the one that was opened there."""
        stat = path.stat() if opened is None else os.fstat(opened.fileno())
        return cls(path, stat.st_size, stat.st_mtime_ns)


class MappedFile:
    """A file mapped into memory. The mapping is private: nothing that is written to it reaches the file."""

    def __init__(self, path: Path, opened: BinaryIO | None = None) -> None:
        self.path = path
        with opened or path.open("rb") as file:
            self.stamp = FileStamp.of(path, file)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.size = len(self.map)

    @cached_property
    def address(self) -> int:
        """Where the mapping starts in memory."""
        return np.frombuffer(self.map, np.uint8).ctypes.data

    def check(self) -> None:
        # Touching a page beyond the end of a file that shrank kills the process.
        now = self.map.size()
        if now < self.size:
            raise CheckpointError(
                f"{self.path}: had {self.size:,} bytes when it was opened and has {now:,} now; "
                "something is rewriting it: open it again when that is done"
            )

    def opened(self) -> BinaryIO:
        """The same file, opened to be read without the mapping.

        Raises:
            CheckpointError: Another file has taken its place, or it cannot be opened any more.
        """
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be opened again: {error.strerror}; put the file back"
            ) from error
        if FileStamp.of(self.path, file) != self.stamp:
            file.close()
            raise CheckpointError(f"{self.path}: was replaced or written to after it was opened; open it again")
        return file

    def again(self) -> MappedFile:
        """The same file mapped once more: what is written to one mapping is not seen in the other.

        Raises:
            CheckpointError: Another file has taken its place, or it cannot be opened any more.
        """
        return MappedFile(self.path, self.opened())

    @contextmanager
    def scattered(self) -> Iterator[None]:
        """While a few bytes here and there are read: reading ahead would fetch most of the file for its headers."""
        if not hasattr(mmap, "MADV_RANDOM"):
            yield
            return
        self.map.madvise(mmap.MADV_RANDOM)
        try:
            yield
        finally:
            self.map.madvise(mmap.MADV_NORMAL)

    def take(self, start: int, stop: int, alignment: int) -> Tensor:
        self.check()
        raw = torch.frombuffer(self.map, dtype=torch.uint8, count=stop - start, offset=start)
        return raw.clone() if start % alignment else raw


class Place(NamedTuple):
    """The bytes of a mapped file, from `start` to `stop`, that are a tensor's as they lie there."""

    file: MappedFile
    start: int
    stop: int
