"""Bytes from elsewhere, patiently: a request that fails is asked again, from where the bytes stopped coming."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from warmstart.checkpoints.remote.http_transport import HttpTransport
from warmstart.checkpoints.remote.store_transport import FileSystemTransport
from warmstart.checkpoints.remote.transports import (
    ChangedError,
    GoneError,
    RefusedError,
    Seen,
    Sink,
    TransientError,
    Transport,
)
from warmstart.errors import CheckpointError
from warmstart.locations import public, scrub

RETRIES: Final = 4
# A long download may meet a fault now and then: what has come buys further tries.
BYTES_PER_RETRY: Final = 64 << 20
BACKOFF_SECONDS = 0.5
LONGEST_WAIT: Final = 30.0

_PIP: Final = {
    "http": "'warmstart[hub]'", "https": "'warmstart[hub]'", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "abfs": "adlfs", "az": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failed:
    """How the last of some tries ended."""

    problem: TransientError | RefusedError
    tries: int


class Remote:
    """One file elsewhere.

    Attributes:
        url: Where, with everything that is secret: never to be shown.
        location: The same without it.
        name: The file's name, fit for a file on this machine.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.location = "".join(c if c.isprintable() else quote(c) for c in public(url))
        self.name = _file_name(self.location)
        self._transport = _reach(url)
        self._progress = Progress(self.name)

    def probe(self, count: int) -> tuple[Seen, bytes]:
        """What the other side says of the file, and its first bytes.

        Raises:
            CheckpointError: There is no such file, or it cannot be had.
        """
        head = bytearray()

        def step() -> Seen:
            head.clear()
            seen = self._transport.fetch(0, count, head.extend, None)
            if seen.size is not None and len(head) < min(count, seen.size):
                raise TransientError(f"the answer ended after {len(head):,} bytes")
            return seen

        seen = self._demand(step)
        return seen, bytes(head)

    def pull(self, start: int, stop: int, sink: Sink, seen: Seen) -> None:
        """Hand the bytes from `start` to `stop` to `sink`, in order and each once.

        Raises:
            CheckpointError: They did not all come, or the file is no longer the one that was seen.
        """
        position = start

        def take(chunk: bytes) -> None:
            nonlocal position
            sink(chunk)
            position += len(chunk)
            self._progress.add(len(chunk))

        def step() -> Seen:
            answer = self._transport.fetch(position, stop, take, seen)
            if position < stop:
                raise TransientError(f"the answer ended at byte {position:,} instead of {stop:,}")
            return answer

        try:
            self._demand(step, lambda: position - start)
        finally:
            self._progress.clear()

    def pull_all(self, sink: Sink, restart: Callable[[], None], seen: Seen) -> None:
        """Hand the whole file to `sink`; `restart` is called whenever it begins anew.

        Raises:
            CheckpointError: It did not come whole, or is no longer the file that was seen.
        """

        def take(chunk: bytes) -> None:
            sink(chunk)
            self._progress.add(len(chunk))

        def step() -> Seen:
            restart()
            return self._transport.fetch(0, None, take, seen)

        try:
            self._demand(step)
        finally:
            self._progress.clear()

    def changed(self, seen: Seen) -> str | None:
        """What changed about the file since it was seen, in words; None if nothing did, or nobody can tell."""

        def step() -> Seen:
            self._transport.look(seen)
            return seen

        # A network that is down says nothing about the file: whoever needs more of its bytes will be told.
        match self._attempt(step, lambda: 0, retries=1):
            case Failed(GoneError()):
                return f"{self.location} is gone"
            case Failed(ChangedError() as problem):
                return f"{self.location} {problem}"
        return None

    def _demand(self, step: Callable[[], Seen], progress: Callable[[], int] = lambda: 0) -> Seen:
        result = self._attempt(step, progress, RETRIES)
        if isinstance(result, Seen):
            return result
        # Raised here and not where it was caught: what lies behind a failed request may hold the URL with its secrets.
        if isinstance(result.problem, ChangedError):
            raise CheckpointError(f"{self.location} {result.problem}; open it again when it is at rest")
        if isinstance(result.problem, RefusedError):
            raise CheckpointError(f"{self.location}: {result.problem}")
        raise CheckpointError(
            f"{self.location}: {result.problem} (the last of {result.tries} tries); check the address and the network and "
            "run it again, or download the file and give its path"
        )

    def _attempt(self, step: Callable[[], Seen], progress: Callable[[], int], retries: int) -> Seen | Failed:
        tries = 0
        while True:
            tries += 1
            try:
                return step()
            except RefusedError as refusal:
                return Failed(refusal, tries)
            except TransientError as fault:
                if tries > retries + progress() // BYTES_PER_RETRY:
                    return Failed(fault, tries)
                wait = fault.wait
            time.sleep(min(BACKOFF_SECONDS * 2 ** min(tries - 1, 4) if wait is None else wait, LONGEST_WAIT))


class Progress:
    """One line on a terminal that says how much has come; silent anywhere else, and for what comes at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bytes = 0
        self._next = time.monotonic() + 0.5
        self._width = 0

    def add(self, count: int) -> None:
        self._bytes += count
        if time.monotonic() < self._next or not sys.stderr.isatty():
            return
        self._next = time.monotonic() + 0.2
        line = f"{self._name}: {self._bytes / 1e6:,.1f} MB fetched"
        self._width = max(self._width, len(line))
        sys.stderr.write(f"\r{line:<{self._width}}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Give the line back to whatever is written next."""
        if self._width:
            sys.stderr.write(f"\r{'':<{self._width}}\r")
            sys.stderr.flush()
            self._width = 0


def _reach(url: str) -> Transport:
    """The way to a file.

    Raises:
        CheckpointError: Nothing here speaks that protocol.
    """
    protocol = re.split("://|::", url, maxsplit=1)[0].lower()
    try:
        return HttpTransport(url, protocol) if protocol in {"http", "https"} else FileSystemTransport(url)
    except ImportError as error:
        said, package = scrub(str(error), url), _PIP.get(protocol)
    except Exception as error:  # a file system's constructor may raise anything
        said, package = f"{type(error).__name__}: {scrub(str(error), url)}", None
    # Raised out here, because the error above may hold the URL with its secrets.
    where = public(url)
    if package is not None:
        raise CheckpointError(f"{where}: {protocol}:// needs another package ({said}): pip install {package}")
    raise CheckpointError(
        f"{where}: cannot be opened by fsspec ({said}); check the URL, or download the file and give its path"
    )


def _file_name(location: str) -> str:
    last = unquote(location.rstrip("/").rpartition("/")[2])
    # A plain .npy array is named by its file, so that the name stays as it is but for what no file may be called.
    return re.sub(r"[^\w.@+ -]", "_", last).strip(". ")[-100:] or "weights"
