"""What became of every tensor of the model and of every key without an entry, one record each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from warmstart.mapping.buckets import Assignment, Buckets
from warmstart.mapping.derivations import Shape
from warmstart.outcome import Outcome
from warmstart.rendering.replaying import Replay
from warmstart.rendering.statuses import STATUSES, Status
from warmstart.tensors import dtype_name

_OF_KEYS = {"unexpected", "collision", "incomplete", "conversion"}  # problems whose names are keys


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the model.

    Attributes:
        name: As the model spells it.
        status: What became of it.
        keys: The checkpoint keys of its value, as the file spells them; a tied entry has its twin's.
        source: Label of the source they are of; empty if there is none.
        shape: Its shape.
        dtype: Its dtype, and the checkpoint's where it is another.
        how: The rule, conversion or adapter that did it, or why it keeps its own value.
        verified: How its value was compared: `full`, `sample`, `no`; empty if it got none.
        frozen: Whether it is frozen.
    """

    name: str
    status: Status
    keys: tuple[str, ...]
    source: str
    shape: Shape
    dtype: str
    how: str
    verified: str
    frozen: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Unused:
    """One key that gives no entry its value.

    Attributes:
        key: As the file spells it.
        source: Label of the source it is of.
        shape: Its shape.
        dtype: Its dtype.
        why: Why it is not used.
        error: Whether that keeps the plan from being applied.
    """

    key: str
    source: str
    shape: Shape
    dtype: str
    why: str
    error: bool


def entries(plan: Buckets, outcome: Outcome | None, replays: list[Replay]) -> list[Entry]:
    """Every entry, in the model's order."""
    bad = {n: problem.kind for problem in reversed(plan.errors) if problem.kind not in _OF_KEYS for n in problem.names}
    assigned = {a.target: a for a in plan.assignments}
    excluded, frozen = set(plan.excluded), set(plan.freeze)
    out = []
    for name, target in plan.targets.entries.items():
        a, mismatch = assigned.get(name), plan.mismatched.get(name)
        keys: tuple[str, ...] = ()
        source, shape, dtype, verified = "", target.shape, dtype_name(target.dtype), ""
        status: Status
        if a is not None:
            status, how = _status(a), replays[a.part].how(a)
            keys = assigned[a.alias_of].sources if a.alias_of is not None else a.sources
            source, shape, dtype = plan.parts[a.part].pretrained.short_label, a.shape, _dtype(a)
            if a.source_shape != a.shape:
                how += f" from {a.source_shape}"
            if outcome is not None:
                failed = outcome.status == "failed" or outcome.verified == "off"
                verified = "no" if failed else outcome.verified
        elif mismatch is not None:
            status, how, keys = "own init", f"checkpoint has {mismatch.checkpoint_shape}", mismatch.keys
        elif name in excluded:
            status, how = "out of scope", ""
        else:
            status, how = "own init", "no key"
        if name in bad:
            status, how = "error", f"{bad[name]}: {how}" if how else bad[name]
        out.append(Entry(name, status, keys, source, shape, dtype, how, verified, name in frozen))
    return out


def unused(plan: Buckets, replays: list[Replay]) -> list[Unused]:
    """Every key that gives no entry its value, the unexpected first."""
    several = len(plan.parts) > 1
    bad = {name for problem in plan.errors for name in problem.names}
    everything = {t.clean for t in plan.targets.entries.values()} | set(plan.targets.wrapper_own.values())

    def record(item: object, unexpected: bool) -> Unused:
        number, key = item if isinstance(item, tuple) else (0, str(item))
        names = replays[number].names(key)
        if unexpected:
            why = "fits nothing" if key in bad else "fits nothing, allowed"
        elif not replays[number].selects(key):
            why = "not selected"
        elif not plan.targets.transient.isdisjoint(names):
            why = "non-persistent buffer, which the model computes itself"
        elif any(name.rpartition(".")[2] == "_extra_state" for name in names):
            why = "extra state, which is not weights"
        else:
            why = "out of scope" if not everything.isdisjoint(names) else "left out by its module"
        part = plan.parts[number]
        info = part.checkpoint.info(key)
        label = part.pretrained.short_label if several else ""
        return Unused(key, label, info.shape, dtype_name(info.dtype), why, unexpected and key in bad)

    return [record(u, True) for u in plan.unexpected] + [record(i, False) for i in plan.ignored]


def elements(entries: Iterable[Entry]) -> dict[Status, int]:
    """How many elements came to each status; a tied tensor counts once, under the status of the entry that is written."""
    out = dict.fromkeys(STATUSES, 0)
    for entry in entries:
        out[entry.status] += entry.numel * (entry.status != "tied")
    return out


def _status(assignment: Assignment) -> Status:
    if assignment.alias_of is not None:
        return "tied"
    if assignment.fill is not None:
        return "filled"
    return "adapted" if assignment.adapter is not None else "loaded"


def _dtype(assignment: Assignment) -> str:
    if assignment.cast is None:
        return dtype_name(assignment.dtype)
    return " to ".join(map(dtype_name, assignment.cast))
