"""Weights behind URLs, read from a real server on this machine that counts its bytes and fails when told to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

import warmstart
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.checkpoints.remote import caching, fetching, http_transport
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

STALL = 0.4


@functools.lru_cache
def tag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class Server:
    """Files over HTTP.

    Attributes:
        files: Path to contents.
        moved: Path to the path that it redirects to.
        faults: What the next requests meet, one each: `503`, `cut 100` (the connection ends after 100 bytes), `stall 100`,
            `short 100` (an honest answer with fewer bytes than asked for), `lie 100` (a Content-Length that is 100 bytes less
            than what is sent), `302 /path`, `swap` (`swaps` take the place of files); `ok` meets nothing.
        ranges, etags, dates, lengths: Whether it gives parts, tells versions apart by tag and by date, and says sizes.
        requests: Of each request the path with its query, and the range that was asked for.
        sent: Bytes of files that were sent.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.swaps: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.faults: list[str] = []
        self.ranges = self.etags = self.dates = self.lengths = True
        self.requests: list[tuple[str, str]] = []
        self.agents: list[str | None] = []
        self.sent = 0
        self.counting = threading.Lock()
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each small answer waits 40 ms for an acknowledgement

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    server.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.http.server_address[1])

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(5)

    def count(self) -> int:
        """Bytes sent since this was last asked."""
        sent, self.sent = self.sent, 0
        return sent

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.closing.is_set():
            handler.close_connection = True
            return None
        path = handler.path.partition("?")[0]
        asked = handler.headers.get("Range", "")
        self.requests.append((handler.path, asked))
        self.agents.append(handler.headers.get("Authorization"))
        kind, _, detail = (self.faults.pop(0) if self.faults else "ok").partition(" ")
        data = self.files.get(path)
        if kind == "swap":
            self.files |= self.swaps
            data = self.files.get(path)
        if kind == "302" or path in self.moved:
            return self.head(handler, 302, {"Location": self.moved.get(path, detail), "Content-Length": "0"})
        if kind.isdecimal() or data is None:
            headers = {"Content-Length": "0"} | ({"Retry-After": detail} if detail else {})
            return self.head(handler, int(kind) if kind.isdecimal() else 404, headers)
        headers = {"ETag": tag_of(data)} if self.etags else {}
        if self.dates:
            headers["Last-Modified"] = formatdate(1_700_000_000 + len(data), usegmt=True)
        if headers.get("ETag") == handler.headers.get("If-None-Match", ""):
            return self.head(handler, 304, headers)
        status, start, stop = 200, 0, len(data)
        if self.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)):
            status, start, stop = 206, int(match[1]), min(int(match[2]) + 1, len(data))
            if start >= len(data):
                return self.head(handler, 416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
            if kind == "short":
                stop = min(stop, start + int(detail))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        body = data[start:stop]
        if self.lengths:
            headers["Content-Length"] = str(len(body) - (int(detail) if kind == "lie" else 0))
        else:
            headers["Connection"] = "close"
        self.head(handler, status, headers)
        if kind in {"cut", "stall"}:
            body = body[: int(detail)]
        with self.counting:  # before it is sent, so that who has the bytes finds them counted
            self.sent += len(body)
        handler.wfile.write(body)
        handler.wfile.flush()
        if kind == "stall":
            self.closing.wait(30)
        if kind in {"cut", "stall"} or not self.lengths:
            handler.close_connection = True
        return None

    def head(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("WARMSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "BACKOFF_SECONDS", 0.01)
    # Only where a server is to stall: a busy machine must not pass for one.
    monkeypatch.setattr(http_transport, "STALL_SECONDS", STALL if "stall" in request.node.name else 20.0)


def weights(blocks: int = 24, width: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    out = {}
    for i in range(blocks):
        out[f"blocks.{i}.weight"] = torch.randn(width, width, generator=generator)
        out[f"blocks.{i}.bias"] = torch.randn(width, generator=generator)
    return out


class Blocks(nn.Module):
    def __init__(self, count: int = 24, width: int = 40) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def as_safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def assert_equal(checkpoint: warmstart.Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.keys()) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(checkpoint.read(key), tensor), key


def everything_said(error: BaseException) -> str:
    """An error with all that is chained to it, shown or not."""
    text, queue, seen = "", [error], set()
    while queue:
        e = queue.pop()
        if e is not None and id(e) not in seen:
            seen.add(id(e))
            text += "".join(traceback.format_exception(e)) + repr(e)
            queue += [e.__cause__, e.__context__]  # type: ignore[list-item]
    return text


def test_opening_fetches_the_header_and_reading_each_tensor_s_own_bytes(server: Server) -> None:
    tensors = weights()
    data = server.files["/w.safetensors"] = as_safetensors(tensors)
    checkpoint = open_checkpoint(server.url("/w.safetensors"))
    assert server.count() == header_bytes(data)
    assert checkpoint.format == "safetensors"
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.location == server.url("/w.safetensors")
    assert checkpoint.files[0].size == len(data)
    assert checkpoint.files[0].path.name == "w.safetensors"

    assert same_bits(checkpoint.read("blocks.7.weight"), tensors["blocks.7.weight"])
    assert server.count() == 40 * 40 * 4
    assert same_bits(checkpoint.read("blocks.7.weight"), tensors["blocks.7.weight"])
    assert server.count() == 0
    assert same_bits(checkpoint.read("blocks.8.weight", slice(3, 5)), tensors["blocks.8.weight"][3:5])
    assert server.count() == 2 * 40 * 4
    assert_equal(checkpoint, tensors)
    assert server.count() == len(data) - header_bytes(data) - 40 * 40 * 4 - 2 * 40 * 4


@pytest.mark.parametrize("verify", ["full", "off"])
def test_a_load_of_one_block_of_24_fetches_that_block(verify: Any, server: Server) -> None:
    tensors = weights()
    data = server.files["/w.safetensors"] = as_safetensors(tensors)
    model = Blocks()
    report = warmstart.load(model, server.url("/w.safetensors"), select="blocks.3", include="blocks.3", verify=verify)
    assert report.status == "applied"
    assert same_bits(model.blocks[3].weight.detach(), tensors["blocks.3.weight"])
    assert server.count() == header_bytes(data) + (40 * 40 + 40) * 4

    assert report.check(model) is None  # reads the source once more
    assert server.count() == 0


def test_a_load_into_a_submodule_fetches_what_it_needs(server: Server) -> None:
    tensors = weights()
    data = server.files["/w.safetensors"] = as_safetensors(tensors)
    model = nn.ModuleDict({"encoder": nn.Linear(40, 40), "head": nn.Linear(40, 2)})
    warmstart.load(model, server.url("/w.safetensors"), into="encoder", select="blocks.23", strip_prefix="blocks.23")
    assert same_bits(model["encoder"].weight.detach(), tensors["blocks.23.weight"])
    assert server.count() == header_bytes(data) + (40 * 40 + 40) * 4


def test_a_file_url_is_the_file(tmp_path: Path) -> None:
    tensors = weights()
    path = tmp_path / "a file.safetensors"
    path.write_bytes(as_safetensors(tensors))
    local = open_checkpoint(path)
    for url in (f"file://{path}", f"file://localhost{path}", path.as_uri(), f"local://{path}"):
        checkpoint = open_checkpoint(url)
        assert checkpoint.header_digest() == local.header_digest()
        assert checkpoint.location == str(path)
    model = Blocks()
    warmstart.load(model, path.as_uri(), select="blocks.3", include="blocks.3", verify="off")
    assert same_bits(model.blocks[3].bias.detach(), tensors["blocks.3.bias"])
    part = open_checkpoint(path.as_uri())
    part.read("blocks.3.weight")
    assert part.bytes_read == 40 * 40 * 4
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: there is no such file"):
        open_checkpoint("file:///nowhere/gone.safetensors")


class CountedMemory(MemoryFileSystem):
    """An object store that counts the bytes it gives."""

    protocol = "counted"
    fetched = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("counted://", "memory://"))
        return stripped

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **options)
        type(self).fetched += len(data)
        return data


fsspec.register_implementation("counted", CountedMemory, clobber=True)


def test_an_object_store_gives_ranges_too() -> None:
    tensors = weights()
    data = as_safetensors(tensors)
    CountedMemory.fetched = 0
    store = fsspec.filesystem("counted")
    store.pipe_file("/bucket/w.safetensors", data)
    checkpoint = open_checkpoint("counted://bucket/w.safetensors")
    assert CountedMemory.fetched == header_bytes(data)
    model = Blocks()
    warmstart.load(model, checkpoint, select="blocks.3", include="blocks.3")
    assert same_bits(model.blocks[3].weight.detach(), tensors["blocks.3.weight"])
    assert CountedMemory.fetched == header_bytes(data) + (40 * 40 + 40) * 4
    assert checkpoint.location == "counted://bucket/w.safetensors"
    assert checkpoint.changed() is None

    store.pipe_file("/bucket/w.safetensors", as_safetensors(weights(width=41)))
    assert "counted://bucket/w.safetensors had" in str(checkpoint.changed())
    with pytest.raises(CheckpointError, match=r"had .* bytes when it was opened"):
        checkpoint.read("blocks.4.weight")
    assert_equal(open_checkpoint("counted://bucket/w.safetensors"), weights(width=41))
    store.rm_file("/bucket/w.safetensors")
    assert checkpoint.changed() == "counted://bucket/w.safetensors is gone"
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_checkpoint("counted://bucket/w.safetensors")


def test_other_formats_of_an_object_store(tmp_path: Path) -> None:
    tensors = weights(2)
    torch.save({"state_dict": tensors}, tmp_path / "w.ckpt")
    fsspec.filesystem("memory").pipe_file("/w.ckpt", (tmp_path / "w.ckpt").read_bytes())
    checkpoint = open_checkpoint("memory://w.ckpt")
    assert checkpoint.checkpoint_key == "state_dict"
    assert_equal(checkpoint, tensors)
    with pytest.raises(CheckpointError, match=r"memory://w\.ckpt: .*'model'"):
        open_checkpoint("memory://w.ckpt", checkpoint_key="model")


def save_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


def save_legacy(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_npz(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **{key: tensor.numpy() for key, tensor in tensors.items()})


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(as_safetensors(tensors))


SAVES = [save_torch, save_legacy, save_npz, save_safetensors]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_is_the_same_here_and_there(save: Any, ranges: bool, server: Server, tmp_path: Path) -> None:
    tensors = weights(3)
    save(tensors, tmp_path / "w.bin")
    data = server.files["/files/w.bin"] = (tmp_path / "w.bin").read_bytes()
    server.ranges = ranges
    local, remote = open_checkpoint(tmp_path / "w.bin"), open_checkpoint(server.url("/files/w.bin"))
    assert remote.header_digest() == local.header_digest()
    assert (remote.format, remote.notes, remote.metadata) == (local.format, local.notes, local.metadata)
    for key in local.keys():
        assert remote.info(key) == local.info(key)
    assert_equal(remote, tensors)
    assert remote.location == server.url("/files/w.bin")
    assert remote.sha256() == hashlib.sha256(data).hexdigest()
    assert remote.changed() is None
    assert server.sent <= len(data) + (0 if ranges else 2**20)


def test_a_plain_array_is_named_by_its_url(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(3, dtype=np.float32))
    server.files["/a/conv%20weight.npy"] = server.files["/a/conv weight.npy"] = (tmp_path / "x.npy").read_bytes()
    assert open_checkpoint(server.url("/a/conv%20weight.npy")).keys() == ("conv weight",)


def test_a_second_run_fetches_nothing_again(server: Server, tmp_path: Path) -> None:
    tensors = weights(4)
    save_torch(tensors, tmp_path / "w.pt")
    data = server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.files["/w.safetensors"] = as_safetensors(tensors)
    assert_equal(open_checkpoint(server.url("/w.pt")), tensors)
    assert server.count() == len(data)
    assert_equal(open_checkpoint(server.url("/w.pt")), tensors)
    assert server.count() == fetching_head()

    open_checkpoint(server.url("/w.safetensors")).read("blocks.1.weight")
    server.count()
    open_checkpoint(server.url("/w.safetensors")).read("blocks.1.weight")
    assert server.count() == fetching_head()
    assert open_checkpoint(server.url("/w.safetensors")).sha256()
    server.count()
    assert_equal(open_checkpoint(server.url("/w.safetensors")), tensors)
    assert server.count() == fetching_head()


def fetching_head() -> int:
    from warmstart.checkpoints.remote.urls import HEAD

    return HEAD


@pytest.mark.parametrize("said", ["etags", "dates"])
def test_a_file_that_changed_is_fetched_again(said: str, server: Server) -> None:
    server.etags, server.dates = said == "etags", said == "dates"
    for tensors in (weights(2), weights(3)):
        server.files["/w.safetensors"] = as_safetensors(tensors)
        assert_equal(open_checkpoint(server.url("/w.safetensors")), tensors)


def test_what_has_no_version_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.etags = server.dates = False
    for tensors in (weights(2), {key: tensor + 1 for key, tensor in weights(2).items()}):
        data = server.files["/w.safetensors"] = as_safetensors(tensors)
        checkpoint = open_checkpoint(server.url("/w.safetensors"))
        assert_equal(checkpoint, tensors)
        assert server.count() == len(data)
    del checkpoint
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cached_part_that_was_damaged_is_fetched_again(server: Server, tmp_path: Path) -> None:
    tensors = weights(4)
    server.files["/w.safetensors"] = as_safetensors(tensors)
    checkpoint = open_checkpoint(server.url("/w.safetensors"))
    checkpoint.read("blocks.1.weight")
    checkpoint.read("blocks.2.weight")
    (part,) = (tmp_path / "cache").rglob("*.part")
    with part.open("r+b") as file:
        file.seek(checkpoint.info("blocks.1.weight").offset + 100)
        file.write(b"xx")
    server.count()
    assert_equal(open_checkpoint(server.url("/w.safetensors")), tensors)
    assert server.count() > 0
    # A record that a killed process left half written is no record.
    (ledger,) = (tmp_path / "cache").rglob("*.ranges")
    ledger.write_bytes(ledger.read_bytes() + b"\n0 99999 0000")
    assert_equal(open_checkpoint(server.url("/w.safetensors")), tensors)


FAULTS = ["500", "503", "429 0", "cut 0", "cut 10", "cut 3000", "short 3000", "stall 0", "stall 3000", "lie 100"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_middle_is_mended_from_where_the_bytes_stopped(fault: str, server: Server) -> None:
    tensors = weights(2)
    data = server.files["/w.safetensors"] = as_safetensors(tensors)
    checkpoint = open_checkpoint(server.url("/w.safetensors"))
    server.count()
    server.faults = [fault, fault]
    asked = len(server.requests)
    assert same_bits(checkpoint.read("blocks.0.weight"), tensors["blocks.0.weight"])
    offset = checkpoint.info("blocks.0.weight").offset
    ranges = [asked for _, asked in server.requests[asked:]]
    kind, _, detail = fault.partition(" ")
    if kind in {"cut", "stall", "short"}:
        n = int(detail)
        stop = offset + 6400 - 1
        starts = [offset, offset + n, offset + 2 * n]
        assert ranges == [f"bytes={start}-{stop}" for start in starts]
        assert server.count() == 6400
    else:
        assert len(ranges) in {2, 3}
    assert_equal(checkpoint, tensors)
    assert len(data) == checkpoint.files[0].size


@pytest.mark.parametrize("fault", [f for f in FAULTS if not f.startswith("lie")])
def test_a_fault_while_opening_is_mended(fault: str, server: Server) -> None:
    tensors = weights(2)
    server.files["/w.safetensors"] = as_safetensors(tensors)
    server.faults = [fault, "ok", fault]
    assert_equal(open_checkpoint(server.url("/w.safetensors")), tensors)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_is_cut_goes_on_or_starts_anew(ranges: bool, server: Server, tmp_path: Path) -> None:
    tensors = weights(4)
    save_torch(tensors, tmp_path / "w.pt")
    data = server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.ranges = ranges
    server.faults = ["ok", "cut 5000", "cut 7000"]
    assert_equal(open_checkpoint(server.url("/w.pt")), tensors)
    if ranges:
        assert server.sent == len(data)
        assert [asked for _, asked in server.requests][1:] == [
            f"bytes={start}-{len(data) - 1}" for start in (64, 5064, 12064)
        ]
    else:
        assert server.sent >= len(data) + 12_000


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("404", r"the server has no such file \(404\); check the URL"),
        ("410", r"no such file \(410\)"),
        ("401", r"access was refused \(401\); check the URL and the token"),
        ("403", r"access was refused \(403\)"),
        ("400", "answered with status 400; check the URL"),
        ("302 ftp://127.0.0.1/x", "cannot be asked for"),
        ("302 /w.safetensors", "redirects in a circle"),
    ],
)
def test_what_another_try_would_not_mend_is_said_at_once(fault: str, said: str, server: Server) -> None:
    server.files["/w.safetensors"] = as_safetensors(weights(2))
    server.faults = [fault] * 20
    with pytest.raises(CheckpointError, match=f"{re.escape(server.url('/w.safetensors'))}: .*{said}"):
        open_checkpoint(server.url("/w.safetensors"))
    assert len(server.requests) == (10 if "w.saf" in fault else 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "answered with status 500"),
        ("429 0", "answered with status 429"),
        ("cut 0", "the connection was cut"),
        ("stall 0", "the server sent nothing for 0.4 seconds"),
    ],
)
def test_what_never_mends_ends_in_an_error_after_some_tries(
    fault: str, said: str, server: Server, tmp_path: Path
) -> None:
    tensors = weights(2)
    save_torch(tensors, tmp_path / "w.pt")
    server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.faults = ["ok"] + [fault] * 20
    with pytest.raises(CheckpointError, match=rf"{said}.*\(the last of 5 tries\); check the address"):
        open_checkpoint(server.url("/w.pt"))
    assert len(server.requests) == 6
    assert not list((tmp_path / "cache").rglob("w.pt"))
    server.faults = []
    assert_equal(open_checkpoint(server.url("/w.pt")), tensors)


@pytest.mark.parametrize("ranges", [True, False])
def test_half_a_file_never_passes_for_a_whole_one(ranges: bool, server: Server, tmp_path: Path) -> None:
    tensors = weights(4)
    save_torch(tensors, tmp_path / "w.pt")
    data = server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.ranges = ranges
    server.faults = ["ok", *["cut 1000"] * 5]
    with pytest.raises(CheckpointError, match="the last of 5 tries"):
        open_checkpoint(server.url("/w.pt"))
    assert not list((tmp_path / "cache").rglob("w.pt"))
    assert not list((tmp_path / "cache").rglob(".download-*"))
    server.count()
    assert_equal(open_checkpoint(server.url("/w.pt")), tensors)
    if ranges:  # what came before is not fetched again
        assert server.sent <= len(data) - 5000 + 64


def test_a_download_without_a_length_that_is_cut_is_found_truncated(server: Server, tmp_path: Path) -> None:
    save_torch(weights(4), tmp_path / "w.pt")
    server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.ranges = server.lengths = False
    assert_equal(open_checkpoint(server.url("/w.pt")), weights(4))
    server.files["/v.pt"] = server.files["/w.pt"]
    server.faults = ["ok", "cut 5000"]
    with pytest.raises(CheckpointError, match=r"/v\.pt: .*truncated"):
        open_checkpoint(server.url("/v.pt"))


def test_a_length_that_is_too_small_is_no_whole_file(server: Server, tmp_path: Path) -> None:
    save_torch(weights(4), tmp_path / "w.pt")
    server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.ranges = False
    server.faults = ["ok", *["lie 100"] * 20]
    # Which of the two is seen first depends on when the surplus bytes arrive.
    words = r"/w\.pt had .* bytes when it was opened and has .* now|the connection was cut or the answer is no HTTP"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(server.url("/w.pt"))


def test_nobody_listens(server: Server) -> None:
    url = server.url("/w.safetensors")
    server.close()
    with pytest.raises(CheckpointError, match=r"the server cannot be reached \(.*\) \(the last of 5 tries\)"):
        open_checkpoint(url)
    with pytest.raises(CheckpointError, match="the server cannot be reached"):
        open_checkpoint("http://no-such-host.invalid/w.safetensors")


def test_a_redirect_is_followed(server: Server) -> None:
    tensors = weights(2)
    server.files["/real.safetensors"] = as_safetensors(tensors)
    server.moved = {"/w.safetensors": "/elsewhere", "/elsewhere": "/real.safetensors"}
    checkpoint = open_checkpoint(server.url("/w.safetensors"))
    assert checkpoint.location == server.url("/w.safetensors")
    assert_equal(checkpoint, tensors)
    server.moved = {}
    assert checkpoint.changed() == f"{checkpoint.location} is gone"


def test_a_file_that_is_replaced_is_found(server: Server) -> None:
    first, second = weights(2), {key: tensor + 1 for key, tensor in weights(2).items()}
    url = server.url("/w.safetensors")
    server.files["/w.safetensors"] = as_safetensors(first)
    checkpoint = open_checkpoint(url)
    plan = warmstart.plan(Blocks(2), checkpoint)
    assert checkpoint.changed() is None
    assert server.sent == header_bytes(server.files["/w.safetensors"])

    server.files["/w.safetensors"] = as_safetensors(second)
    assert checkpoint.changed() == f"{url} was replaced after it was opened"
    with pytest.raises(CheckpointError, match="was replaced after it was opened; open it again when it is at rest"):
        checkpoint.read("blocks.0.weight")
    with pytest.raises(CheckpointError, match="was replaced after it was opened; plan again"):
        plan.apply()
    server.files["/w.safetensors"] += b"x"
    assert re.search(r"had .* bytes when it was opened and has .* now|was replaced", checkpoint.changed() or "")
    del server.files["/w.safetensors"]
    assert checkpoint.changed() == f"{url} is gone"
    server.close()
    assert checkpoint.changed() is None  # nobody can tell


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_is_replaced_between_two_tries_is_found(ranges: bool, server: Server, tmp_path: Path) -> None:
    save_torch(weights(4), tmp_path / "w.pt")
    data = server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.ranges = ranges
    server.faults = ["ok", "cut 5000", "swap"]
    server.swaps = {"/w.pt": data[:-1] + b"x"}
    with pytest.raises(CheckpointError, match="was replaced after it was opened"):
        open_checkpoint(server.url("/w.pt"))
    assert not list((tmp_path / "cache").rglob("w.pt"))


def test_sha256_is_of_the_file_and_streams_once(server: Server) -> None:
    tensors = weights(4)
    data = server.files["/w.safetensors"] = as_safetensors(tensors)
    right = hashlib.sha256(data).hexdigest()
    model = Blocks(4)
    warmstart.load(model, server.url("/w.safetensors"), sha256=right)
    assert server.sent == len(data)
    with pytest.raises(CheckpointError, match="its SHA-256 is"):
        warmstart.load(Blocks(4), server.url("/w.safetensors"), sha256="0" * 64)


USER, PASSWORD, TOKEN = "mrsecretuser", "hunter2secret", "sesame-open/x+y="


def test_nothing_secret_is_shown_or_kept(server: Server, tmp_path: Path) -> None:
    tensors = weights(2)
    data = server.files["/w.safetensors"] = as_safetensors(tensors)
    save_torch(tensors, tmp_path / "w.pt")
    server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    server.files["/torn.pt"] = server.files["/w.pt"][:-50]

    def url(path: str) -> str:
        return f"http://{USER}:{PASSWORD}@127.0.0.1:{server.port}{path}?token={TOKEN}&x=1"

    said = []
    for path in ("/w.safetensors", "/w.pt"):
        checkpoint = open_checkpoint(url(path))
        assert checkpoint.location == server.url(path)
        report = warmstart.load(Blocks(2), checkpoint)
        said += [repr(checkpoint), str(report), json.dumps(report.to_dict(), default=str), json.dumps(report.lineage)]
        said += [*checkpoint.notes, str(checkpoint.files), str(report.plan.to_dict())]
    assert all(f"token={TOKEN}" in path for path, _ in server.requests)
    assert all(agent and agent.startswith("Basic ") for agent in server.agents)

    checkpoint = open_checkpoint(url("/w.safetensors"))
    faults = ["404", "403", "400", "500", "429 0", "cut 0", "lie 1", "302 ftp://x/", f"302 /w?token={TOKEN}"]
    for fault in faults:
        (tmp_path / "again").mkdir(exist_ok=True)
        server.files["/v.safetensors"] = as_safetensors({f"w{fault}": torch.ones(2)})
        server.faults = [fault] * 20
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(url("/v.safetensors"))
        said.append(everything_said(caught.value))
    server.faults = []
    for path in ("/gone.pt", "/torn.pt"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(url(path))
        said.append(everything_said(caught.value))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(url("/w.safetensors"), checkpoint_key="model")
    said.append(everything_said(caught.value))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(url("/w.safetensors"), revision="main")
    said.append(everything_said(caught.value))
    server.files["/w.safetensors"] = data + b"x"
    said.append(str(checkpoint.changed()))
    server.close()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(url("/u.safetensors"))
    said.append(everything_said(caught.value))
    for bad in (f"http://{USER}:{PASSWORD}@:99999/x?{TOKEN}", f"foo://{USER}:{PASSWORD}@h/x?{TOKEN}"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(bad)
        said.append(everything_said(caught.value))
    for path in (tmp_path / "cache").rglob("*"):
        said.append(str(path) + (path.read_bytes().decode("latin-1") if path.is_file() else ""))
    text = "\n".join(said)
    for secret in (USER, PASSWORD, TOKEN, TOKEN.partition("/")[0]):
        assert secret not in text, next(part for part in said if secret in part)[-2000:]


def test_a_protocol_nobody_speaks_and_one_that_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"foo://host/x: cannot be opened by fsspec .*Protocol not known: foo"):
        open_checkpoint("foo://host/x")
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "s3fs", None)
        with pytest.raises(CheckpointError, match=r"s3://bucket/x\.pt: .*Install s3fs.*: pip install s3fs"):
            open_checkpoint("s3://bucket/x.pt")


@pytest.mark.parametrize("source", [r"C:\x.pt", "C:/x.pt", "c:x.pt", " s3://b/x.pt"])
def test_x_29_a_drive_is_no_scheme(source: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_checkpoint(source)


def test_what_cannot_be_read_is_not_downloaded_first(server: Server) -> None:
    server.files["/w.gguf"] = b"GGUF" + bytes(1_000_000)
    server.files["/login"] = b"<!DOCTYPE html>" + b" " * 1_000_000
    server.files["/empty"] = b""
    for path, what in {"/w.gguf": "a GGUF file", "/login": "an HTML page", "/empty": "empty"}.items():
        with pytest.raises(CheckpointError, match=f"{server.url(path)}.*{what}"):
            open_checkpoint(server.url(path))
    assert server.count() == 2 * fetching_head()


def test_a_header_that_lies_fetches_no_more_than_it_may(server: Server) -> None:
    server.files["/w"] = (99_999_999).to_bytes(8, "little") + b"{" + bytes(2_000_000)
    with pytest.raises(CheckpointError, match=r"/w: truncated: the header alone should end at byte 100,000,007"):
        open_checkpoint(server.url("/w"))
    assert server.count() == fetching_head()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_from_elsewhere_runs_nothing(server: Server, tmp_path: Path) -> None:
    server.files["/w.pkl"] = pickle.dumps({"w": np.ones(2), "bomb": Bomb(tmp_path / "bomb")}, protocol=2)
    assert open_checkpoint(server.url("/w.pkl")).keys() == ("w",)
    assert not (tmp_path / "bomb").exists()


def test_several_readers_share_what_came(server: Server) -> None:
    tensors = weights(8)
    data = server.files["/w.safetensors"] = as_safetensors(tensors)
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work() -> None:
        try:
            start.wait(10)
            assert_equal(open_checkpoint(server.url("/w.safetensors")), tensors)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert server.sent <= len(data) + 4 * header_bytes(data)


READER = """
import sys, torch
from warmstart.checkpoints.opening import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
print(sum(float(checkpoint.read(key).double().sum()) for key in checkpoint.keys()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/w.safetensors", "/w.pt"])
def test_processes_share_what_came_and_a_killed_one_leaves_nothing_whole(
    path: str, server: Server, tmp_path: Path
) -> None:
    tensors = weights(10, width=1000)
    server.files["/w.safetensors"] = as_safetensors(tensors)
    save_torch(tensors, tmp_path / "w.pt")
    server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    size = len(server.files[path])
    command = [sys.executable, "-c", READER, server.url(path)]

    # Killed in the middle: what came in whole pieces is kept, and nothing passes for the file.
    server.faults = ["ok"] * (6 if path == "/w.safetensors" else 1) + ["stall 20000000"]
    victim = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while server.faults and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    victim.kill()
    victim.wait(30)
    assert not list((tmp_path / "cache").rglob(f"w.{path.rpartition('.')[2]}"))
    killed = server.count()
    assert 0 < killed < size

    # Three at once fetch what is missing, once.
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {reader.communicate(timeout=120)[0] for reader in readers}
    assert sums == {f"{sum(float(t.double().sum()) for t in tensors.values())}\n"}
    assert server.sent <= size - killed // 2 + 3 * 5000


def test_the_cache_folder_is_where_one_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert caching.cache_folder() == tmp_path / "cache" / "remote"
    monkeypatch.delenv("WARMSTART_CACHE")
    monkeypatch.setitem(fsspec.config.conf, "filecache", {"cache_storage": str(tmp_path / "fs")})
    assert caching.cache_folder() == tmp_path / "fs" / "warmstart"
    monkeypatch.delitem(fsspec.config.conf, "filecache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caching.cache_folder() == tmp_path / "xdg" / "warmstart" / "remote"


def test_a_cache_that_is_cleared_meanwhile_stops_nothing(server: Server, tmp_path: Path) -> None:
    server.files["/w.safetensors"] = as_safetensors(weights(4))
    checkpoint = open_checkpoint(server.url("/w.safetensors"))
    checkpoint.read("blocks.1.weight")
    shutil.rmtree(tmp_path / "cache")
    assert_equal(checkpoint, weights(4))


def test_a_folder_without_room_is_named(server: Server, tmp_path: Path) -> None:
    save_torch(weights(4), tmp_path / "w.pt")
    server.files["/w.pt"] = (tmp_path / "w.pt").read_bytes()
    open_checkpoint(server.url("/w.pt"))
    (kept,) = (tmp_path / "cache").rglob("w.pt")
    kept.unlink()
    kept.mkdir()  # what cannot be written to
    with pytest.raises(CheckpointError, match=r"/w\.pt: cannot be kept in .*export WARMSTART_CACHE="):
        open_checkpoint(server.url("/w.pt"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    progress = fetching.Progress("w.pt")
    progress._next = 0
    progress.add(2_500_000)
    progress.clear()
    assert shown.getvalue() == ("\rw.pt: 2.5 MB fetched\r" + " " * 20 + "\r" if terminal else "")


def test_without_a_writable_cache_it_reads_all_the_same(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("WARMSTART_CACHE", str(tmp_path / "a file"))
    server.files["/w.safetensors"] = as_safetensors(weights(2))
    assert_equal(open_checkpoint(server.url("/w.safetensors")), weights(2))


def shards(tensors: dict[str, torch.Tensor], names: list[str]) -> tuple[dict[str, bytes], bytes]:
    """Files of the tensors dealt out to shards, and their index."""
    weight_map = {key: names[i % len(names)] for i, key in enumerate(tensors)}
    files = {name: as_safetensors({key: tensors[key] for key in tensors if weight_map[key] == name}) for name in names}
    return files, json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def test_shards_are_read_by_range_through_their_index(server: Server) -> None:
    tensors = weights(6)
    files, index = shards(tensors, ["model-1.safetensors", "model 2.safetensors"])
    server.files = {f"/m/{name.replace(' ', '%20')}": data for name, data in files.items()}
    server.files["/m/model.safetensors.index.json"] = index
    url = server.url("/m/model.safetensors.index.json?token=sesame")
    checkpoint = open_checkpoint(url)
    headers = sum(header_bytes(data) for data in files.values())
    assert server.count() == len(index) + headers
    assert checkpoint.location == server.url("/m/model.safetensors.index.json")
    assert checkpoint.format == "safetensors, 2 shards"
    assert all(path.endswith("?token=sesame") for path, _ in server.requests)
    model = Blocks(6)
    warmstart.load(model, checkpoint, select="blocks.3", include="blocks.3")
    assert server.count() == (40 * 40 + 40) * 4
    assert_equal(checkpoint, tensors)
    server.files["/m/model-1.safetensors"] += b"x"
    assert "model-1.safetensors had" in str(checkpoint.changed())


def test_an_index_that_lies_is_an_error(server: Server) -> None:
    tensors = weights(2)
    files, index = shards(tensors, ["a.safetensors", "b.safetensors"])
    url = server.url("/m/index.json")
    for name, data in files.items():
        server.files[f"/m/{name}"] = data
    cases = {
        index.replace(b'"blocks.0.weight"', b'"gone"'): "its shards lack 1 tensor that it says they hold: 'gone'",
        index.replace(b"a.safetensors", b"c.safetensors"): r"/m/c\.safetensors: the server has no such file",
        index.replace(b"a.safetensors", b"../a.safetensors"): "which may be an attack",
        index.replace(b"a.safetensors", b"index.json"): r"/m/index\.json",
        b'{"weight_map": []}': "damaged index of shards",
        b'{"a": 1}': "a text file",
    }
    for content, said in cases.items():
        server.files["/m/index.json"] = content
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(url)
    server.files["/m/index.json"] = index
    with pytest.raises(CheckpointError, match="checkpoint_key='model' names nothing in it"):
        open_checkpoint(url, checkpoint_key="model")
    del server.files["/m/a.safetensors"]
    server.files["/m/a.safetensors"] = as_safetensors({**tensors, "more": torch.ones(1)})
    assert open_checkpoint(url).notes == ("3 tensors of the shards that the index does not name there: left out",)


@pytest.mark.slow
def test_minilm_from_a_server_into_bert_model(server: Server) -> None:
    from transformers import BertConfig, BertModel

    import real_weights

    path = real_weights.MINILM.fetch()
    source = safetensors.torch.load_file(path)
    config = BertConfig(**json.loads(real_weights.MINILM.fetch("config.json").read_text()))
    data = server.files["/minilm/model.safetensors"] = path.read_bytes()
    url = server.url("/minilm/model.safetensors")

    model = BertModel(config)
    report = warmstart.load(model, url, select="encoder.layer.3", include="encoder.layer.3")
    layer = sum(t.numel() * t.element_size() for key, t in source.items() if key.startswith("encoder.layer.3."))
    assert server.count() == header_bytes(data) + layer
    assert report.coverage == 1

    model = BertModel(config)
    report = warmstart.load(model, url)
    assert report.coverage == 1
    assert len(report.mapping) == 103
    entries = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, (key,) in report.mapping.items():
        assert same_bits(entries[name].detach(), source[key]), name
    assert server.sent <= len(data)
