"""The value an entry should have: read from the source, cast as planned, cast again as the host casts later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from warmstart.mapping.buckets import Assignment
from warmstart.mapping.plan import Plan
from warmstart.mapping.targets import Target
from warmstart.tensors import digest


class Values:
    """Reads a plan's values one at a time.

    A source in memory may share storage with the model it is loaded into, so that writing one entry would change the
    source of another: those tensors are copied when the object is made, before anything is written.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._copies: dict[tuple[int, str], Tensor] = {}
        storages = {_storage(t.tensor) for t in plan.targets.entries.values()}
        for assignment in written(plan):
            checkpoint = plan.parts[assignment.part].checkpoint
            if checkpoint.files:
                continue
            tensor = checkpoint.read(assignment.sources[0])
            if _storage(tensor) in storages:
                self._copies[assignment.part, assignment.sources[0]] = tensor.clone()

    def source(self, assignment: Assignment) -> Tensor:
        """The tensor as the checkpoint holds it, on the CPU."""
        key = assignment.sources[0]
        copy = self._copies.get((assignment.part, key))
        return copy if copy is not None else self.plan.parts[assignment.part].checkpoint.read(key)


def written(plan: Plan) -> Iterator[Assignment]:
    """The assignments that are written, each tied tensor once."""
    seen: set[str] = set()
    for assignment in plan.assignments:
        canonical = plan.targets.entries[assignment.target].canonical
        if assignment.alias_of is None and canonical not in seen:
            seen.add(canonical)
            yield assignment


def duplicates(plan: Plan) -> Iterator[tuple[Assignment, Assignment]]:
    """Pairs of assignments that give one tied tensor a value each, from different keys."""
    first: dict[str, Assignment] = {}
    for assignment in plan.assignments:
        if assignment.alias_of is None:
            other = first.setdefault(plan.targets.entries[assignment.target].canonical, assignment)
            if other is not assignment:
                yield other, assignment


def as_planned(value: Tensor, assignment: Assignment) -> Tensor:
    """A source tensor in the dtype the plan gives the entry."""
    return value if assignment.cast is None else value.to(assignment.cast[1])


def live_tensor(target: Target) -> Tensor | None:
    """The tensor that stands now where the target stood when the model was planned."""
    members: Mapping[str, Tensor | None] = (
        target.owner._parameters if target.kind == "parameter" else target.owner._buffers
    )
    return members.get(target.leaf)


class Digests:
    """What an in-memory source gave an entry, kept as checksums: the source itself may train, or be gone, later."""

    def __init__(self) -> None:
        self._known: dict[str, dict[torch.dtype, int]] = {}

    def keep(self, name: str, value: Tensor) -> None:
        # A host that computes in 16 bits casts what we wrote; the checksum of that cast has to be known by then.
        narrower = (torch.bfloat16, torch.float16) if value.dtype in (torch.float32, torch.float64) else ()
        self._known[name] = {dtype: digest(value.to(dtype)) for dtype in (value.dtype, *narrower)}

    def equal(self, name: str, tensor: Tensor) -> bool:
        known = self._known[name]
        if tensor.dtype in known:
            return digest(tensor) == known[tensor.dtype]
        # A cast to a wider type lost nothing: casting back gives what was written.
        written_as = next(iter(known))
        back = tensor.to(written_as)
        return torch.equal(back.to(tensor.dtype), tensor) and digest(back) == known[written_as]

    def __contains__(self, name: str) -> bool:
        return name in self._known


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or -1
    except (RuntimeError, NotImplementedError):
        return -1
