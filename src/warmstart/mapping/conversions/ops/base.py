"""An op of a conversion: a small frozen dataclass that says how its work is undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.conversions.slots import LazyTensor, Slot
from warmstart.mapping.derivations import Shape
from warmstart.mapping.grouping import printable
from warmstart.tensors import dtype_name


class Op(ABC):
    """One step of a conversion, on the slots that the step before it left."""

    @abstractmethod
    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        """The slots after this op. Shapes and dtypes are decided at once, values when they are asked for.

        Args:
            slots: The slots before it.
            targets: The number of target templates.

        Raises:
            MappingError: The slots or their shapes are not what it works on.
        """

    @abstractmethod
    def undo(self, after: list[Slot[Tensor]], before: list[Slot[LazyTensor]]) -> list[Slot[Tensor]]:
        """The tensors that `run` was given, bit for bit, from those it made; `before` has their shapes."""

    @abstractmethod
    def inverted(self) -> Op:
        """The op that undoes this one without knowing what it was run on.

        Raises:
            MappingError: There is none.
        """

    @property
    def no_inverse(self) -> str | None:
        """Why `undo` cannot be, in a few words; None if it can."""
        return None


class EachOp(Op):
    """An op on every tensor alone that re-arranges its elements."""

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:
        """The re-arranged tensor, a view of the given one where it can be."""

    def unapply(self, tensor: Tensor, shape: Shape) -> Tensor:
        """What `apply` was given, of `shape`."""
        del shape
        inverted = self.inverted()
        assert isinstance(inverted, EachOp)
        return inverted.apply(tensor)

    def shape_before(self, shape: Shape) -> Shape | None:
        """The shape that becomes `shape`; None if it cannot be told from it."""
        try:
            return tuple(self.unapply(torch.empty(shape, device="meta"), ()).shape)
        except (MappingError, RuntimeError, IndexError):  # an entry of a shape that this op never makes
            return None

    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        del targets
        return [Slot(slot.axes, {at: self._applied(cell) for at, cell in slot.cells.items()}) for slot in slots]

    def undo(self, after: list[Slot[Tensor]], before: list[Slot[LazyTensor]]) -> list[Slot[Tensor]]:
        return [
            Slot(old.axes, {at: self.unapply(new.cells[at], tuple(cell.meta.shape)) for at, cell in old.cells.items()})
            for new, old in zip(after, before, strict=True)
        ]

    def _applied(self, cell: LazyTensor) -> LazyTensor:
        return LazyTensor(shaped(self, lambda: self.apply(cell.meta), cell), lambda: self.apply(cell.make()))


def check_ints(op: Op, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise MappingError(f"{type(op).__name__}: {name}={value!r} is no whole number; write {name}=0, for example")


def check_name(op: Op, value: object) -> None:
    if not isinstance(value, str) or not value.isidentifier():
        raise MappingError(
            f"{type(op).__name__}: over={value!r} is no placeholder; write its name without braces: over='e'"
        )


def ints(op: Op, name: str, value: object, *, allow_empty: bool = False) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not (value or allow_empty):
        raise MappingError(f"{type(op).__name__}: {name}={value!r} is no list of whole numbers, such as {name}=[0, 1]")
    check_ints(op, **{f"{name}[{i}]": item for i, item in enumerate(value)})
    return tuple(value)


def check_dtypes(op: Op, cells: Sequence[LazyTensor]) -> None:
    if len(kinds := sorted({dtype_name(cell.meta.dtype) for cell in cells})) > 1:
        raise MappingError(
            f"{op} joins tensors of {' and '.join(kinds)}, and casts nothing silently; "
            "put an Apply(fn) before it that casts them, or convert the checkpoint to one dtype"
        )


def size(op: Op, cell: LazyTensor, dim: int) -> int:
    if not -cell.meta.ndim <= dim < cell.meta.ndim:
        raise refused(op, [cell], f"it has no dim {dim}")
    return cell.meta.shape[dim]


def shaped(op: Op, make: Callable[[], Tensor], cell: LazyTensor) -> Tensor:
    """What `make` gives of tensors on the meta device, with torch's complaint as ours."""
    try:
        return make()
    except (RuntimeError, IndexError) as error:
        raise refused(op, [cell], str(error).partition("\n")[0]) from None


def refused(op: Op, cells: Sequence[LazyTensor], why: str) -> MappingError:
    return MappingError(
        f"{op} cannot take {shapes(cells)}: {printable(why)}; change its fields, or what comes before it"
    )


def shapes(cells: Sequence[LazyTensor]) -> str:
    """The different shapes among them."""
    shapes = list(dict.fromkeys(str(tuple(cell.meta.shape)) for cell in cells))
    return ", ".join(shapes[:4]) + (", ..." if len(shapes) > 4 else "")
