"""Ops between many tensors and one of them in a row along a dimension."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.conversions.ops.base import Op, check_dtypes, check_ints, ints, refused, shapes, size
from warmstart.mapping.conversions.slots import Coordinate, JoinedTensor, LazyTensor, Slot, shared


class JoinOp(Op):
    """An op on several tensors at once: those of several slots, value by value, or those that one slot has gathered."""

    def _groups(self, slots: list[Slot[LazyTensor]]) -> tuple[tuple[str, ...], dict[Coordinate, list[LazyTensor]]]:
        """The axes that stay, and for each coordinate the tensors that are taken together."""
        first = slots[0]
        if len(slots) == 1:
            if len(first.axes) > 1:
                names = " and ".join(f"{{{axis}}}" for axis in first.axes)
                raise MappingError(f"{self}: {names} are both gathered; Stack(over=...) one of them first")
            return (), {(): list(first.cells.values())}
        if any(slot.axes != first.axes or slot.cells.keys() != first.cells.keys() for slot in slots):
            raise MappingError(
                f"{self} takes tensors together that differ in what they have gathered; Stack(over=...) first"
            )
        return first.axes, {at: [slot.cells[at] for slot in slots] for at in first.cells}

    def undo(self, after: list[Slot[Tensor]], before: list[Slot[LazyTensor]]) -> list[Slot[Tensor]]:
        _, groups = self._groups(before)
        parts = {at: self._apart([slot.cells[at] for slot in after], cells) for at, cells in groups.items()}
        if len(before) == 1:
            return [Slot(before[0].axes, dict(zip(before[0].cells, parts[()], strict=True)))]
        return [Slot(old.axes, {at: parts[at][number] for at in old.cells}) for number, old in enumerate(before)]

    @abstractmethod
    def _apart(self, made: list[Tensor], cells: list[LazyTensor]) -> Sequence[Tensor]:
        """The tensors that were taken together, from what was made of them."""


@dataclass(frozen=True)
class Concat(JoinOp):
    """Concatenate: the source templates' tensors in turn, or those that one template gathers, in natural order.

    Attributes:
        dim: The dimension along which they follow each other.
    """

    dim: int

    def __post_init__(self) -> None:
        check_ints(self, dim=self.dim)

    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        del targets
        if len(slots) == 1 and not slots[0].axes:
            raise MappingError(f"{self}: there is one tensor only; name more sources, or leave it out")
        axes, groups = self._groups(slots)
        return [Slot(axes, {at: self._joined(cells) for at, cells in groups.items()})]

    def inverted(self) -> Split:
        return Split(self.dim)

    def _joined(self, cells: list[LazyTensor]) -> LazyTensor:
        check_dtypes(self, cells)
        sizes = [size(self, cell, self.dim) for cell in cells]
        at = self.dim % cells[0].meta.ndim
        if len({(*cell.meta.shape[:at], *cell.meta.shape[at + 1 :], cell.meta.ndim) for cell in cells}) > 1:
            raise refused(self, cells, f"they differ in more than dim {self.dim}")
        shape = cells[0].meta.shape
        meta = cells[0].meta.new_empty((*shape[:at], sum(sizes), *shape[at + 1 :]))
        return JoinedTensor(meta, cells, lambda out: iter(out.split_with_sizes(sizes, self.dim)))

    def _apart(self, made: list[Tensor], cells: list[LazyTensor]) -> Sequence[Tensor]:
        return made[0].split_with_sizes([cell.meta.shape[self.dim] for cell in cells], self.dim)


@dataclass(frozen=True)
class Split(Op):
    """Split one tensor into as many as there are targets.

    Attributes:
        dim: The dimension that is split.
        sizes: The parts' sizes along it. None takes them from the model's entries (so that the smaller key and value of
            grouped-query attention work), and where no entry is known makes equal parts.
    """

    dim: int
    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_ints(self, dim=self.dim)
        if self.sizes is not None:
            object.__setattr__(self, "sizes", ints(self, "sizes", self.sizes))
            if any(size < 0 for size in self.sizes):
                raise MappingError(f"{self}: sizes are not negative, for example sizes=[8, 2, 2]")

    def check(self, slots: list[Slot[LazyTensor]]) -> None:
        """Refuse what cannot be split in any sizes."""
        if len(slots) != 1:
            raise MappingError(f"{self} takes one tensor, and there are {len(slots)}; Concat them first")
        for cell in slots[0].cells.values():
            size(self, cell, self.dim)

    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        self.check(slots)
        parts = {at: self._split(cell, targets) for at, cell in slots[0].cells.items()}
        count = targets if self.sizes is None else len(self.sizes)
        return [Slot(slots[0].axes, {at: cells[number] for at, cells in parts.items()}) for number in range(count)]

    def undo(self, after: list[Slot[Tensor]], before: list[Slot[LazyTensor]]) -> list[Slot[Tensor]]:
        (old,) = before
        return [Slot(old.axes, {at: torch.cat([slot.cells[at] for slot in after], self.dim) for at in old.cells})]

    def inverted(self) -> Concat:
        return Concat(self.dim)

    def settled(self, cell: LazyTensor, wanted: Sequence[int | None]) -> Split:
        """This split with the sizes that its targets want; without a single one, as it is.

        Raises:
            MappingError: They do not add up, or leave more than one part open.
        """
        total = size(self, cell, self.dim)
        known = [size for size in wanted if size is not None]
        if not known:
            return self
        if len(known) == len(wanted) - 1 and sum(known) <= total:
            rest = total - sum(known)
            return replace(self, sizes=tuple(rest if size is None else size for size in wanted))
        if len(known) < len(wanted) or sum(known) != total:
            shown = " + ".join("?" if size is None else str(size) for size in wanted)
            raise MappingError(
                f"{self}: the targets want {shown} of dim {self.dim}, and {shapes([cell])} has {total}; "
                f"write the sizes out: Split(dim={self.dim}, sizes=[...])"
            )
        return replace(self, sizes=tuple(known))

    def _split(self, cell: LazyTensor, targets: int) -> list[LazyTensor]:
        total = size(self, cell, self.dim)
        sizes = [total // targets] * targets if self.sizes is None else list(self.sizes)
        if sum(sizes) != total:
            why = f"it has no {targets} equal parts" if self.sizes is None else f"the sizes add up to {sum(sizes)}"
            raise MappingError(
                f"{self}: dim {self.dim} of {shapes([cell])} is {total}, and {why}; "
                f"write the sizes out: Split(dim={self.dim}, sizes=[...])"
            )
        return shared(
            cell.meta.split_with_sizes(sizes, self.dim), lambda: cell.make().split_with_sizes(sizes, self.dim)
        )
