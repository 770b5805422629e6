"""The chunks of an HDF5 dataset: each lies in one place of the file, packed by the filters of its dataset."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from warmstart.checkpoints.archive import MAX_RATIO
from warmstart.checkpoints.base import Index
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import swap_bytes
from warmstart.errors import CheckpointError

DEFLATE: Final = 1
SHUFFLE: Final = 2
FLETCHER32: Final = 3
FILTERS: Final = {DEFLATE, SHUFFLE, FLETCHER32}
_STEP: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """One chunk.

    Attributes:
        file: The file.
        offsets: Where in the dataset its first element lies.
        sizes: How much of it lies within the dataset.
        box: Its full sizes, the same for all chunks of a dataset.
        dtype: The dataset's dtype.
        at: Where its bytes lie.
        stored: How many these are.
        filters: The dataset's filters, in the order of writing.
        mask: One bit for each filter that was left out for this chunk.
        swapped: Whether the bytes of a number have the other order than this machine's.
        where: File and dataset, for messages.
    """

    file: MappedFile
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    box: tuple[int, ...]
    dtype: torch.dtype
    at: int
    stored: int
    filters: tuple[int, ...]
    mask: int
    swapped: bool
    where: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.box) * self.dtype.itemsize

    def plausible(self) -> bool:
        """Whether so many bytes can hold the chunk."""
        used = self._used()
        if DEFLATE in used:
            return self.nbytes <= self.stored * MAX_RATIO + 64
        return self.stored == self.nbytes + 4 * used.count(FLETCHER32)

    def read(self, index: Index | None) -> Tensor:
        itemsize = self.dtype.itemsize
        raw = self._unpacked()
        if self.swapped:
            raw = swap_bytes(raw, itemsize // 2 if self.dtype.is_complex else itemsize)
        whole = raw.view(self.dtype).reshape(self.box)
        inside = whole[tuple(slice(0, size) for size in self.sizes)]
        return inside if index is None else inside[index]

    def _used(self) -> list[int]:
        return [number for i, number in enumerate(self.filters) if not self.mask >> i & 1]

    def _unpacked(self) -> Tensor:
        used = self._used()
        if not used:
            return self.file.take(self.at, self.at + self.stored, self.dtype.itemsize)
        self.file.check()
        data: bytes | bytearray = self.file.map[self.at : self.at + self.stored]
        for i, number in reversed(list(enumerate(used))):
            sums = 4 * used[:i].count(FLETCHER32)
            if number == FLETCHER32:
                data = self._checked(data)
            elif number == DEFLATE:
                data = self._inflated(data, self.nbytes + sums)
            else:
                data = self._unshuffled(data)
        if len(data) != self.nbytes:
            raise self._damaged(f"unpacks to {len(data):,} bytes, not {self.nbytes:,}")
        return torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)

    def _inflated(self, data: bytes | bytearray, size: int) -> bytearray:
        out, filled, position, unpacker = bytearray(size), 0, 0, zlib.decompressobj()
        pending: bytes | bytearray = b""
        try:
            while not unpacker.eof and (pending or position < len(data)):
                if not pending:
                    pending = data[position : position + _STEP]
                    position += len(pending)
                # One byte more than fits tells a chunk that is too long.
                part = unpacker.decompress(pending, size + 1 - filled)
                if filled + len(part) > size:
                    break
                out[filled : filled + len(part)] = part
                filled += len(part)
                pending = unpacker.unconsumed_tail
        except zlib.error as error:
            raise self._damaged(f"cannot be unpacked ({error})") from error
        if filled != size or not unpacker.eof:
            raise self._damaged(f"unpacks to {filled:,} bytes or does not end, not {size:,}")
        return out

    def _unshuffled(self, data: bytes | bytearray) -> bytearray:
        size = self.dtype.itemsize
        count = len(data) // size
        flat = np.frombuffer(data, dtype=np.uint8)
        out = bytearray(data)
        # All first bytes of the elements, then all second ones, and so on; what is left over stays where it is.
        np.frombuffer(out, dtype=np.uint8)[: count * size].reshape(count, size)[:] = (
            flat[: count * size].reshape(size, count).T
        )
        return out

    def _checked(self, data: bytes | bytearray) -> bytes | bytearray:
        if len(data) < 4:
            raise self._damaged("is shorter than its checksum")
        body = data[:-4]
        if fletcher32(body) != tuple(n % 65535 for n in np.frombuffer(data[-4:], dtype="<u2").tolist()):
            raise self._damaged("has another checksum than the one that was written with it")
        return body

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: damaged HDF5 file: the chunk at {self.offsets} (byte {self.at:,}) {what}; "
            "get the file again from where it came"
        )


def fletcher32(data: bytes | bytearray) -> tuple[int, int]:
    """HDF5's checksum as two numbers modulo 65535: the sum of all big-endian words, and the sum of its partial sums."""
    words = np.frombuffer(bytes(data) + b"\0" * (len(data) % 2), dtype=">u2").astype(np.uint64)
    first = second = 0
    for start in range(0, len(words), _STEP):
        part = words[start : start + _STEP]
        left = np.arange(len(part), 0, -1, dtype=np.uint64)
        second += first * len(part) + int((part * left).sum())
        first += int(part.sum())
    return first % 65535, second % 65535
