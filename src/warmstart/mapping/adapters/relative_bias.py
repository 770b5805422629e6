"""Relative position biases: a table of one row a pair of offsets, for a window of another size."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.grids import Grid, GridLike, as_count, as_grid, left_out, near_square, regrid, square
from warmstart.mapping.adapters.refusals import KEEP_OWN, check_mode, refused, written
from warmstart.mapping.adapters.resampling import wide
from warmstart.mapping.derivations import Shape

_EXTRA_ROWS = range(17)  # tried for a hint


@dataclass(frozen=True)
class ResizeRelPosBias(Adapter):
    """A table (offsets + extra rows, heads) of Swin or BEiT, resampled to another window.

    A window of (h, w) positions has (2h-1)(2w-1) offsets, row-major, (0, 0) in the middle; that grid is resampled, as
    Swin's own code does it, by the filter of `ResizePosEmbed`. Windows of one axis or of three (Video Swin) work too. A
    window left out is square. Equal tables without windows are copied bit for bit.

    Attributes:
        extra_rows: Rows at the end that are no offsets, copied bit for bit: 3 for BEiT (class token to tokens, tokens to
            class token, class token to itself), 0 for Swin.
        src_window: The checkpoint's window in positions: (height, width), such as (7, 7).
        dst_window: The model's window.
        mode: "bicubic" or "linear".

    Raises:
        MappingError: A value that cannot be meant.
    """

    extra_rows: int = 0
    src_window: GridLike = None
    dst_window: GridLike = None
    mode: Literal["bicubic", "linear"] = "bicubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra_rows", as_count(self.extra_rows, "extra_rows"))
        object.__setattr__(self, "src_window", as_grid(self.src_window, "src_window"))
        object.__setattr__(self, "dst_window", as_grid(self.dst_window, "dst_window"))
        check_mode(self, self.mode, "bicubic", "linear")

    def check(self, source: Shape, target: Shape) -> None:
        self._offsets(source, target)

    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        offsets = self._offsets(tuple(value.shape), tuple(current.shape))
        if offsets is None:
            return value.to(current.dtype)
        rows, extra = value.tensor_split([len(value) - self.extra_rows])
        resampled = regrid(wide(rows), 0, *offsets, self.mode)
        return torch.cat([resampled.to(current.dtype), extra.to(current.dtype)])

    def no_inverse(self, source: Shape, target: Shape) -> str | None:
        return None if self._offsets(source, target) is None else "resampling loses what the checkpoint held"

    def _offsets(self, source: Shape, target: Shape) -> tuple[Grid, Grid] | None:
        """The two grids of offsets; None where the table is copied as it is."""
        if len(source) != 2 or len(target) != 2 or source[1] != target[1]:
            why = "tables (offsets, heads) with the same number of heads are needed"
            raise refused(source, target, why, KEEP_OWN)
        src, dst = as_grid(self.src_window, "src_window"), as_grid(self.dst_window, "dst_window")
        if src is None and dst is None and source == target:
            return None
        n, m = source[0] - self.extra_rows, target[0] - self.extra_rows
        a, b = _offsets_of(src) or left_out(n, dst, False), _offsets_of(dst) or left_out(m, src, False)
        if a is None or b is None or not all(size % 2 for size in (*a, *b)):
            why = (
                f"{n} and {m} rows beside {self.extra_rows} extra rows are not both the (2h-1)(2w-1) offsets of a square "
                "window; spell out the extra rows, or the windows"
            )
            raise refused(source, target, why, self._suggested(source[0], target[0]))
        if len(a) != len(b) or prod(a) != n or prod(b) != m:
            why = f"windows with {a} and {b} offsets do not hold {n} and {m} rows beside {self.extra_rows} extra rows"
            raise refused(source, target, why, self._suggested(source[0], target[0]))
        return None if a == b else (a, b)

    def _suggested(self, source_rows: int, target_rows: int) -> str:
        extra = next((k for k in _EXTRA_ROWS if _odd_square(source_rows - k) and _odd_square(target_rows - k)), None)
        if extra is not None:
            return written(self, extra_rows=extra, src_window=None, dst_window=None)
        offsets = [rows - self.extra_rows for rows in (source_rows, target_rows)]
        if not all(count > 0 and count % 2 for count in offsets):
            return KEEP_OWN
        src, dst = (tuple((size + 1) // 2 for size in near_square(count)) for count in offsets)
        return written(self, src_window=src, dst_window=dst)


def _offsets_of(window: Grid | None) -> Grid | None:
    return window and tuple(2 * size - 1 for size in window)


def _odd_square(count: int) -> bool:
    side = square(count)
    return side is not None and side[0] % 2 == 1
