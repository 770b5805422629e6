"""Staged unfreezing: what is released when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from warmstart.errors import MappingError
from warmstart.mapping.hints import did_you_mean
from warmstart.mapping.plan.plan import Plan
from warmstart.patterns import Patterns, PatternSet, as_patterns

UnfreezeUnit = Literal["epoch", "step"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Unit numbers, from 1 on and in order, to the patterns that are released there."""

    stages: dict[int, list[str]]

    @classmethod
    def of(cls, unfreeze: Mapping[int, Patterns]) -> Schedule:
        """The schedule as plain types; YAML and JSON may spell the numbers as strings.

        Raises:
            MappingError: Not a mapping, a number that is none, or less than 1.
        """
        out: dict[int, list[str]] = {}
        if not isinstance(unfreeze, Mapping):
            raise MappingError(f'unfreeze={unfreeze!r}: when, and what, to release: {{1: "encoder"}}')
        for at, patterns in unfreeze.items():
            if not str(at).isdecimal() or int(at) < 1:
                raise MappingError(
                    f'unfreeze={{{at!r}: ...}}: when to release is a whole number from 1 on: {{1: "encoder"}}'
                )
            out[int(at)] = [pattern.text for pattern in as_patterns(patterns, where="unfreeze")]
        return cls(dict(sorted(out.items())))

    @property
    def patterns(self) -> list[str]:
        return [pattern for patterns in self.stages.values() for pattern in patterns]

    def due(self, after: int, until: int) -> list[str]:
        """The patterns whose time comes after one unit and not after another."""
        return [pattern for at, patterns in self.stages.items() if after < at <= until for pattern in patterns]

    def later(self, plan: Plan) -> set[str]:
        """The entries that a plan freezes and the schedule will release.

        Raises:
            MappingError: A pattern matches nothing that this plan freezes.
        """
        scheduled = PatternSet(self.patterns, where="unfreeze")
        frozen = [*plan.freeze, *plan.held_rows]
        later = {name for name in frozen if scheduled.matches(name, plan.targets.entries[name].clean)}
        if unused := scheduled.without_hit():
            raise MappingError(
                f"unfreeze={unused[0].text!r} matches nothing that freeze= freezes{did_you_mean(unused[0].text, frozen)}; "
                "freeze it first: freeze=True, or freeze= with a pattern of it"
            )
        return later


def optional(patterns: list[str]) -> list[str]:
    """The same patterns, none of which has to match anything."""
    return [f"?{pattern.removeprefix('?')}" for pattern in patterns]
