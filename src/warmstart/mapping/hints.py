"""What an error adds to help: the nearest name, the line to paste."""

from __future__ import annotations

import glob
from collections.abc import Collection

from warmstart.mapping.buckets import Problem
from warmstart.mapping.grouping import pasteable, printable
from warmstart.mapping.model.targets import Targets
from warmstart.patterns import PatternSet, nearest

GUESSES = 8  # rules for which the nearest names are looked up: it costs more than planning itself


def report_unused(patterns: PatternSet, names: Collection[str], what: str, errors: list[Problem]) -> None:
    for number, pattern in enumerate(patterns.without_hit()):
        near = did_you_mean(pattern.text, names) if number < GUESSES else ""
        message = (
            f"{patterns.where}={pattern.text!r} matches no {what}{near}; leave it out, or start it with '?' if it may "
            "match nothing"
        )
        errors.append(Problem("unused", message, (pattern.text,)))


def did_you_mean(text: str, names: Collection[str]) -> str:
    near = [glob.escape(name) if name == text else name for name in nearest(text, names)]
    return f" (did you mean {' or '.join(repr(printable(name)) for name in near)}?)" if near else ""


def paste(field_name: str, names: Collection[str], targets: Targets) -> str:
    """The line to type for these entries, whose names are printed without wrapper segments."""
    chosen = set(names)
    others = [t.clean for name, t in targets.entries.items() if name not in chosen]
    return pasteable(field_name, [targets.entries[name].clean for name in names], others)
