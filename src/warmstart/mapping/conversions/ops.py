"""The ops of a conversion, each a small frozen dataclass that says how its work is undone."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.conversions.slots import Coordinate, JoinedTensor, LazyTensor, Slot, shared
from warmstart.mapping.derivations import Shape
from warmstart.mapping.grouping import printable
from warmstart.tensors import dtype_name

TensorFunction: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
_MOST = 100_000  # tensors that one may be unstacked into: a header may claim any size for a tensor of no elements


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
        return LazyTensor(_shaped(self, lambda: self.apply(cell.meta), cell), lambda: self.apply(cell.make()))


@dataclass(frozen=True)
class Transpose(EachOp):
    """Swap two dimensions.

    Attributes:
        a: The one.
        b: The other.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        _check_ints(self, a=self.a, b=self.b)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(self.a, self.b)

    def inverted(self) -> Transpose:
        return self


@dataclass(frozen=True)
class Permute(EachOp):
    """Put the dimensions in another order, as `torch.permute` does.

    Attributes:
        dims: For each dimension of the result, which one it was.
    """

    dims: Sequence[int]

    def __post_init__(self) -> None:
        dims = _ints(self, "dims", self.dims)
        if sorted(d % len(dims) if -len(dims) <= d < len(dims) else d for d in dims) != list(range(len(dims))):
            raise MappingError(f"{self}: dims must name each dimension once, for example dims=[2, 0, 1]")
        object.__setattr__(self, "dims", tuple(d % len(dims) for d in dims))

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.permute(tuple(self.dims))

    def inverted(self) -> Permute:
        return Permute(tuple(sorted(range(len(self.dims)), key=lambda d: self.dims[d])))


@dataclass(frozen=True)
class Reshape(EachOp):
    """The same elements in the same order in another shape.

    Attributes:
        shape: The new shape; one size may be -1, which is what remains.
    """

    shape: Sequence[int]

    def __post_init__(self) -> None:
        shape = _ints(self, "shape", self.shape, allow_empty=True)
        if any(size < -1 for size in shape) or shape.count(-1) > 1:
            raise MappingError(f"{self}: sizes are not negative but for one -1, for example shape=[-1, 64]")
        object.__setattr__(self, "shape", shape)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tuple(self.shape))

    def unapply(self, tensor: Tensor, shape: Shape) -> Tensor:
        return tensor.reshape(shape)

    def shape_before(self, shape: Shape) -> Shape | None:
        del shape
        return None

    def inverted(self) -> Op:
        raise MappingError(
            f"{self} has no declared inverse: it does not say the shape before it; write that Reshape out"
        )


@dataclass(frozen=True)
class RopePermute(EachOp):
    """Rows of a query or key projection, between the two ways to pair the dimensions that a rotary embedding turns.

    With `d` rows per head, the *interleaved* layout (Meta's Llama, GPT-J) turns the rows (2j, 2j + 1) of a head together,
    the *half* layout (Hugging Face's Llama, GPT-NeoX) the rows (j, j + d/2). So `to="half"` moves row `2j + k` of each
    head to row `k * d/2 + j`, for k in (0, 1) and j < d/2; for a weight `w` of shape (heads * d, in) that is

        w.view(heads, d // 2, 2, in).transpose(1, 2).reshape(heads * d, in)

    the `permute` of transformers' Llama conversion script. A bias has shape (heads * d,). Attention scores stay the same,
    as long as query and key are moved alike.

    Attributes:
        heads: Heads that the rows belong to; of a key under grouped-query attention, the key's own.
        to: The layout to make.
    """

    heads: int
    to: Literal["half", "interleaved"] = "half"

    def __post_init__(self) -> None:
        _check_ints(self, heads=self.heads)
        if self.heads < 1:
            raise MappingError(f"{self}: heads must be positive, for example heads=32")
        if self.to not in ("half", "interleaved"):
            raise MappingError(f'{self}: write to="half" (Meta to Hugging Face) or to="interleaved" (back)')

    def apply(self, tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.ndim else 0
        if tensor.ndim not in (1, 2) or rows % (2 * self.heads):
            raise MappingError(
                f"{self} takes a weight (heads * d, in) or a bias (heads * d,) with an even d, not {tuple(tensor.shape)}; "
                "give the heads of this projection"
            )
        half = rows // self.heads // 2
        pairs = (half, 2) if self.to == "half" else (2, half)
        return tensor.reshape(self.heads, *pairs, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def inverted(self) -> RopePermute:
        return replace(self, to="interleaved" if self.to == "half" else "half")


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
        _check_name(self, self.over)
        _check_ints(self, dim=self.dim)

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
        _check_dtypes(self, cells)
        shape = tuple(cells[0].meta.shape)
        if any(cell.meta.shape != shape for cell in cells):
            raise _refused(self, cells, "they differ in shape")
        if not -len(shape) <= self.dim + 1 <= len(shape) + 1:
            raise _refused(self, cells, f"there is no place {self.dim} for a new dimension")
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
        _check_name(self, self.over)
        _check_ints(self, dim=self.dim)

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
        count = _size(self, cell, self.dim)
        if not 0 < count <= _MOST:
            raise MappingError(
                f"{self}: {_shapes([cell])} would become {count:,} tensors, and 1 to {_MOST:,} are allowed; "
                "give the dim that counts them"
            )
        return shared(cell.meta.unbind(self.dim), lambda: cell.make().unbind(self.dim))


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
        _check_ints(self, dim=self.dim)

    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        del targets
        if len(slots) == 1 and not slots[0].axes:
            raise MappingError(f"{self}: there is one tensor only; name more sources, or leave it out")
        axes, groups = self._groups(slots)
        return [Slot(axes, {at: self._joined(cells) for at, cells in groups.items()})]

    def inverted(self) -> Split:
        return Split(self.dim)

    def _joined(self, cells: list[LazyTensor]) -> LazyTensor:
        _check_dtypes(self, cells)
        sizes = [_size(self, cell, self.dim) for cell in cells]
        at = self.dim % cells[0].meta.ndim
        if len({(*cell.meta.shape[:at], *cell.meta.shape[at + 1 :], cell.meta.ndim) for cell in cells}) > 1:
            raise _refused(self, cells, f"they differ in more than dim {self.dim}")
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
        _check_ints(self, dim=self.dim)
        if self.sizes is not None:
            object.__setattr__(self, "sizes", _ints(self, "sizes", self.sizes))
            if any(size < 0 for size in self.sizes):
                raise MappingError(f"{self}: sizes are not negative, for example sizes=[8, 2, 2]")

    def check(self, slots: list[Slot[LazyTensor]]) -> None:
        """Refuse what cannot be split in any sizes."""
        if len(slots) != 1:
            raise MappingError(f"{self} takes one tensor, and there are {len(slots)}; Concat them first")
        for cell in slots[0].cells.values():
            _size(self, cell, self.dim)

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
        total = _size(self, cell, self.dim)
        known = [size for size in wanted if size is not None]
        if not known:
            return self
        if len(known) == len(wanted) - 1 and sum(known) <= total:
            rest = total - sum(known)
            return replace(self, sizes=tuple(rest if size is None else size for size in wanted))
        if len(known) < len(wanted) or sum(known) != total:
            shown = " + ".join("?" if size is None else str(size) for size in wanted)
            raise MappingError(
                f"{self}: the targets want {shown} of dim {self.dim}, and {_shapes([cell])} has {total}; "
                f"write the sizes out: Split(dim={self.dim}, sizes=[...])"
            )
        return replace(self, sizes=tuple(known))

    def _split(self, cell: LazyTensor, targets: int) -> list[LazyTensor]:
        total = _size(self, cell, self.dim)
        sizes = [total // targets] * targets if self.sizes is None else list(self.sizes)
        if sum(sizes) != total:
            why = f"it has no {targets} equal parts" if self.sizes is None else f"the sizes add up to {sum(sizes)}"
            raise MappingError(
                f"{self}: dim {self.dim} of {_shapes([cell])} is {total}, and {why}; "
                f"write the sizes out: Split(dim={self.dim}, sizes=[...])"
            )
        return shared(
            cell.meta.split_with_sizes(sizes, self.dim), lambda: cell.make().split_with_sizes(sizes, self.dim)
        )


@dataclass(frozen=True, repr=False)
class Apply(JoinOp):
    """A function of your own: a list of tensors in, a list of tensors out.

    It gets one tensor of each source template, in their order (with one template that gathers: what it gathers, in
    natural order), must not write into them, and the shapes and dtypes of its results must not depend on their values:
    planning calls it with tensors on the meta device, and with zeros where it cannot take those.

    Attributes:
        fn: The function, or where to import it from: `"package.module:name"`.
        inverse: Gives the list of its inputs back, bit for bit; in the same form.
    """

    fn: TensorFunction | str
    inverse: TensorFunction | str | None = None

    def __post_init__(self) -> None:
        for fn in (self.fn,) if self.inverse is None else (self.fn, self.inverse):
            _function(fn)

    def run(self, slots: list[Slot[LazyTensor]], targets: int) -> list[Slot[LazyTensor]]:
        del targets
        axes, groups = self._groups(slots)
        made = {at: self._made(cells) for at, cells in groups.items()}
        counts = {len(cells) for cells in made.values()}
        if len(counts) > 1:
            raise MappingError(
                f"{self} returns {min(counts)} tensors here and {max(counts)} there; return as many each time"
            )
        return [Slot(axes, {at: cells[number] for at, cells in made.items()}) for number in range(counts.pop())]

    def inverted(self) -> Apply:
        if self.inverse is None:
            raise MappingError(f"{self.no_inverse}; give it one, as Apply(fn, inverse=...)")
        return Apply(self.inverse, self.fn)

    @property
    def no_inverse(self) -> str | None:
        return f"{self} has no inverse=" if self.inverse is None else None

    def _made(self, cells: list[LazyTensor]) -> list[LazyTensor]:
        inputs = [cell.meta for cell in cells]
        try:
            made = self._called(self.fn, inputs)
        except MappingError:
            raise
        except Exception:  # of a function that needs values: numpy, .item()
            try:
                made = self._called(self.fn, [torch.zeros(t.shape, dtype=t.dtype) for t in inputs])
            except MappingError:
                raise
            except Exception as error:
                raise _refused(self, cells, f"{type(error).__name__}: {error}") from error
        if not made:
            raise MappingError(f"{self} returns no tensors; return a list with one for each target")
        metas = [tensor.to("meta") for tensor in made]
        return shared(metas, lambda: self._checked(self.fn, [cell.make() for cell in cells], metas))

    def _apart(self, made: list[Tensor], cells: list[LazyTensor]) -> Sequence[Tensor]:
        assert self.inverse is not None
        return self._checked(self.inverse, made, [cell.meta for cell in cells])

    def _called(self, fn: TensorFunction | str, inputs: list[Tensor]) -> list[Tensor]:
        tracked = [tensor for tensor in inputs if not tensor.is_inference()]
        versions = [tensor._version for tensor in tracked]
        with torch.no_grad():
            made = _function(fn)(list(inputs))
        if not isinstance(made, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in made):
            raise MappingError(f"{self} returns {type(made).__name__}; return a list of tensors, also where it is one")
        if [tensor._version for tensor in tracked] != versions:
            raise MappingError(f"{self} writes into the tensors that it is given; let it return new ones")
        return list(made)

    def _checked(self, fn: TensorFunction | str, inputs: list[Tensor], metas: list[Tensor]) -> list[Tensor]:
        """What the function makes, on the CPU, once it is what was planned."""
        made = [tensor.detach().cpu() for tensor in self._called(fn, inputs)]
        if [(t.shape, t.dtype) for t in made] != [(t.shape, t.dtype) for t in metas]:
            raise MappingError(
                f"{_named(fn)} returns {_kinds(made)} where {_kinds(metas)} was planned; "
                "its results' number, shapes and dtypes must depend on its inputs' shapes and dtypes alone"
            )
        return made

    def __repr__(self) -> str:
        return f"Apply({_named(self.fn)})"


OPS: tuple[type[Op], ...] = (Split, Concat, Stack, Unstack, Transpose, Permute, Reshape, RopePermute, Apply)


def _function(fn: object) -> TensorFunction:
    """The function itself, imported where it is the path of one."""
    if isinstance(fn, str):
        module, colon, name = fn.partition(":")
        found: Any = None
        try:
            found = importlib.import_module(module) if colon and module else None
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise MappingError(f"Apply: {fn!r} cannot be imported ({error}); write 'package.module:name'") from None
        fn = found
    if not callable(fn):
        raise MappingError(f"Apply: {fn!r} is no function; give one, or where to import it: 'package.module:name'")
    return fn


def _named(fn: TensorFunction | str) -> str:
    return printable(fn if isinstance(fn, str) else getattr(fn, "__qualname__", type(fn).__name__))


def _kinds(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{dtype_name(t.dtype)} {tuple(t.shape)}" for t in tensors) or "nothing"


def _check_ints(op: Op, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise MappingError(f"{type(op).__name__}: {name}={value!r} is no whole number; write {name}=0, for example")


def _check_name(op: Op, value: object) -> None:
    if not isinstance(value, str) or not value.isidentifier():
        raise MappingError(
            f"{type(op).__name__}: over={value!r} is no placeholder; write its name without braces: over='e'"
        )


def _ints(op: Op, name: str, value: object, *, allow_empty: bool = False) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not (value or allow_empty):
        raise MappingError(f"{type(op).__name__}: {name}={value!r} is no list of whole numbers, such as {name}=[0, 1]")
    _check_ints(op, **{f"{name}[{i}]": item for i, item in enumerate(value)})
    return tuple(value)


def _check_dtypes(op: Op, cells: Sequence[LazyTensor]) -> None:
    if len(kinds := sorted({dtype_name(cell.meta.dtype) for cell in cells})) > 1:
        raise MappingError(
            f"{op} joins tensors of {' and '.join(kinds)}, and casts nothing silently; "
            "put an Apply(fn) before it that casts them, or convert the checkpoint to one dtype"
        )


def _size(op: Op, cell: LazyTensor, dim: int) -> int:
    if not -cell.meta.ndim <= dim < cell.meta.ndim:
        raise _refused(op, [cell], f"it has no dim {dim}")
    return cell.meta.shape[dim]


def _shaped(op: Op, make: Callable[[], Tensor], cell: LazyTensor) -> Tensor:
    """What `make` gives of tensors on the meta device, with torch's complaint as ours."""
    try:
        return make()
    except (RuntimeError, IndexError) as error:
        raise _refused(op, [cell], str(error).partition("\n")[0]) from None


def _refused(op: Op, cells: Sequence[LazyTensor], why: str) -> MappingError:
    return MappingError(
        f"{op} cannot take {_shapes(cells)}: {printable(why)}; change its fields, or what comes before it"
    )


def _shapes(cells: Sequence[LazyTensor]) -> str:
    """The different shapes among them."""
    shapes = list(dict.fromkeys(str(tuple(cell.meta.shape)) for cell in cells))
    return ", ".join(shapes[:4]) + (", ..." if len(shapes) > 4 else "")
