"""Tables whose rows are the points of a grid: reading the grids off the row counts, and resampling one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import SupportsIndex, TypeAlias

from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.adapters.resampling import along, resampling

Grid: TypeAlias = tuple[int, ...]
GridLike: TypeAlias = int | Sequence[int] | None


def as_grid(value: GridLike, name: str) -> Grid | None:
    """`(14, 14)` of a tuple or list, `(512,)` of a whole number.

    Raises:
        MappingError: Not whole numbers of 1 or more; `name` is the field to correct.
    """
    if value is None:
        return None
    sizes = (value,) if isinstance(value, SupportsIndex) else value
    whole = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    if not whole or not all(isinstance(n, SupportsIndex) and not isinstance(n, bool) and int(n) >= 1 for n in sizes):
        raise MappingError(f"{name}={value!r}: whole numbers of 1 or more; write {name}=(14, 14), or {name}=512")
    return tuple(int(n) for n in sizes)


def as_count(value: int, name: str) -> int:
    """A whole number of 0 or more.

    Raises:
        MappingError: It is none; `name` is the field to correct.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or int(value) < 0:
        raise MappingError(f"{name}={value!r}: a whole number of 0 or more; write {name}=1")
    return int(value)


def square(count: int) -> Grid | None:
    """The square grid of `count` points; None if there is none."""
    side = isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None


def near_square(count: int) -> Grid:
    """The grid of `count` points that is nearest to a square, to suggest."""
    side = next((n for n in range(isqrt(count), 0, -1) if count % n == 0), 1)
    return side, count // side


def left_out(count: int, other: Grid | None, line: bool) -> Grid | None:
    """The grid to take for one that was not given: 1-D if `line`, or if the other one is; else square, if it can be."""
    rank = len(other) if other else 1 if line else 2
    return (count,) if rank == 1 else square(count) if rank == 2 else None


def regrid(rows: Tensor, dim: int, src: Grid, dst: Grid, mode: str) -> Tensor:
    """Rows of grid `src` along `dim` (row-major, as flattened images are) to rows of grid `dst`; float64 in and out."""
    grid = rows.reshape(*rows.shape[:dim], *src, *rows.shape[dim + 1 :])
    for axis, (a, b) in enumerate(zip(src, dst, strict=True)):
        if a != b:
            grid = along(grid, dim + axis, resampling(a, b, mode))
    return grid.flatten(dim, dim + len(dst) - 1)
