"""Rows that stand for something, a vocabulary's tokens or a head's classes, carried to where the model has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.labels import IndexMap, LabelRows, Labels, as_index_map, as_labels, repeated, shown
from warmstart.mapping.adapters.refusals import KEEP_OWN, refused, written
from warmstart.mapping.adapters.resampling import wide
from warmstart.mapping.derivations import Shape

_Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

_NAMED = 5  # dropped rows that a message names
_BLOCK = 4096  # rows that are averaged at a time, so that little memory is needed in float64


@dataclass(frozen=True)
class MapRows(Adapter):
    """Rows of a table, weight or bias carried by label or by index: (V, d), (V,), or (d, V) with `dim=1`, in any order.

    A label in `new` that `old` has too gives its model row that checkpoint row, bit for bit; a label that is repeated in
    `new` copies its row to each. The model's other rows, padding without a label among them, are new rows. A checkpoint
    row that goes nowhere, also one without a label, is a dropped row and an error unless `allow_drop`.

    The lists are kept as `Labels`: read once, printed short, compared by a digest. The entry's row count is settled by the
    model, so that the same adapter serves the embedding, the head and its bias.

    Attributes:
        old: The checkpoint's labels in row order (None: a row without one), or label -> row as `tokenizer.get_vocab()` gives
            them. None: `new` is an index map.
        new: The model's labels likewise. With `old=None` the old row of each new row in order, or new row -> old row; None
            or -1 for a new one.
        dim: The dimension that the rows run along.
        new_rows: What the other rows hold: "mean", the mean of the carried checkpoint rows, each counted once (computed in
            float64; dropped and padding rows stay out of it); "keep" what the entry was initialised with; or this number.
        allow_drop: Checkpoint rows may go nowhere.
        freeze_old: Train the new rows only: a flag that freezing reads; nothing changes here.

    Raises:
        MappingError: A value that cannot be meant; a label twice in `old`; two labels in `new` for one row.
    """

    old: LabelRows | None
    new: LabelRows | IndexMap
    dim: int = 0
    new_rows: float | Literal["mean", "keep"] = "mean"
    allow_drop: bool = False
    freeze_old: bool = False

    def __post_init__(self) -> None:
        if self.old is not None:
            object.__setattr__(self, "old", as_labels(self.old, "old"))
            if twice := repeated(self._old.names):
                why = f"old has {len(twice)} labels more than once: {shown(twice[:_NAMED])}"
                raise MappingError(f"{why}; write old={{label: row}} with one row each")
        object.__setattr__(
            self, "new", as_index_map(self.new, "new") if self.old is None else as_labels(self.new, "new")
        )
        if twice := repeated(self._new.rows.tolist()):
            raise MappingError(
                f"new has several labels for one row: {shown(twice[:_NAMED])}; write new=[...] with one a row"
            )
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise MappingError(f"dim={self.dim!r}: write dim=0")
        number = isinstance(self.new_rows, int | float) and not isinstance(self.new_rows, bool)
        if not number and self.new_rows not in ("mean", "keep"):
            raise MappingError(f'new_rows={self.new_rows!r}: write new_rows="mean", new_rows="keep" or new_rows=0.0')
        for name in ("allow_drop", "freeze_old"):
            if not isinstance(getattr(self, name), bool):
                raise MappingError(f"{name}={getattr(self, name)!r}: write {name}=True")

    def check(self, source: Shape, target: Shape) -> None:
        dim = self._dim(source, target)
        n, m = source[dim], target[dim]
        old_rows, new_rows = self._carried
        asked_old = old_rows if self.old is None else self._old.rows
        for rows, count, where, field in (
            (self._new.rows, m, "model", "new"),
            (asked_old, n, "checkpoint", "new" if self.old is None else "old"),
        ):
            if rows.size and rows.max() >= count:
                why = f"{field} goes up to row {rows.max()}, but the {where} has {count} rows; give the {where}'s own labels"
                raise refused(source, target, why, written(self))
        if m and not new_rows.size:
            why = "no row is carried"
            if self.old is not None and len(self._old) and len(self._new):
                first = f"{shown(self._old.names[:_NAMED])}; in new: {shown(self._new.names[:_NAMED])}"
                why = f"no label of old is in new. In old: {first}; spell both alike"
            raise refused(source, target, why, KEEP_OWN)
        dropped = np.setdiff1d(np.arange(n), old_rows)
        if dropped.size and not self.allow_drop:
            why = f"{dropped.size} of {n} checkpoint rows go nowhere: {self._named(dropped)}"
            raise refused(source, target, why, written(self, allow_drop=True))

    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        dim = self._dim(tuple(value.shape), tuple(current.shape))
        old_rows, new_rows = self._carried
        if new_rows.size == current.shape[dim]:
            rows = torch.empty(current.shape, dtype=current.dtype, device="cpu")
        elif self.new_rows == "keep":
            rows = current.detach().to("cpu", copy=True)
        elif self.new_rows == "mean":
            mean = _mean(value, dim, np.unique(old_rows)).to(current.dtype)
            rows = mean.expand(current.shape).clone(memory_format=torch.contiguous_format)
        else:
            rows = torch.full(current.shape, self.new_rows, dtype=current.dtype, device="cpu")
        # By indexing: index_copy_ has no kernels for float8.
        at: tuple[slice | Tensor, ...] = (*[slice(None)] * dim, torch.from_numpy(new_rows))
        rows[at] = value.index_select(dim, torch.from_numpy(old_rows)).to(current.dtype)
        return rows

    def loaded(self, source: Shape, target: Shape) -> Tensor | None:
        dim = self._dim(source, target)
        _, new_rows = self._carried
        if new_rows.size == target[dim]:
            return None
        mask = torch.zeros(target[dim], dtype=torch.bool, device="cpu")
        mask[torch.from_numpy(new_rows)] = True
        return mask.view([-1 if d == dim else 1 for d in range(len(target))])

    def keeps(self, source: Shape, target: Shape) -> bool:
        return self.new_rows == "keep" and self.loaded(source, target) is not None

    @property
    def constant(self) -> float | None:
        return None if isinstance(self.new_rows, str) else self.new_rows

    def computes(self, source: Shape, target: Shape) -> bool:
        return self.new_rows == "mean" and self.loaded(source, target) is not None

    def no_inverse(self, source: Shape, target: Shape) -> str | None:
        rows = source[self._dim(source, target)]
        dropped = rows - np.unique(self._carried[0]).size
        return f"{dropped} of {rows} rows were dropped" if dropped else None

    def undo(self, value: Tensor, source: Shape) -> Tensor:
        old_rows, new_rows = self._carried
        _, first = np.unique(old_rows, return_index=True)  # of a row with several copies, the first
        return value.index_select(self.dim % value.ndim, torch.from_numpy(new_rows[first]))

    @property
    def _old(self) -> Labels:
        return cast(Labels, self.old)

    @property
    def _new(self) -> Labels:
        return cast(Labels, self.new)

    @cached_property
    def _carried(self) -> tuple[_Rows, _Rows]:
        """The old and the new row of each row that is carried."""
        if self.old is None:
            return np.array(self._new.names, dtype=np.int64), self._new.rows
        old = dict(zip(self._old.names, self._old.rows.tolist(), strict=True))
        found = np.fromiter((old.get(name, -1) for name in self._new.names), dtype=np.int64, count=len(self._new))
        return found[found >= 0], self._new.rows[found >= 0]

    def _dim(self, source: Shape, target: Shape) -> int:
        if not -len(source) <= self.dim < len(source):
            why = f"there is no dimension {self.dim}"
            raise refused(source, target, why, written(self, dim=0) if source else KEEP_OWN)
        dim = self.dim % len(source)
        if len(source) != len(target) or source[:dim] + source[dim + 1 :] != target[:dim] + target[dim + 1 :]:
            differ = [d for d, (s, t) in enumerate(zip(source, target, strict=False)) if s != t]
            other = len(source) == len(target) and len(differ) == 1
            why = f"rows along dimension {dim}, but other dimensions differ too"
            raise refused(source, target, why, written(self, dim=differ[0]) if other else KEEP_OWN)
        return dim

    def _named(self, rows: _Rows) -> str:
        first = rows[:_NAMED].tolist()
        names: dict[int, Any] = {}
        if self.old is not None:
            wanted = set(first)
            names = {r: n for n, r in zip(self._old.names, self._old.rows.tolist(), strict=True) if r in wanted}
        words = (f"row {r} ({shown([names[r]])})" if r in names else f"row {r}" for r in first)
        return ", ".join(words) + (", ..." if rows.size > _NAMED else "")


def _mean(value: Tensor, dim: int, rows: _Rows) -> Tensor:
    """The mean of these rows in float64, of length 1 along `dim`. By numpy: torch's sum depends on the number of threads."""
    total: Any = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for block in torch.split(torch.from_numpy(rows), _BLOCK):
            total = total + np.add.reduce(wide(value.index_select(dim, block)).numpy(), axis=dim)
    return torch.from_numpy(np.asarray(total / rows.size)).unsqueeze(dim)
