"""What planning one source alone decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.buckets import Mismatch, Part, Problem
from warmstart.mapping.keys import Key


@dataclass(slots=True)
class PartPlan:
    """Where one source's keys go.

    Attributes:
        part: The source, its rules, its prefix and its scope.
        assigned: Entry to the key that gives it its value.
        adapters: Entry to the adapter that brings its value into shape.
        filled: Entry to the constant it gets.
        excused: Entries without a key that their module does not miss.
        reshaped: Entries that take the shape of what they get, as their module's own loading has it.
        mismatched: Entries whose key has another shape.
        unexpected: Keys that fit nothing, as the file spells them.
        ignored: Keys left out on purpose, as the file spells them.
        reported: Keys among the unexpected, and entries among the mismatched, that an error of their own names already.
        dangling: Outputs of conversions that fit nothing, although others of the same conversion do.
        hint: The prefix that would fit better than the one given, as a line to type; empty if there is none.
    """

    part: Part
    assigned: dict[str, Key] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    filled: dict[str, float] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    reshaped: set[str] = field(default_factory=set)
    mismatched: dict[str, Mismatch] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    errors: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reported: set[str] = field(default_factory=set)
    dangling: list[Key] = field(default_factory=list)
    hint: str = ""

    def problem(self, kind: str, message: str, names: tuple[str, ...] = ()) -> None:
        self.errors.append(Problem(kind, message, names))
