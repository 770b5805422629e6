"""Files of object stores, and of anything else that fsspec has a file system for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from warmstart.checkpoints.remote.transports import GoneError, RefusedError, Seen, Sink, TransientError, nanoseconds
from warmstart.errors import CheckpointError
from warmstart.locations import scrub

STEP: Final = 16 << 20

# What an object store may say of a file that is different for every version of it.
_IDENTITY: Final = ("ETag", "etag", "md5Hash", "Content-MD5", "generation", "VersionId", "version_id", "LastModified",
                    "last_modified", "mtime", "updated", "created")  # fmt: skip
_TIMES: Final = ("LastModified", "last_modified", "mtime", "updated", "created")


class FileSystemTransport:
    """A file of some file system."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self._url = url
        self._fs: Any
        self._fs, self._path = url_to_fs(url)

    def fetch(self, start: int, stop: int | None, sink: Sink, since: Seen | None) -> Seen:
        return self._guarded(lambda: self._fetch(start, stop, sink, since))

    def look(self, since: Seen) -> None:
        since.check(self._guarded(self._info))

    def _fetch(self, start: int, stop: int | None, sink: Sink, since: Seen | None) -> Seen:
        seen = self._info()
        if since is not None:
            since.check(seen)
        if seen.size is None:
            self._stream(stop, sink)
            return seen
        position, end = start, seen.size if stop is None else min(stop, seen.size)
        while position < end:
            chunk = self._fs.cat_file(self._path, start=position, end=min(position + STEP, end))
            # A file that is replaced while it is read would give parts of two: ask again before any of it is taken.
            if since is not None:
                since.check(self._info())
            if not chunk:
                raise TransientError(f"nothing came at byte {position:,} of {seen.size:,}")
            sink(chunk[: end - position])
            position += len(chunk)
        return seen

    def _stream(self, stop: int | None, sink: Sink) -> None:
        with self._fs.open(self._path, "rb") as file:
            left = stop
            while left is None or left > 0:
                chunk = file.read(STEP if left is None else min(left, STEP))
                if not chunk:
                    return
                sink(chunk)
                left = None if left is None else left - len(chunk)

    def _info(self) -> Seen:
        self._fs.invalidate_cache()
        info = self._fs.info(self._path)
        if info.get("type") == "directory":
            raise RefusedError("is a folder; give the file in it that holds the weights")
        size = info.get("size")
        times = (nanoseconds(info.get(name)) for name in _TIMES)
        return Seen(
            size=size if isinstance(size, int) else None,
            tag="|".join(f"{name}={info[name]}" for name in _IDENTITY if info.get(name)),
            mtime_ns=next((t for t in times if t), 0),
            ranges=isinstance(size, int),
        )

    def _guarded(self, step: Callable[[], Seen]) -> Seen:
        try:
            return step()
        except (CheckpointError, TransientError, RefusedError):
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise GoneError("there is no such file; check the URL") from None
        except PermissionError as error:
            raise RefusedError(
                f"access was refused ({self._said(error)}); check the credentials of this machine"
            ) from None
        except (OSError, EOFError) as error:
            raise TransientError(f"reading failed ({self._said(error)})") from None
        except Exception as error:  # every store has its own types
            raise RefusedError(f"cannot be read ({self._said(error)}); check the URL and the credentials") from None

    def _said(self, error: Exception) -> str:
        return f"{type(error).__name__}: {scrub(str(error), self._url)[:200]}"
