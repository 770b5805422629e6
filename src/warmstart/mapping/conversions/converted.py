"""One instance of a conversion: the tensors it reads, what becomes of them, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from warmstart.errors import MappingError, WarmStartError
from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.ops.applying import Apply
from warmstart.mapping.conversions.ops.base import EachOp, Op
from warmstart.mapping.conversions.ops.joining import Split
from warmstart.mapping.conversions.ops.stacking import Unstack
from warmstart.mapping.conversions.slots import Coordinate, LazyTensor, Slot
from warmstart.mapping.derivations import Derivation, Shape
from warmstart.mapping.grouping import printable
from warmstart.tensors import same_bits


class Input(NamedTuple):
    """What one source template took in an instance, in natural order of its coordinates."""

    axes: tuple[str, ...]
    coordinates: tuple[Coordinate, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]


class Output(NamedTuple):
    """One result: the target template it goes to, with the values of the placeholders that it is made for."""

    template: int
    made_for: tuple[tuple[str, str], ...]
    shape: Shape | None
    dtype: torch.dtype


class Sketch(NamedTuple):
    """What a conversion makes of its inputs.

    Attributes:
        ops: Its ops, a `Split` with the sizes that its targets want.
        outputs: The results.
        waiting: The index of the `Split` that waits for those sizes; None if there is none.
    """

    ops: tuple[Op, ...]
    outputs: tuple[Output, ...]
    waiting: int | None = None


class Sketcher:
    """A conversion run on shapes and dtypes, once for all the instances that have the same ones."""

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self.label = str(conversion)
        self._first: dict[tuple[Input, ...], Sketch | MappingError] = {}
        self._settled: dict[tuple[tuple[Input, ...], tuple[Shape | None, ...]], Sketch] = {}

    def first(self, inputs: tuple[Input, ...]) -> Sketch:
        """The results as far as they are known without the entries they go to.

        Raises:
            MappingError: An op cannot be run on such tensors, or the results do not fit the targets.
        """
        found = self._first.get(inputs)
        if found is None:
            try:
                found = self._sketch(inputs)
            except MappingError as error:
                found = error
            self._first[inputs] = found
        if isinstance(found, MappingError):
            raise found
        return found

    def settled(self, inputs: tuple[Input, ...], wanted: tuple[Shape | None, ...]) -> Sketch:
        """The results, with the sizes of a `Split` that waits taken from the shapes their entries have.

        Raises:
            MappingError: The sizes cannot be settled.
        """
        found = self._settled.get((inputs, wanted))
        if found is None:
            found = self._settled[inputs, wanted] = self._settle(inputs, wanted)
        return found

    def _sketch(self, inputs: tuple[Input, ...]) -> Sketch:
        ops, targets = self.conversion.steps, len(self.conversion.targets)
        waiting = _waiting(ops)
        if waiting is None:
            return Sketch(ops, self._outputs(ops, inputs))
        split, before = self._before(waiting, inputs)
        if any(isinstance(op, Unstack) for op in ops[waiting:]):
            # How many tensors come out is seen with any sizes, here as equal as can be.
            total = before.meta.shape[split.dim]
            sizes = tuple(total // targets + (number < total % targets) for number in range(targets))
            outputs = self._outputs((*ops[:waiting], replace(split, sizes=sizes), *ops[waiting + 1 :]), inputs)
        else:
            outputs = tuple(Output(number, (), None, before.meta.dtype) for number in range(targets))
        return Sketch(ops, tuple(output._replace(shape=None) for output in outputs), waiting)

    def _settle(self, inputs: tuple[Input, ...], wanted: tuple[Shape | None, ...]) -> Sketch:
        ops, outputs, waiting = self.first(inputs)
        assert waiting is not None
        split, before = self._before(waiting, inputs)
        sizes = [
            _size_before(
                ops[waiting + 1 :],
                [(output, shape) for output, shape in zip(outputs, wanted, strict=True) if output.template == number],
                before,
                split.dim,
            )
            for number in range(len(self.conversion.targets))
        ]
        ops = (*ops[:waiting], split.settled(before, sizes), *ops[waiting + 1 :])
        settled = self._outputs(ops, inputs)
        if [output[:2] for output in settled] != [output[:2] for output in outputs]:
            raise MappingError(
                f"{ops[waiting]} changes how many tensors are unstacked after it; write its sizes out, "
                f"Split(dim={split.dim}, sizes=[...]), or unstack before it"
            )
        return Sketch(ops, settled)

    def _before(self, waiting: int, inputs: tuple[Input, ...]) -> tuple[Split, LazyTensor]:
        """The `Split` that waits, and the one tensor that it splits."""
        (*_, slots) = states(self.conversion.steps[:waiting], laid_out(inputs, _not_read), len(self.conversion.targets))
        split = self.conversion.steps[waiting]
        assert isinstance(split, Split)
        if slots[0].axes:
            raise MappingError(
                f"{split} would split each of {len(slots[0].cells)} gathered tensors; Stack or Concat them first"
            )
        split.check(slots)
        return split, slots[0].cells[()]

    def _outputs(self, ops: Sequence[Op], inputs: tuple[Input, ...]) -> tuple[Output, ...]:
        conversion = self.conversion
        (*_, slots) = states(ops, laid_out(inputs, _not_read), len(conversion.targets))
        if conversion.copies:
            slots = slots * len(conversion.targets)
        if len(slots) != len(conversion.targets):
            raise MappingError(
                f"{len(slots)} results for {len(conversion.targets)} targets; name one target for each result"
            )
        outputs: list[Output] = []
        for number, (slot, template) in enumerate(zip(slots, conversion.target_templates, strict=True)):
            made_for = set(template.names).difference(conversion.shared)
            if set(slot.axes) != made_for:
                axes, names = (
                    ", ".join(f"{{{n}}}" for n in sorted(some)) or "nothing" for some in (slot.axes, made_for)
                )
                raise MappingError(
                    f"the results for '{printable(template.text)}' differ by {axes}, and its name by {names}; "
                    "Stack or Concat them, or write the placeholder in the target"
                )
            for at, cell in slot.cells.items():
                made = tuple(zip(slot.axes, at, strict=True))
                outputs.append(Output(number, made, tuple(cell.meta.shape), cell.meta.dtype))
        return tuple(outputs)


class Converted(Derivation):
    """The tensors that one instance of a conversion makes.

    Args:
        sketcher: The conversion.
        inputs: What each of its source templates took.
        sources: The keys, as the file spells them, in the order of the inputs.
        values: The values of the shared placeholders.

    Raises:
        MappingError: An op cannot be run on such tensors, or the results do not fit the targets.
    """

    def __init__(
        self, sketcher: Sketcher, inputs: tuple[Input, ...], sources: tuple[str, ...], values: dict[str, str]
    ) -> None:
        self._sketcher = sketcher
        self.may_refuse = any(isinstance(op, Apply) for op in sketcher.conversion.ops)
        self._inputs = inputs
        self._sketch = sketcher.first(inputs)
        self.label = sketcher.label
        self.sources = sources
        templates = sketcher.conversion.target_templates
        outputs = self._sketch.outputs
        self.targets = tuple([templates[o.template].render(values | dict(o.made_for)) for o in outputs])
        self.shapes = [output.shape for output in outputs]
        self.dtypes = [output.dtype for output in outputs]

    def resolve(self, wanted: Sequence[Shape | None]) -> None:
        if self._sketch.waiting is not None:
            self._sketch = self._sketcher.settled(self._inputs, tuple(wanted))
            self.shapes = [output.shape for output in self._sketch.outputs]
            self.dtypes = [output.dtype for output in self._sketch.outputs]

    def run(self, read: Callable[[int], Tensor]) -> list[Tensor]:
        """The outputs, on the CPU.

        Raises:
            MappingError: A function that was given to `Apply` raised on the values.
        """
        with torch.no_grad():
            try:
                slots = self._states(read)[-1]
                if self._sketcher.conversion.copies:
                    return [slots[0].cells[()].make()] * len(self.targets)
                return [slots[o.template].cells[_coordinate(o)].make() for o in self._sketch.outputs]
            except (WarmStartError, OSError):
                raise
            except Exception as error:  # the function's own code: anything
                if not self.may_refuse:
                    raise
                raise MappingError(f"{self.label}: {type(error).__name__}: {error}") from error

    def undo(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        *before, last = self._states(_not_read)
        if self._sketcher.conversion.copies:
            for name, other in zip(self.targets, outputs, strict=True):
                if not same_bits(outputs[0], other):
                    raise MappingError(
                        f"'{printable(self.targets[0])}' and '{printable(name)}' are copies of "
                        f"'{printable(self.sources[0])}' and differ now; save the model in its own layout instead"
                    )
            return [outputs[0]]
        cells: list[dict[Coordinate, Tensor]] = [{} for _ in last]
        for output, tensor in zip(self._sketch.outputs, outputs, strict=True):
            cells[output.template][_coordinate(output)] = tensor
        slots = [Slot(slot.axes, made) for slot, made in zip(last, cells, strict=True)]
        with torch.no_grad():
            for op, old in zip(reversed(self._sketch.ops), reversed(before), strict=True):
                slots = op.undo(slots, old)
        return [tensor for slot in slots for tensor in slot.cells.values()]

    @property
    def no_inverse(self) -> str | None:
        return next((why for op in self._sketch.ops if (why := op.no_inverse)), None)

    def _states(self, read: Callable[[int], Tensor]) -> list[list[Slot[LazyTensor]]]:
        return states(self._sketch.ops, laid_out(self._inputs, read), len(self._sketcher.conversion.targets))


def states(ops: Sequence[Op], slots: list[Slot[LazyTensor]], targets: int) -> list[list[Slot[LazyTensor]]]:
    """What each op is given, in turn, and at the end what the last one leaves."""
    out = [slots]
    for op in ops:
        out.append(op.run(out[-1], targets))
    return out


def laid_out(inputs: Sequence[Input], read: Callable[[int], Tensor]) -> list[Slot[LazyTensor]]:
    """The slots before the first op; `read(i)` gives the i-th tensor of all the inputs."""
    slots: list[Slot[LazyTensor]] = []
    number = 0
    for axes, coordinates, shapes, dtypes in inputs:
        cells: dict[Coordinate, LazyTensor] = {}
        for at, shape, dtype in zip(coordinates, shapes, dtypes, strict=True):
            cells[at] = LazyTensor(torch.empty(shape, dtype=dtype, device="meta"), partial(read, number))
            number += 1
        slots.append(Slot(axes, cells))
    return slots


def _not_read(number: int) -> Tensor:
    raise AssertionError(f"source {number} was read while planning")


def _coordinate(output: Output) -> Coordinate:
    return tuple(value for _, value in output.made_for)


def _waiting(ops: Sequence[Op]) -> int | None:
    """The index of a `Split` whose sizes the targets' shapes can tell, through the ops after it."""
    for number in reversed(range(len(ops))):
        op = ops[number]
        if isinstance(op, Split):
            return number if op.sizes is None else None
        if not isinstance(op, EachOp | Unstack):
            return None
    return None


def _size_before(
    ops: Sequence[Op], made: Sequence[tuple[Output, Shape | None]], before: LazyTensor, dim: int
) -> int | None:
    """The size along `dim` that a part of `before` must have so that `ops` make its outputs in the shapes they want."""
    shape = next((wanted for _, wanted in made if wanted is not None), None)
    if shape is None:
        return None
    elements = prod(shape)
    for op in reversed(ops):
        if isinstance(op, Unstack):
            count = len({dict(output.made_for)[op.over] for output, _ in made})
            elements *= count
            if shape is not None:
                at = op.dim % (len(shape) + 1)
                shape = (*shape[:at], count, *shape[at:])
        elif isinstance(op, EachOp) and shape is not None:
            shape = op.shape_before(shape)
    others = prod(before.meta.shape) // before.meta.shape[dim] if before.meta.shape[dim] else 0
    if shape is not None and len(shape) == before.meta.ndim:
        return shape[dim]
    # Through a Reshape only the number of elements comes back.
    return elements // others if others and not elements % others else None
