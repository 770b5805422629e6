"""What a request for bytes elsewhere can come to, whatever protocol it goes over."""

from __future__ import annotations

import datetime
import email.utils
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Sink = Callable[[bytes], None]


class TransientError(Exception):
    """A request failed in a way that another try may mend.

    Attributes:
        wait: Seconds that the server asked to wait, or None.
    """

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class RefusedError(Exception):
    """A request failed and would fail again; the message ends with what to do."""


class GoneError(RefusedError):
    """There is no such file."""


class ChangedError(RefusedError):
    """The file is another than it was."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the other side says of a file.

    Attributes:
        size: Its bytes; None where it does not say.
        tag: What is different for every version of the file (ETag, hash, time); "" where it does not say.
        mtime_ns: When the file was written; 0 where it does not say.
        ranges: Whether it gives parts of the file.
    """

    size: int | None
    tag: str
    mtime_ns: int
    ranges: bool

    def check(self, now: Seen) -> None:
        """Compare with what is said now.

        Raises:
            ChangedError: It is another file.
        """
        if None not in {self.size, now.size} and self.size != now.size:
            raise ChangedError(f"had {self.size:,} bytes when it was opened and has {now.size:,} now")
        if self.tag and now.tag and self.tag != now.tag:
            raise ChangedError("was replaced after it was opened")


class Transport(Protocol):
    """One way to one file. Both methods raise `TransientError` or `RefusedError` and nothing else of their own."""

    def fetch(self, start: int, stop: int | None, sink: Sink, since: Seen | None) -> Seen:
        """Ask once for the bytes from `start` to `stop`, or for all of them where `stop` is None.

        `sink` gets them in order, and never more than were asked for; an answer may end too early.

        Args:
            start: The first byte.
            stop: The byte after the last.
            sink: Takes what arrives. What it raises is passed on.
            since: What the file was; raises `ChangedError` before `sink` gets anything of another file.
        """

    def look(self, since: Seen) -> None:
        """Ask whether the file is what it was; raises `ChangedError` if not."""


def nanoseconds(when: object) -> int:
    """A time, however it is spelled, in nanoseconds since 1970; 0 where it is none."""
    try:
        if isinstance(when, str):
            when = email.utils.parsedate_to_datetime(when)
        if isinstance(when, datetime.datetime):
            when = when.timestamp()
        return int(when * 1e9) if isinstance(when, (int, float)) else 0
    except (ValueError, OverflowError):
        return 0
