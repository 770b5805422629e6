"""The value an entry should have: read from the source, cast as planned, cast again as the host casts later."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from warmstart.mapping.buckets import Assignment
from warmstart.mapping.plan import Plan
from warmstart.tensors import digest, same_bits


class Values:
    """Reads a plan's values one at a time.

    A source in memory may share storage with the model it is loaded into, so that writing one entry would change the
    source of another: those tensors are copied when the object is made, before anything is written.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._copies: dict[tuple[int, str], Tensor] = {}
        spans = Spans(plan.targets.entries[a.target].tensor for a in written(plan))
        for assignment in written(plan):
            checkpoint = plan.parts[assignment.part].checkpoint
            if checkpoint.files:
                continue
            tensor = checkpoint.read(assignment.sources[0])
            itself = _same_memory(tensor, plan.targets.entries[assignment.target].tensor)
            if not itself and spans.meet(tensor):
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


class Digests:
    """What an in-memory source gave an entry, kept as checksums: the source itself may train, or be gone, later."""

    def __init__(self) -> None:
        self._known: dict[str, dict[torch.dtype, int]] = {}

    def keep(self, name: str, value: Tensor) -> None:
        # A host that computes in 16 bits casts what we wrote; the checksum of that cast has to be known by then.
        wide = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        narrower = wide[wide.index(value.dtype) + 1 :] if value.dtype in wide[:2] else ()
        self._known[name] = {dtype: digest(value.to(dtype)) for dtype in (value.dtype, *narrower)}

    def equal(self, name: str, tensor: Tensor) -> bool:
        known = self._known[name]
        if tensor.dtype in known:
            return digest(tensor) == known[tensor.dtype]
        # A cast to a wider type lost nothing: casting back gives what was written.
        written_as = next(iter(known))
        back = tensor.to(written_as)
        return same_bits(back.to(tensor.dtype), tensor) and digest(back) == known[written_as]

    def __contains__(self, name: str) -> bool:
        return name in self._known


def span(tensor: Tensor) -> tuple[int, int]:
    """The bytes from a tensor's first to past its last element."""
    if not tensor.numel() or tensor.layout != torch.strided or tensor.device.type == "meta":
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


class Spans:
    """The memory that tensors lie in, merged and sorted, so that a question costs a bisection."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(span(tensor) for tensor in tensors):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            elif end > start:
                self._starts.append(start)
                self._ends.append(end)

    def meet(self, tensor: Tensor) -> bool:
        start, end = span(tensor)
        at = bisect.bisect_left(self._starts, end) - 1
        return at >= 0 and start < self._ends[at] and end > start


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return span(a) == span(b) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
