"""The value an entry should have: read from the source, cast as planned, cast again as the host casts later."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from warmstart.checkpoints.files import Place
from warmstart.mapping.buckets import Assignment
from warmstart.mapping.derivations import Derivation
from warmstart.mapping.plan.plan import Plan
from warmstart.shards import Region, Shard, local_of
from warmstart.tensors import digest, same_bits


class Values:
    """Reads a plan's values one at a time; of a conversion, what it makes is kept until another one is asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._copies: dict[tuple[int, str], Tensor] = {}
        self._made: tuple[Derivation | None, list[Tensor]] = (None, [])

    def secure(self) -> None:
        """Copy what writing could change before it is read.

        A source in memory may share storage with the model it is loaded into, so that writing one entry would change the
        source of another.
        """
        if all(part.checkpoint.files for part in self.plan.parts):
            return
        spans = Spans(local_of(self.plan.targets.entries[a.target].tensor) for a in self.plan.written)
        for assignment in self.plan.written:
            checkpoint = self.plan.parts[assignment.part].checkpoint
            if checkpoint.files:
                continue
            for key in assignment.sources:
                tensor = checkpoint.read(key)
                itself = _same_memory(tensor, local_of(self.plan.targets.entries[assignment.target].tensor))
                if not (itself and assignment.conversion is None and assignment.adapter is None) and spans.meet(tensor):
                    self._copies[assignment.part, key] = tensor.clone()

    def source(self, assignment: Assignment, region: Region | None = None) -> Tensor:
        """What the checkpoint, or the conversion, gives: on the CPU, in its own shape and dtype.

        Args:
            assignment: What is asked for.
            region: Of an entry without an adapter, the part that is wanted; no more of the checkpoint is read where it can
                be given as it lies there.
        """
        if region is None:
            return self._whole(assignment)
        if assignment.fill is None and assignment.conversion is None:
            part, key = assignment.part, assignment.sources[0]
            return region.read(lambda index: self._read(part, key, index))
        return region.take(self._whole(assignment))

    def _whole(self, assignment: Assignment) -> Tensor:
        if assignment.fill is not None:
            with torch.device("cpu"):
                value = torch.tensor(assignment.fill, dtype=torch.float64).to(assignment.dtype)
                return value.expand(assignment.shape)
        if assignment.conversion is None:
            return self._read(assignment.part, assignment.sources[0])
        if self._made[0] is not assignment.conversion:
            made, keys = assignment.conversion, assignment.conversion.sources
            self._made = (None, [])  # frees what the one before made
            with torch.device("cpu"), torch.no_grad():
                self._made = (made, made.run(lambda i: self._read(assignment.part, keys[i])))
        return self._made[1][assignment.output]

    def planned(self, assignment: Assignment, current: Shard) -> Tensor:
        """What an entry that holds `current` should hold here, in the dtype the plan gives it, on the CPU."""
        return as_planned(self.needed(assignment, current), assignment, current)

    def place(self, assignment: Assignment, current: Shard, *, unborn: bool = False) -> Place | None:
        """Where in a file the bytes lie that `current` should hold, to be moved as they are.

        None where the value is made for the entry, or where the entry is more than a piece of memory, or has none: unless it
        is `unborn`, which is to get some.
        """
        if assignment.adapter or assignment.conversion or assignment.fill is not None or assignment.cast is not None:
            return None
        tensor, key = current.local, assignment.sources[0]
        if tensor.is_meta is not unborn or not _is_plain(tensor):
            return None
        if tensor.dtype != assignment.dtype or current.shape != assignment.shape:
            return None
        checkpoint = self.plan.parts[assignment.part].checkpoint
        place = checkpoint.place(key) if (assignment.part, key) not in self._copies else None
        if place is None or not tensor.numel():
            return None
        if current.region is not None:
            run = current.region.run(current.shape)
            if run is None:
                return None
            start, stop = (place.start + at * tensor.element_size() for at in run)
            place = Place(place.file, start, stop)
        checkpoint.bytes_read += place.stop - place.start
        return place

    def needed(self, assignment: Assignment, current: Shard) -> Tensor:
        """What of the source `as_planned` makes the value from: all of it for an adapter, else what is held here."""
        return self.source(assignment, current.region if assignment.adapter is None else None)

    def _read(self, part: int, key: str, index: tuple[slice, ...] | None = None) -> Tensor:
        copy = self._copies.get((part, key))
        if copy is not None:
            return copy if index is None else copy[index]
        return self.plan.parts[part].checkpoint.read(key, index)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in {Tensor, nn.Parameter}
        and tensor.device.type in {"cpu", "cuda", "meta"}
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())  # whose memory holds other bits than its values
    )


def duplicates(plan: Plan) -> Iterator[tuple[Assignment, Assignment]]:
    """Pairs of assignments that give one tied tensor a value each, from different keys."""
    first: dict[str, Assignment] = {}
    for assignment in plan.assignments:
        if assignment.alias_of is None:
            other = first.setdefault(plan.targets.entries[assignment.target].canonical, assignment)
            if other is not assignment:
                yield other, assignment


def as_planned(source: Tensor, assignment: Assignment, current: Shard) -> Tensor:
    """What an entry that holds `current` gets from `Values.needed`: adapted, and in the dtype the plan gives it."""
    if assignment.adapter is None:
        return source.to(assignment.dtype)
    own = current.local.detach().to(assignment.dtype)
    with torch.device("cpu"), torch.no_grad():
        if current.region is None:
            return assignment.adapter.apply(source, own)
        # What the entry keeps is put in again below: no rank needs what the others hold.
        whole = assignment.adapter.apply(source, torch.zeros((), dtype=assignment.dtype).expand(current.shape))
        value = current.region.take(whole)
        loaded = loaded_here(assignment, current) if assignment.keeps else None
        return value if loaded is None else torch.where(loaded, value, own.cpu())


def loaded_here(assignment: Assignment, current: Shard) -> Tensor | None:
    """`Assignment.loaded` of what is held here: booleans that broadcast to it."""
    loaded = assignment.loaded
    if loaded is None or current.region is None:
        return loaded
    return current.region.take(loaded.expand(current.shape))


class Digests:
    """What an in-memory source gave an entry, kept as checksums: the source itself may train, or be gone, later."""

    def __init__(self) -> None:
        self._known: dict[str, dict[torch.dtype, int]] = {}
        self._masks: dict[str, Tensor] = {}

    def keep(self, name: str, value: Tensor, mask: Tensor | None = None) -> None:
        """Remember a value; with a mask, where it is True: the rest is the model's own."""
        if mask is not None:
            self._masks[name] = mask
            value = value.masked_fill(~mask, 0)
        # A host that computes in 16 bits casts what we wrote; the checksum of that cast has to be known by then.
        wide = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        narrower = wide[wide.index(value.dtype) + 1 :] if value.dtype in wide[:2] else ()
        self._known[name] = {value.dtype: digest(value)} | {dtype: digest(value, dtype) for dtype in narrower}

    def equal(self, name: str, tensor: Tensor) -> bool:
        known = self._known[name]
        if name in self._masks:
            tensor = tensor.detach().cpu().masked_fill(~self._masks[name], 0)
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
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
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
