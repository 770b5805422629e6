"""Ops between many tensors of one shape and one with a dimension more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.conversions.ops.base import Op, check_dtypes, check_ints, check_name, refused, shapes, size
from warmstart.mapping.conversions.slots import Coordinate, JoinedTensor, LazyTensor, Slot, shared

_MOST = 100_000  # tensors that one may be unstacked into: a header may claim any size for a tensor of no elements


@dataclass(frozen=True)
class Stack(Op):
    """Stack the tensors of every value of a placeholder along a new dimension, in natural order (2 before 10).

    Attributes:
        over: The placeholder, which only the sources have.
        dim: Where the new dimension goes.
    """

    over: str
    dim: int

    def __post_init__(self) -> None:
        check_name(self, self.over)
        check_ints(self, dim=self.dim)

    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        del targets
        stacked = []
        for slot in slots:
            axes, groups = self._groups(slot)
            cells = {at: self._stacked([slot.cells[c] for c in group]) for at, group in groups.items()}
            stacked.append(Slot(axes, cells))
        return stacked

    def undo(self, after: list[Slot[Tensor]], before: list[Slot[LazyTensor]]) -> list[Slot[Tensor]]:
        slots = []
        for new, old in zip(after, before, strict=True):
            _, groups = self._groups(old)
            cells = {c: new.cells[at].select(self.dim, i) for at, group in groups.items() for i, c in enumerate(group)}
            slots.append(Slot(old.axes, {c: cells[c] for c in old.cells}))
        return slots

    def inverted(self) -> Unstack:
        return Unstack(self.over, self.dim)

    def _groups(self, slot: Slot[LazyTensor]) -> tuple[tuple[str, ...], dict[Coordinate, list[Coordinate]]]:
        """The axes that stay, and the coordinates that become one, by what stays of them."""
        if self.over not in slot.axes:
            raise MappingError(
                f"{self}: one of the tensors has no {{{self.over}}} to stack over; write it in every source template"
            )
        axis = slot.axes.index(self.over)
        groups: dict[Coordinate, list[Coordinate]] = {}
        for at in slot.cells:
            groups.setdefault(at[:axis] + at[axis + 1 :], []).append(at)
        return slot.axes[:axis] + slot.axes[axis + 1 :], groups

    def _stacked(self, cells: list[LazyTensor]) -> LazyTensor:
        check_dtypes(self, cells)
        shape = tuple(cells[0].meta.shape)
        if any(cell.meta.shape != shape for cell in cells):
            raise refused(self, cells, "they differ in shape")
        if not -len(shape) <= self.dim + 1 <= len(shape) + 1:
            raise refused(self, cells, f"there is no place {self.dim} for a new dimension")
        at = self.dim % (len(shape) + 1)
        # Shapes by hand here and in Concat: torch imports sympy, a second's work, to join tensors on the meta device.
        meta = cells[0].meta.new_empty((*shape[:at], len(cells), *shape[at:]))
        return JoinedTensor(meta, cells, lambda out: iter(out.unbind(self.dim)))


@dataclass(frozen=True)
class Unstack(Op):
    """Take a dimension apart: one tensor for each index, named by a placeholder that only the targets have.

    Attributes:
        over: The placeholder; it is 0, 1, 2, ...
        dim: The dimension, which is gone then.
    """

    over: str
    dim: int

    def __post_init__(self) -> None:
        check_name(self, self.over)
        check_ints(self, dim=self.dim)

    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        del targets
        unstacked = []
        for slot in slots:
            if self.over in slot.axes:
                raise MappingError(
                    f"{self}: {{{self.over}}} is gathered already; give the new placeholder another name"
                )
            cells = {(*at, str(i)): c for at, cell in slot.cells.items() for i, c in enumerate(self._unstacked(cell))}
            unstacked.append(Slot((*slot.axes, self.over), cells))
        return unstacked

    def undo(self, after: list[Slot[Tensor]], before: list[Slot[LazyTensor]]) -> list[Slot[Tensor]]:
        slots = []
        for new, old in zip(after, before, strict=True):
            parts: dict[Coordinate, list[Tensor]] = {at: [] for at in old.cells}
            for at, tensor in new.cells.items():
                parts[at[:-1]].append(tensor)
            dims = {at: self.dim % cell.meta.ndim for at, cell in old.cells.items()}
            slots.append(Slot(old.axes, {at: torch.stack(tensors, dims[at]) for at, tensors in parts.items()}))
        return slots

    def inverted(self) -> Stack:
        return Stack(self.over, self.dim)

    def _unstacked(self, cell: LazyTensor) -> list[LazyTensor]:
        count = size(self, cell, self.dim)
        if not 0 < count <= _MOST:
            raise MappingError(
                f"{self}: {shapes([cell])} would become {count:,} tensors, and 1 to {_MOST:,} are allowed; "
                "give the dim that counts them"
            )
        return shared(cell.meta.unbind(self.dim), lambda: cell.make().unbind(self.dim))
