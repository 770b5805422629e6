"""A function of the user's own as an op."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.conversions.ops.base import refused
from warmstart.mapping.conversions.ops.joining import JoinOp
from warmstart.mapping.conversions.slots import LazyTensor, Slot, shared
from warmstart.mapping.grouping import printable
from warmstart.tensors import dtype_name

TensorFunction: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]


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
                raise refused(self, cells, f"{type(error).__name__}: {error}") from error
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
