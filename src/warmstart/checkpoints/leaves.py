"""Single tensors of a source: where their bytes lie, and how they are read without copying the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from warmstart.checkpoints.base import Checkpoint, Index, TensorInfo
from warmstart.checkpoints.files import FileStamp, MappedFile, Place

MAX_DIMS = 64
OVERLAP_LIMIT = 64 << 20


class Leaf(Protocol):
    """One tensor of a source."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self, index: Index | None) -> Tensor: ...


class ByteSource(Protocol):
    """Bytes that tensors are made of."""

    @property
    def size(self) -> int: ...

    def take(self, start: int, stop: int, alignment: int) -> Tensor:
        """The bytes as a flat uint8 tensor whose address is a multiple of `alignment`."""


class HeldBytes:
    """Bytes that came with a pickle."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.size = len(data)

    def take(self, start: int, stop: int, alignment: int) -> Tensor:
        return torch.frombuffer(bytearray(memoryview(self.data)[start:stop]), dtype=torch.uint8)


@dataclass(slots=True, eq=False)
class StridedLeaf:
    """A tensor laid out in bytes. (Not frozen: there is one for each key, and a frozen one takes three times as long to make.)

    Attributes:
        source: The bytes.
        start: Where its first element lies in them.
        stride: Strides, in elements.
        swapped: Whether its bytes have the other order than this machine's.
        conjugate: Whether it was saved as a lazy conjugate.
        negative: Whether it was saved as a lazy negative.
        file: 0 where the bytes are the source's file, -1 where they are not.
    """

    source: ByteSource
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    swapped: bool = False
    conjugate: bool = False
    negative: bool = False
    file: int = 0

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, self.dtype, self.start if self.file == 0 else -1, self.file)

    def read(self, index: Index | None) -> Tensor:
        shape, stride, offset = self.shape, self.stride, 0
        if index is not None:
            # A tensor without storage does the arithmetic of indexing, so that only the slice's bytes are touched.
            view = torch.empty_strided(shape, stride, dtype=torch.uint8, device="meta")[index]
            shape, stride, offset = tuple(view.shape), view.stride(), int(view.storage_offset())
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype)
        size = self.dtype.itemsize
        start = self.start + offset * size
        raw = self.source.take(start, start + extent(shape, stride) * size, size)
        if self.swapped:
            raw = swap_bytes(raw, size // 2 if self.dtype.is_complex else size)
        tensor = raw.view(self.dtype).as_strided(shape, stride)
        if self.conjugate:
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if self.negative else tensor


@dataclass(frozen=True, slots=True, eq=False)
class TensorLeaf:
    """A tensor that is in memory already."""

    tensor: Tensor

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(tuple(self.tensor.shape), self.tensor.dtype)

    def read(self, index: Index | None) -> Tensor:
        tensor = self.tensor.detach()
        return (tensor if index is None else tensor[index]).cpu()


class LeafCheckpoint(Checkpoint):
    """A tree of leaves, whatever they lie in."""

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        *,
        location: str,
        format: str,
        files: Sequence[FileStamp] = (),
        checkpoint_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        versions: Mapping[str, Mapping[str, object]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(
            location=location,
            format=format,
            infos={key: leaf.info for key, leaf in leaves.items()},
            files=files,
            checkpoint_key=checkpoint_key,
            metadata=metadata,
            versions=versions,
            notes=notes,
        )
        self._leaves = dict(leaves)

    def leaves(self) -> Iterable[tuple[str, Leaf]]:
        return self._leaves.items()

    def place(self, key: str) -> Place | None:
        leaf = self._leaves[key]
        if not isinstance(leaf, StridedLeaf) or type(leaf.source) is not MappedFile:
            return None
        size = leaf.dtype.itemsize
        if leaf.swapped or leaf.conjugate or leaf.negative or leaf.start % size or leaf.stride != row_major(leaf.shape):
            return None
        return Place(leaf.source, leaf.start, leaf.start + math.prod(leaf.shape) * size)

    def _read(self, key: str, index: Index | None) -> Tensor:
        return self._leaves[key].read(index)


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements a strided tensor spans, from its first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    stride, step = [], 1
    for size in shape[::-1]:
        stride.append(step)
        step *= size if size > 1 else 1
    return tuple(stride[::-1])


def column_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor in Fortran order."""
    return tuple(reversed(row_major(shape[::-1])))


def check_extent(
    shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype, nbytes: int, file_size: int
) -> str | None:
    """What is wrong with a tensor of this layout over `nbytes` bytes of a file of `file_size`, in words; None if nothing is."""
    if len(shape) != len(stride):
        return f"it has {len(shape)} sizes but {len(stride)} strides"
    if len(shape) > MAX_DIMS:
        return f"it has {len(shape)} dimensions; at most {MAX_DIMS} are read"
    numbers = (*shape, *stride, offset)
    if min(numbers) < 0:
        return "a size, stride or offset is negative"
    if max(numbers) >= 1 << 62:
        return "a size, stride or offset is beyond 2**62"
    need = (offset + extent(shape, stride)) * dtype.itemsize if 0 not in shape else 0
    if need > nbytes:
        return f"it needs {need:,} bytes and its storage has {nbytes:,}"
    total = math.prod(shape) * dtype.itemsize
    if unfolds_too_far(shape):
        return "its sizes multiply to more than 2**58 elements"
    if total > max(nbytes, file_size, OVERLAP_LIMIT):
        return f"its elements overlap and would be {total:,} bytes from a storage of {nbytes:,}"
    return None


def unfolds_too_far(shape: Sequence[int]) -> bool:
    """Whether sizes multiply to more than torch can count in bytes, be one of them zero or not."""
    return math.prod(filter(None, shape)) >= 1 << 58


def swap_bytes(raw: Tensor, size: int) -> Tensor:
    """The bytes with each group of `size` reversed."""
    return raw if size <= 1 else raw.view(-1, size).flip(1).reshape(-1)
