"""The bytes of a remote file on this machine: each is fetched once, and half a file never passes for a whole one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from warmstart.checkpoints.files import FileStamp
from warmstart.checkpoints.remote.caching import private_folder, shared_folder
from warmstart.checkpoints.remote.fetching import Remote
from warmstart.checkpoints.remote.transports import Seen
from warmstart.errors import CheckpointError

PIECE: Final = 16 << 20
LOCK_SECONDS: Final = 120
_RECORD: Final = re.compile(rb"^(\d{1,19}) (\d{1,19}) ([0-9a-f]{8})$", re.MULTILINE)

Range = tuple[int, int]


class Spool:
    """A remote file, of which parts are here.

    The parts lie in `NAME.part`, each at its own place; `NAME.ranges` lists them with their checksums, so that another
    process, or the next run, can take them over. The whole file gets its own name, in one step. Several processes may do
    all of this at once: they take turns where locks work, and where not they write the same bytes to the same places.

    Attributes:
        remote: Where the bytes come from.
        seen: What the file was when it was opened.
        path: Where the whole file lies, once it is here.
        is_whole: Whether it is.
    """

    def __init__(self, remote: Remote, seen: Seen) -> None:
        self.remote = remote
        self.seen = seen
        self.size = seen.size or 0
        # What cannot be told from its next version is not kept for the next run.
        folder = shared_folder(remote.url, seen) if seen.tag else None
        if folder is None:
            folder = private_folder(remote.location)
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.path = folder / remote.name
        self.is_whole = False
        self._part = folder / f"{remote.name}.part"
        self._ledger = folder / f"{remote.name}.ranges"
        self._file: FileIO | None = None
        self._have: list[Range] = []
        self._turn = threading.Lock()
        with self.naming_the_folder():
            if not self._adopt_whole():
                handle = os.open(self._part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
                self._use(os.fdopen(handle, "r+b", buffering=0))

    @property
    def stamp(self) -> FileStamp:
        return FileStamp(self.path, self.size, self.seen.mtime_ns)

    def keep(self, head: bytes) -> None:
        """Take over the file's first bytes, which came when it was looked at."""
        if not self.is_whole:
            with self.naming_the_folder():
                self.write(0, head)
            self._have = _joined([*self._have, (0, len(head))])

    def take(self, start: int, stop: int, alignment: int) -> Tensor:
        """The bytes from `start` to `stop`, fetched if they are not here yet.

        Raises:
            CheckpointError: They cannot be had.
        """
        with self.naming_the_folder():
            if not self.is_whole and _gaps(self._have, start, stop):
                with self._alone():
                    self._fill(start, stop)
            # A copy and no mapping: a cache that is cleared meanwhile must not kill the process.
            raw = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
            view = memoryview(raw.numpy().data)
            if (count := self._read(start, view)) < len(view):
                raise CheckpointError(
                    f"{self.remote.location}: its copy on this machine ends at byte {start + count:,}, before {stop:,}: "
                    f"something cut it; delete the folder {self.path.parent} and run this again"
                )
        return raw

    def whole(self) -> Path:
        """The file itself, all of its bytes.

        Raises:
            CheckpointError: They cannot be had.
        """
        if not self.is_whole:
            with self.naming_the_folder(), self._alone():
                if self.seen.ranges:
                    self._fill(0, self.size)
                    if not self.is_whole:
                        self._promote(self._part)
                        self._ledger.unlink(missing_ok=True)
                elif not self._adopt_whole():
                    self._promote(self._stream())
        return self.path

    def sha256(self) -> str:
        """The digest of the whole file, every byte of which is fetched for it.

        Raises:
            CheckpointError: They cannot be had.
        """
        with self.naming_the_folder(), self.whole().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, position: int, chunk: bytes) -> None:
        """Put bytes in their place; they count as here once they are recorded."""
        view = memoryview(chunk)
        with self._turn:
            file = self._opened()
            file.seek(position)
            while view:
                view = view[file.write(view) :]

    def record(self, start: int, stop: int, crc: int) -> None:
        """Count bytes as here, for this process and for others."""
        # If somebody clears the cache meanwhile, the open file is still here and only others will have to fetch again.
        with contextlib.suppress(OSError), self._ledger.open("ab", buffering=0) as ledger:
            # A line of its own, even after one that was cut short when its process was killed.
            ledger.write(b"\n%d %d %08x\n" % (start, stop, crc))
        self._have = _joined([*self._have, (start, stop)])

    def _fill(self, start: int, stop: int) -> None:
        if self._adopt_whole():
            return
        self._adopt_parts(start, stop)
        for first, last in _gaps(self._have, start, stop):
            recorder = Recorder(self, first)
            try:
                self.remote.pull(first, last, recorder.take, self.seen)
            finally:
                recorder.close()

    def _adopt_parts(self, start: int, stop: int) -> None:
        """Take over what others have fetched, where it is still what its checksum says: machines lose power."""
        try:
            records = _RECORD.findall(self._ledger.read_bytes())
        except FileNotFoundError:
            return
        for first, last, crc in ((int(a), int(b), int(c, 16)) for a, b, c in records):
            wanted = any(a < last and first < b for a, b in _gaps(self._have, start, stop))
            if wanted and first < last <= self.size and self._checksum(first, last) == crc:
                self._have = _joined([*self._have, (first, last)])

    def _adopt_whole(self) -> bool:
        """Take over the whole file, if it is here."""
        try:
            file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            return False
        size = os.fstat(file.fileno()).st_size
        if self.seen.size not in {None, size}:
            file.close()
            return False
        self._use(file)
        self.size, self.is_whole = size, True
        return True

    def _use(self, file: FileIO) -> None:
        if self._file is not None:
            self._file.close()
        self._file = file
        weakref.finalize(self, file.close)

    def _stream(self) -> Path:
        # Never into the part, to which another process may be writing where locks do not work.
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".download-")
        try:
            with os.fdopen(handle, "wb") as out:

                def restart() -> None:
                    out.seek(0)
                    out.truncate()

                def sink(chunk: bytes) -> None:
                    with self.naming_the_folder():
                        out.write(chunk)

                self.remote.pull_all(sink, restart, self.seen)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)

    def _promote(self, file: Path) -> None:
        """Give a complete file its name."""
        if self._file is not None:
            self._file.close()  # a file that is open cannot be renamed everywhere
        with contextlib.suppress(FileNotFoundError):  # another process was faster, where locks do not work
            with file.open("r+b") as written:
                os.fsync(written.fileno())
            if self.seen.mtime_ns > 0:
                os.utime(file, ns=(self.seen.mtime_ns, self.seen.mtime_ns))
            os.replace(file, self.path)
        if not self._adopt_whole():
            raise OSError(f"its copy has another size than {self.size:,} bytes")

    def _checksum(self, start: int, stop: int) -> int:
        crc, buffer = 0, bytearray(min(stop - start, 1 << 20))
        while start < stop:
            count = self._read(start, memoryview(buffer)[: stop - start])
            if not count:
                return -1
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
            start += count
        return crc

    def _read(self, start: int, into: memoryview) -> int:
        done = 0
        with self._turn:
            file = self._opened()
            file.seek(start)
            while done < len(into) and (count := file.readinto(into[done:])):
                done += count
        return done

    def _opened(self) -> FileIO:
        assert self._file is not None
        return self._file

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Take turns with the other processes of this machine, so that each byte is fetched by one of them."""
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.path}.lock")
        # Some network file systems know no locks: then a byte may be fetched twice, and nothing worse.
        with contextlib.suppress(OSError, NotImplementedError):
            while not lock.is_locked:
                before = self._state()
                try:
                    lock.acquire(timeout=LOCK_SECONDS)
                except Timeout:
                    if self._state() == before:  # whoever holds it does nothing
                        break
        try:
            yield
        finally:
            lock.release()

    def _state(self) -> list[tuple[str, int, int]]:
        files = ((file.name, file.stat()) for file in self.path.parent.iterdir())
        return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)

    @contextlib.contextmanager
    def naming_the_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.remote.location}: cannot be kept in {self.path.parent} ({error.strerror or error}); make room there, "
                "or name another folder: export WARMSTART_CACHE=/path/with/room"
            ) from error


class Recorder:
    """Writes bytes that arrive in order to their place in a spool, and counts them piece by piece."""

    def __init__(self, spool: Spool, start: int) -> None:
        self._spool = spool
        self._start = self._stop = start
        self._crc = 0
        self._closed = False

    def take(self, chunk: bytes) -> None:
        if self._closed:  # by an interrupt, while the request goes on in fsspec's own thread
            raise CheckpointError("nobody waits for these bytes any more")
        # Named here: farther out it would be taken for a fault of the network.
        with self._spool.naming_the_folder():
            self._spool.write(self._stop, chunk)
            self._crc = zlib.crc32(chunk, self._crc)
            self._stop += len(chunk)
            if self._stop - self._start >= PIECE:
                self._flush()

    def close(self) -> None:
        """Count what has come, all of it or not: the next try goes on from there."""
        self._closed = True
        self._flush()

    def _flush(self) -> None:
        if self._stop > self._start:
            self._spool.record(self._start, self._stop, self._crc)
        self._start, self._crc = self._stop, 0


def _joined(ranges: Sequence[Range]) -> list[Range]:
    out: list[Range] = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], stop)
        else:
            out.append((start, stop))
    return out


def _gaps(have: Sequence[Range], start: int, stop: int) -> list[Range]:
    out = []
    for first, last in have:
        if first >= stop:
            break
        if last <= start:
            continue
        if first > start:
            out.append((start, first))
        start = max(start, last)
    if start < stop:
        out.append((start, stop))
    return out
