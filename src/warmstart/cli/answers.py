"""What a command answers: an exit code, text for people and plain data for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from warmstart.mapping.grouping import printable

_LINE = 20_000  # characters; a line of a table is far shorter, and a hostile one is cut


class Exit(IntEnum):
    """Exit codes. Interrupted by a signal: 128 and its number, as shells have it (130 for Ctrl-C)."""

    OK = 0
    DIFFERS = 1
    USAGE = 2
    UNREADABLE = 3


class UsageError(Exception):
    """What was typed cannot be meant; the message says what to type."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found.

    Attributes:
        text: For people, on as many lines as it takes.
        data: The same as plain JSON types; its keys are stable.
        code: `DIFFERS` where something does not fit, differs, or is not there.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    code: Exit = Exit.OK


def safe(text: str) -> str:
    """Text for a terminal: control characters of names and paths escaped, lines kept."""
    return "\n".join(printable(line, _LINE) for line in text.split("\n"))
