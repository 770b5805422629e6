"""Files of web servers, asked for over the session that fsspec is configured with."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from warmstart.checkpoints.remote.transports import (
    ChangedError,
    GoneError,
    RefusedError,
    Seen,
    Sink,
    TransientError,
    nanoseconds,
)
from warmstart.errors import CheckpointError
from warmstart.locations import scrub

if TYPE_CHECKING:
    from aiohttp import ClientResponse

# A server that sends nothing for so long has stalled; one that sends less than this much in that time, as good as.
STALL_SECONDS = 30.0
STALL_BYTES: Final = 1024

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class HttpTransport:
    """A file of a web server."""

    def __init__(self, url: str, protocol: str) -> None:
        import fsspec

        self._url = url
        configured: dict[str, Any] = {"trust_env": True}  # proxies and .netrc, as curl does
        for name in ("http", "https"):
            given = fsspec.config.conf.get(name, {}).get("client_kwargs")
            configured |= given if isinstance(given, dict) else {}
        self._fs: Any = fsspec.filesystem(protocol, client_kwargs=configured)

    def fetch(self, start: int, stop: int | None, sink: Sink, since: Seen | None) -> Seen:
        return self._ask(start, stop, sink, since, {})

    def look(self, since: Seen) -> None:
        # The answer to this has no body if nothing changed. HEAD would do, but a signed URL is signed for GET alone.
        name = "If-None-Match" if since.tag.endswith('"') else "If-Modified-Since"
        self._ask(0, 1, lambda _: None, since, {name: since.tag} if since.tag else {})

    def _ask(self, start: int, stop: int | None, sink: Sink, since: Seen | None, more: dict[str, str]) -> Seen:
        from fsspec.asyn import sync

        try:
            seen: Seen = sync(self._fs.loop, self._get, start, stop, sink, since, more)
        except (CheckpointError, TransientError, RefusedError):
            raise
        except Exception as error:  # whatever the client, its connector or a configured session raises
            raise self._meaning(error) from None
        return seen

    async def _get(self, start: int, stop: int | None, sink: Sink, since: Seen | None, more: dict[str, str]) -> Seen:
        from aiohttp import ClientTimeout

        options = dict(self._fs.kwargs)
        # A compressed answer has other bytes than the file, and parts of it mean nothing.
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity", **more}
        if stop is not None:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        options.setdefault("timeout", ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS))
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(self._url), headers=headers, **options) as answer:
            if answer.status == 304 and since is not None:
                return since
            if answer.status not in {200, 206}:
                raise _by_status(answer.status, answer.headers)
            seen = _described(answer, start)
            if since is not None:
                since.check(seen)
            if answer.status == 200 and start > 0:
                raise TransientError("the server sent the whole file where a part was asked for")
            await _receive(answer, None if stop is None else stop - start, sink)
            return seen

    def _meaning(self, error: Exception) -> Exception:
        import aiohttp

        said = scrub(str(error), self._url)[:200]
        if isinstance(error, TimeoutError):
            return TransientError(f"the server sent nothing for {STALL_SECONDS:g} seconds")
        if isinstance(error, aiohttp.TooManyRedirects):
            return RefusedError("it redirects in a circle; check the URL")
        if isinstance(error, aiohttp.ClientResponseError) and error.headers is not None:
            return _by_status(error.status, error.headers)
        if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch)):
            return RefusedError(f"its certificate is not trusted ({said}); check the address")
        if isinstance(error, aiohttp.ClientConnectorError):
            return TransientError(f"the server cannot be reached ({scrub(str(error.os_error), self._url)[:200]})")
        if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, aiohttp.ClientResponseError)):
            return TransientError(f"the connection was cut or the answer is no HTTP ({type(error).__name__})")
        if isinstance(error, OSError):
            return TransientError(f"the connection failed ({said or type(error).__name__})")
        return RefusedError(f"cannot be asked for ({type(error).__name__}: {said}); check the URL")


async def _receive(answer: ClientResponse, limit: int | None, sink: Sink) -> None:
    received, then, at_then = 0, time.monotonic(), 0
    async for chunk in answer.content.iter_any():
        wanted = chunk if limit is None else chunk[: limit - received]
        received += len(wanted)
        if wanted:
            sink(wanted)
        if len(wanted) < len(chunk):  # the whole file where its start was asked for
            return
        if (now := time.monotonic()) - then > STALL_SECONDS:
            if received - at_then < STALL_BYTES:
                raise TransientError(f"the server sent {received - at_then:,} bytes in {now - then:.0f} seconds")
            then, at_then = now, received
    size = _length(answer)
    if limit is None and size is not None and received != size:
        raise TransientError(f"the answer ended after {received:,} of {size:,} bytes")


def _described(answer: ClientResponse, start: int) -> Seen:
    headers = answer.headers
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    mtime_ns = nanoseconds(headers.get("Last-Modified"))
    if answer.status == 200:
        return Seen(_length(answer), tag, mtime_ns, ranges=False)
    match = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start:
        raise RefusedError(
            "the server answered with another part of the file than was asked for; download it and give its path"
        )
    whole = match[3] != "*" and not _encoded(answer)
    return Seen(int(match[3]) if whole else None, tag, mtime_ns, ranges=whole)


def _length(answer: ClientResponse) -> int | None:
    return None if _encoded(answer) else answer.content_length


def _encoded(answer: ClientResponse) -> bool:
    return answer.headers.get("Content-Encoding", "identity").lower() not in {"identity", ""}


def _by_status(status: int, headers: Mapping[str, str]) -> Exception:
    if status in {404, 410}:
        return GoneError(f"the server has no such file ({status}); check the URL")
    if status in {401, 403, 407}:
        return RefusedError(
            f"access was refused ({status}); check the URL and the token or password that belongs to it"
        )
    if status == 416:
        return ChangedError("has no bytes where some were asked for (416): it is empty, or shorter than it was")
    if status in {408, 425, 429} or status >= 500:
        wait = headers.get("Retry-After", "")
        return TransientError(f"the server answered with status {status}", float(wait) if wait.isdecimal() else None)
    return RefusedError(f"the server answered with status {status}; check the URL")
