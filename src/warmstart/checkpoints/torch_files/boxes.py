"""Tensors that lie in pieces: which part of which piece an index asks for, and where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from warmstart.checkpoints.base import Index, TensorInfo

MAX_LOOSE = 1024


class Piece(Protocol):
    """A box of a tensor that lies in one place."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def read(self, index: Index | None) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class PiecedLeaf:
    """A tensor in pieces: only those that an index meets are read, each by the part of it that is asked for.

    Attributes:
        info: Shape, dtype, and where the first piece lies.
        pieces: The pieces; no two of them overlap.
        fill: The value of what lies in no piece; None where the pieces cover everything.
    """

    info: TensorInfo
    pieces: Sequence[Piece]
    fill: Tensor | None = None

    def read(self, index: Index | None) -> Tensor:
        if len(self.pieces) == 1 and self.pieces[0].sizes == self.info.shape:
            return self.pieces[0].read(index)
        selection = Selection.of(self.info.shape, index)
        out = torch.empty(selection.box, dtype=self.info.dtype)
        if self.fill is not None and out.numel():
            out.copy_(self.fill.expand(selection.box))
        for piece in self.pieces if out.numel() else ():
            part = selection.overlap(piece.offsets, piece.sizes)
            if part is not None:
                out[part[1]] = piece.read(part[0])
        return out.reshape(selection.shape)


@dataclass(frozen=True, slots=True)
class Selection:
    """What an index takes of a tensor, one range for each dimension.

    Attributes:
        ranges: The positions that are taken.
        kept: Whether the dimension is there afterwards; an integer takes it away.
    """

    ranges: tuple[range, ...]
    kept: tuple[bool, ...]

    @classmethod
    def of(cls, shape: Sequence[int], index: Index | None) -> Selection:
        """The selection of an index.

        Raises:
            IndexError: It has too many parts, or one beyond the end.
            ValueError: It steps backwards.
        """
        parts = (...,) if index is None else index if isinstance(index, tuple) else (index,)
        if parts.count(...) == 0:
            parts = (*parts, ...)
        if parts.count(...) > 1 or len(parts) - 1 > len(shape):
            raise IndexError(f"too many indices for a tensor of {len(shape)} dimensions")
        at = parts.index(...)
        filled = [*parts[:at], *[slice(None)] * (len(shape) - len(parts) + 1), *parts[at + 1 :]]
        ranges, kept = [], []
        for size, part in zip(shape, filled, strict=True):
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                if step < 0:
                    raise ValueError("slice step must be positive")
                ranges.append(range(start, max(start, stop), step))
                kept.append(True)
                continue
            assert isinstance(part, int)
            if not -size <= part < size:
                raise IndexError(f"index {part} is out of bounds for a dimension of size {size}")
            position = part % size
            ranges.append(range(position, position + 1))
            kept.append(False)
        return cls(tuple(ranges), tuple(kept))

    @property
    def box(self) -> tuple[int, ...]:
        """The shape of what is taken, before integers take dimensions away."""
        return tuple(len(r) for r in self.ranges)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is taken."""
        return tuple(len(r) for r, keep in zip(self.ranges, self.kept, strict=True) if keep)

    def overlap(
        self, offsets: Sequence[int], sizes: Sequence[int]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Which part of a piece is taken, and where in the box it goes; None if nothing of it is."""
        source, target = [], []
        for taken, offset, size in zip(self.ranges, offsets, sizes, strict=True):
            first = max(0, -((taken.start - offset) // taken.step))
            last = min(len(taken), -((taken.start - offset - size) // taken.step))
            if first >= last:
                return None
            start = taken[first] - offset
            source.append(slice(start, taken[last - 1] - offset + 1, taken.step))
            target.append(slice(first, last))
        return tuple(source), tuple(target)


def not_a_tiling(shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """What is wrong with pieces (offsets and sizes) that should cover each element once, in words; None if nothing is."""
    if 0 in shape:
        return None
    for offsets, sizes in pieces:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a piece of {len(offsets)} dimensions in a tensor of {len(shape)}"
        if any(o < 0 or s < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return f"the piece of {tuple(sizes)} at {tuple(offsets)} does not lie inside {tuple(shape)}"
    solid = [(tuple(o), tuple(s)) for o, s in pieces if 0 not in s]
    total = sum(_volume(sizes) for _, sizes in solid)
    if total != _volume(shape):
        kind = "are missing" if total < _volume(shape) else "are there twice"
        return f"its pieces have {total:,} elements and it has {_volume(shape):,}: some {kind}"
    if _is_grid(shape, solid):
        return None
    if len(solid) > MAX_LOOSE:
        return f"its {len(solid):,} pieces form no grid"
    starts = np.array([offsets for offsets, _ in solid], dtype=np.int64)
    stops = starts + np.array([sizes for _, sizes in solid], dtype=np.int64)
    meet = np.ones((len(solid), len(solid)), dtype=bool)
    for d in range(len(shape)):
        meet &= (starts[:, None, d] < stops[None, :, d]) & (starts[None, :, d] < stops[:, None, d])
    # Pieces that do not meet and have all elements together cover each of them once.
    return None if meet.sum() == len(solid) else "some of its pieces overlap"


def _is_grid(shape: Sequence[int], pieces: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    ends: list[dict[int, int]] = []
    for d, size in enumerate(shape):
        starts = sorted({offsets[d] for offsets, _ in pieces})
        ends.append(dict(zip(starts, [*starts[1:], size], strict=True)))
    fits = all(offsets[d] + sizes[d] == ends[d][offsets[d]] for offsets, sizes in pieces for d in range(len(shape)))
    return fits and len({offsets for offsets, _ in pieces}) == len(pieces)


def _volume(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
