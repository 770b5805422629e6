"""Absolute position embeddings: a table of one vector a position, on a grid of another size."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.grids import (
    Grid,
    GridLike,
    as_count,
    as_grid,
    left_out,
    near_square,
    regrid,
    square,
)
from warmstart.mapping.adapters.refusals import KEEP_OWN, check_mode, refused, written
from warmstart.mapping.adapters.resampling import wide
from warmstart.mapping.derivations import Shape

_PREFIX_TOKENS = range(17)  # tried for a hint: class and distillation tokens, and registers


@dataclass(frozen=True)
class ResizePosEmbed(Adapter):
    """A position table (1, tokens, dim) or (tokens, dim), resampled to another grid.

    A table (1, height, width, dim) or (1, dim, height, width) is taken too, with both grids spelled out.

    "bicubic" and "linear" are antialiased with pixel centres aligned, as in timm's `resample_abs_pos_embed`, computed in
    float64. DINOv2's and transformers' own `interpolate_pos_encoding` leave antialiasing off, and with it take another
    cubic: the two differ a little even where a grid only grows.

    A grid left out is square; it is the whole table where the other grid is 1-D or the mode is "repeat". Equal token
    counts without grids are copied bit for bit; with two different grids they are resampled.

    Attributes:
        prefix_tokens: Leading tokens without a place on the grid (class, distillation, registers), the same number on
            both sides; they are copied bit for bit.
        src_grid: The checkpoint's grid: (height, width), or the length of a 1-D table.
        dst_grid: The model's grid.
        mode: "bicubic" and "linear" stretch the table over the new grid; "repeat" starts it again where it ends, along
            each axis: position i gets i mod n.

    Raises:
        MappingError: A value that cannot be meant.
    """

    prefix_tokens: int = 1
    src_grid: GridLike = None
    dst_grid: GridLike = None
    mode: Literal["bicubic", "linear", "repeat"] = "bicubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix_tokens", as_count(self.prefix_tokens, "prefix_tokens"))
        object.__setattr__(self, "src_grid", as_grid(self.src_grid, "src_grid"))
        object.__setattr__(self, "dst_grid", as_grid(self.dst_grid, "dst_grid"))
        check_mode(self, self.mode, "bicubic", "linear", "repeat")

    def check(self, source: Shape, target: Shape) -> None:
        self._change(source, target)

    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        change = self._change(tuple(value.shape), tuple(current.shape))
        if change is None:
            return value.to(current.dtype)
        dim, src, dst = change
        tokens = value.flatten(dim, dim + 1) if value.ndim == 4 else value
        prefix, rows = tokens.tensor_split([self.prefix_tokens], dim)
        resampled = regrid(wide(rows), dim, src, dst, self.mode)
        return torch.cat([prefix.to(current.dtype), resampled.to(current.dtype)], dim).reshape(current.shape)

    def no_inverse(self, source: Shape, target: Shape) -> str | None:
        return None if self._change(source, target) is None else "resampling loses what the checkpoint held"

    def _change(self, source: Shape, target: Shape) -> tuple[int, Grid, Grid] | None:
        """The dimension of the tokens (of the grid's first axis), and both grids; None where it is copied as it is."""
        src, dst = as_grid(self.src_grid, "src_grid"), as_grid(self.dst_grid, "dst_grid")
        if src is None and dst is None and source == target:
            return None
        if len(source) == len(target) == 4:
            return self._change_of_image(source, target, src, dst)
        if not _is_table(source) or not _is_table(target) or _without_tokens(source) != _without_tokens(target):
            why = "tables (1, tokens, dim) or (tokens, dim) are needed that differ in the number of tokens alone"
            raise refused(source, target, why, KEEP_OWN)
        n, m = source[-2] - self.prefix_tokens, target[-2] - self.prefix_tokens
        if n < 1 or m < 1:
            why = f"no positions are left beside {self.prefix_tokens} prefix tokens"
            raise refused(source, target, why, written(self, prefix_tokens=0) if self.prefix_tokens else KEEP_OWN)
        line = self.mode == "repeat"
        a, b = src or left_out(n, dst, line), dst or left_out(m, src, line)
        if a is None or b is None:
            raise self._unknown_grid(source, target, n, m)
        if len(a) != len(b) or prod(a) != n or prod(b) != m:
            why = f"grids {a} and {b} for {n} and {m} positions beside {self.prefix_tokens} prefix tokens"
            raise refused(source, target, why, self._suggested(n, m, len(b)))
        return None if a == b else (len(source) - 2, a, b)

    def _change_of_image(
        self, source: Shape, target: Shape, src: Grid | None, dst: Grid | None
    ) -> tuple[int, Grid, Grid] | None:
        """Of a table that has the grid in its shape: which two dimensions it is only the grids can tell."""
        dims = [
            dim
            for dim in (1, 2)
            if (source[dim : dim + 2], target[dim : dim + 2]) == (src, dst)
            and source[:dim] + source[dim + 2 :] == target[:dim] + target[dim + 2 :]
        ]
        if len(dims) != 1 or src is None or dst is None or source[0] != 1 or self.prefix_tokens:
            why = "tables (1, height, width, dim) or (1, dim, height, width) need both grids, and have no prefix tokens"
            raise refused(
                source, target, why, written(self, prefix_tokens=0, src_grid=source[1:3], dst_grid=target[1:3])
            )
        return None if src == dst else (dims[0], src, dst)

    def _unknown_grid(self, source: Shape, target: Shape, n: int, m: int) -> MappingError:
        why = (
            f"{n} and {m} positions beside {self.prefix_tokens} prefix tokens: a grid that is left out must be a square"
        )
        if self.src_grid is None and self.dst_grid is None:
            prefixes = [{k for k in _PREFIX_TOKENS if square(shape[-2] - k)} for shape in (source, target)]
            if both := prefixes[0] & prefixes[1]:
                return refused(source, target, why, written(self, prefix_tokens=min(both)))
            if all(prefixes):
                why += (
                    f". They are with {min(prefixes[0])} prefix tokens in the checkpoint and {min(prefixes[1])} in the "
                    "model, but the numbers must be equal: take the odd ones off first, with a conversion"
                )
                return refused(source, target, why, KEEP_OWN)
        return refused(source, target, f"{why}; spell out the grids", self._suggested(n, m, 2))

    def _suggested(self, n: int, m: int, rank: int) -> str:
        return written(
            self,
            src_grid=(n,) if rank == 1 else near_square(n),
            dst_grid=(m,) if rank == 1 else near_square(m),
        )


def _is_table(shape: Shape) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


def _without_tokens(shape: Shape) -> Shape:
    return (*shape[:-2], *shape[-1:])
