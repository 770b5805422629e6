"""The model in its checkpoint's own layout: every step of a plan undone, lazily."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from warmstart.checkpoints.base import Checkpoint, Index, TensorInfo
from warmstart.errors import CheckpointError, MappingError
from warmstart.mapping.buckets import Assignment, Buckets
from warmstart.mapping.derivations import Derivation
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.model.targets import Live
from warmstart.shards import gathered
from warmstart.tensors import bits_lost, dtype_name, range_lost, same_bits


class ReversedCheckpoint(Checkpoint):
    """The keys that a plan used, with the values that the model holds now, in the checkpoint's names, shapes and dtypes."""

    def __init__(self, plan: Buckets, part: int) -> None:
        """Reverse one part of a plan.

        Raises:
            MappingError: A step has no inverse; the message names each.
        """
        source = plan.parts[part].checkpoint
        self._plan = plan
        self._steps: dict[str, list[Assignment]] = {}
        self._outputs: dict[int, dict[int, Assignment]] = {}
        for assignment in plan.assignments:
            if assignment.part == part:
                if assignment.conversion is not None:
                    self._outputs.setdefault(id(assignment.conversion), {})[assignment.output] = assignment
                for key in assignment.sources:
                    self._steps.setdefault(key, []).append(assignment)
        _refuse(plan, [a for a in plan.assignments if a.part == part])
        super().__init__(
            location=f"a {plan.model_name} in the layout of {source.location}",
            format="memory",
            # What one conversion is undone to lies together, so that reading in this order undoes it once.
            infos={k: TensorInfo(source.info(k).shape, source.info(k).dtype) for k in self._in_order(source.keys())},
            checkpoint_key=source.checkpoint_key,
            metadata=source.metadata,
            versions=source.versions,
        )
        self._live = Live(plan.model)
        self._undone: tuple[Derivation | None, list[Tensor]] = (None, [])

    def _in_order(self, keys: Sequence[str]) -> list[str]:
        places: dict[int, int] = {}
        order = []
        for place, key in enumerate(keys):
            if key in self._steps:
                made = self._steps[key][0].conversion
                order.append((places.setdefault(id(made), place) if made is not None else place, place, key))
        return [key for _, _, key in sorted(order)]

    def _read(self, key: str, index: Index | None) -> Tensor:
        steps = self._steps[key]
        if steps[0].conversion is None:
            value = self._value(steps[0], self.info(key).dtype)
        else:
            found = {id(made): made for step in steps if (made := step.conversion) is not None}
            value, *others = (self._undo(made)[made.sources.index(key)] for made in found.values())
            if not all(same_bits(value, other) for other in others):
                raise CheckpointError(
                    f"{self.location}: '{printable(key)}' went to {len(found)} places, which hold different values by now"
                )
        return value if index is None else value[index]

    def _undo(self, conversion: Derivation) -> list[Tensor]:
        done, tensors = self._undone
        if done is not conversion:
            self._undone = (None, [])
            outputs = self._outputs[id(conversion)]
            values = [self._value(outputs[i], conversion.dtypes[i]) for i in range(len(conversion.targets))]
            tensors = conversion.undo(values)
            self._undone = (conversion, tensors)
        return tensors

    def _value(self, step: Assignment, dtype: torch.dtype) -> Tensor:
        """What the entry holds, before its adapter and its cast."""
        live = self._live.tensor(self._plan.targets.entries[step.target])
        if live is None:
            raise CheckpointError(f"'{step.target}' is no longer part of the model; plan again to save it as it is now")
        value = gathered(live).detach().cpu()
        if step.adapter is not None:
            held, value = value, step.adapter.undo(value, step.source_shape)
            again, mask = step.adapter.apply(value, held), step.loaded
            if mask is not None:
                again, held = again.masked_fill(~mask, 0), held.masked_fill(~mask, 0)
            if not same_bits(again, held):
                raise CheckpointError(
                    f"'{printable(step.target)}' holds different values by now where the checkpoint had one; save it in the "
                    "model's own layout instead"
                )
        return value.to(dtype)


def _refuse(plan: Buckets, steps: Sequence[Assignment]) -> None:
    lost: list[tuple[str, str]] = []
    made: dict[int, set[int]] = {}
    for step in steps:
        if step.cast is not None and (bits_lost(*step.cast) or range_lost(*step.cast)):
            source, target = map(dtype_name, step.cast)
            lost.append((step.target, f"narrowing {source} to {target} lost bits"))
        if step.adapter is not None and (why := step.adapter.no_inverse(step.source_shape, step.shape)):
            lost.append((step.target, f"{type(step.adapter).__name__}: {why}"))
        if step.conversion is not None:
            made.setdefault(id(step.conversion), set()).add(step.output)
            if why := step.conversion.no_inverse:
                lost.append((step.target, why))
    conversions = {id(step.conversion): step.conversion for step in steps if step.conversion is not None}
    for number, outputs in made.items():
        conversion = conversions[number]
        if absent := [name for i, name in enumerate(conversion.targets) if i not in outputs]:
            lost.append((absent[0], f"{conversion.label} made it, and it went nowhere"))
    if lost:
        source = plan.parts[steps[0].part].pretrained.label
        raise MappingError(
            f"the plan for {printable(source)} cannot be reversed: {len(lost)} steps have no inverse\n{listed(lost)}\n"
            "  -> save these entries in the model's own layout (model.state_dict()), or plan without them: exclude=[...]",
            plan=plan,
        )
