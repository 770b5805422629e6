"""Writing: in place, tensor by tensor, so that parameters, ties and optimizers keep their objects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from warmstart.checkpoints.files import Place
from warmstart.errors import CheckpointError, VerificationError
from warmstart.loading.agreement import raised_on_all
from warmstart.loading.inert import inert_adapters
from warmstart.loading.materialising import Unborn, materialise
from warmstart.loading.meeting import Ranks
from warmstart.loading.moving import Mover
from warmstart.loading.preflight import preflight
from warmstart.loading.relaying import in_step
from warmstart.loading.values import Digests, Values, loaded_here
from warmstart.loading.verifying import verify_written
from warmstart.mapping.grouping import printable
from warmstart.mapping.plan.plan import Plan, Verify
from warmstart.shards import reshard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(slots=True)
class Written:
    """What writing a plan did.

    Attributes:
        verified: How the values were compared after writing.
        bytes_read: Bytes of tensors read from the sources, verification included.
        seconds: Wall-clock time of preflight, writing and verification.
        digests: Checksums of what in-memory sources gave.
        notes: What was met on the way (non-finite values).
    """

    verified: Verify
    bytes_read: int = 0
    seconds: float = 0.0
    digests: Digests = field(default_factory=Digests)
    notes: list[str] = field(default_factory=list)


def write(plan: Plan, verify: Verify, group: ProcessGroup | None = None) -> Written:
    """Preflight, write and verify a plan; the ranks of `group` write once all of them have passed the preflight.

    Raises:
        MappingError: Preflight found something. The model is untouched.
        CheckpointError: A source cannot be read; `.written` names the entries that were written before that.
        VerificationError: The model does not hold what was written.
    """
    started = time.perf_counter()
    before = sum(part.checkpoint.bytes_read for part in plan.parts)
    values = Values(plan)
    with raised_on_all("preflight", group), in_step(plan):
        values.secure()
        unborn = Unborn(plan)
        preflight(plan, values, unborn)
    result = Written(verify)
    mover = Mover(copy=True, verify=verify)
    done = mover.done
    begun = False
    reshard(plan.model)
    try:
        with in_step(plan), torch.no_grad():
            with mover:
                places, memory = _mapped(plan, values, unborn, mover)
                if begun := bool(unborn):
                    result.notes += materialise(plan, unborn, memory)
                for assignment in plan.written:
                    target = plan.targets.entries[assignment.target]
                    shard = shard_of(target.tensor)
                    others = plan.targets.groups.get(target.canonical, [])
                    place = places.get(target.name) or (None if others else values.place(assignment, shard))
                    if place is not None:
                        mover.add(target.name, shard.local, place, copy=id(shard.local) not in memory)
                        continue
                    value = values.planned(assignment, shard)
                    _place(shard.local, value, [plan.targets.entries[name].tensor for name in others])
                    done.append(assignment.target)
                    if assignment.fill is None and not plan.parts[assignment.part].checkpoint.lasting:
                        mask = loaded_here(assignment, shard) if assignment.keeps else None
                        result.digests.keep(assignment.target, value, mask)
                    del value  # a part of it keeps the whole tensor in memory, which the next one would come on top of
            result.notes += verify_written(plan, values, verify, mover)
    except VerificationError as error:
        error.report = result
        raise
    except Exception as error:
        if not begun and not mover.begun and not done and Ranks.of(group) is None:
            raise  # the model is untouched, and on other ranks there is none
        total = len(plan.written)
        names = ", ".join(printable(name) for name in done[:8]) + (", ..." if len(done) > 8 else "")
        names = f" ({names})" if names else ""
        state = "half loaded" if len(done) < total else "loaded but not verified"
        raise CheckpointError(
            f"{error}\n{len(done)} of {total} entries had been written by then{names}; the model is {state}: build it again "
            "before you go on",
            written=tuple(done),
            report=result,
        ) from error
    result.notes += inert_adapters(plan, group)
    result.bytes_read = sum(part.checkpoint.bytes_read for part in plan.parts) - before
    result.seconds = time.perf_counter() - started
    return result


def _mapped(plan: Plan, values: Values, unborn: Unborn, mover: Mover) -> tuple[dict[str, Place], dict[int, Tensor]]:
    """Where the bytes of entries without memory lie, by name; and a file's own pages for their memory, by identity."""
    places: dict[str, Place] = {}
    memory: dict[int, Tensor] = {}
    for assignment in unborn.mappable():
        tensor = plan.targets.entries[assignment.target].tensor
        if (place := values.place(assignment, shard_of(tensor), unborn=True)) is not None:
            places[assignment.target] = place
            if (pages := mover.memory(tensor, place)) is not None:
                memory[id(tensor)] = pages
    return places, memory


def _place(tensor: Tensor, value: Tensor, tied: Sequence[Tensor]) -> None:
    """Copy a value of the same shape; the objects, their device, their tie and their `requires_grad` stay."""
    assert tensor.shape == value.shape
    stored: Tensor | None = None
    if tensor.dtype != value.dtype:  # dtype="checkpoint": the object stays, its storage is another one
        stored = torch.empty_like(tensor, dtype=value.dtype)
    elif any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        stored = tensor.data.contiguous()  # an expanded buffer has fewer elements in memory than in its shape
    if stored is not None:
        for each in (tensor, *tied):
            each.data = stored
    tensor.copy_(value)
