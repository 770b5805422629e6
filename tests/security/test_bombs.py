"""Small files that ask for much memory or time: each is refused, or opened within 256 MiB and a few seconds."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

LIMIT_MIB = 256
SECONDS = 60

# One process imports torch; a fork of it opens each file, so that each is measured from the same start.
PROBE = """
import os, signal, sys
import torch, numpy
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

for path in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            print(f"0 died {code}")
        continue
    signal.alarm(30)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    try:
        checkpoint = open_checkpoint(path)
        answer = f"opened {len(checkpoint)}"
    except CheckpointError as error:
        answer = f"refused {error}"
    answer = answer[:400].replace(chr(10), " ")
    print(f"{status('VmHWM') - before:.1f} {answer}", flush=True)
    os._exit(0)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")

HEAD = b"\x80\x02"
N = 6_000_000


def listed(item: bytes, size: int = N) -> bytes:
    return HEAD + b"(" + item * (size // len(item)) + b"l."


def repeated(setup: bytes, item: bytes, times: int) -> bytes:
    return HEAD + setup + b"(" + item * times + b"l."


MEGABYTE = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
ENCODE = b"c_codecs\nencode\nq\x00" + MEGABYTE + b"q\x01X\x06\0\0\0latin1q\x02"
PAIRS = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(50_000))
ORDERED = b"ccollections\nOrderedDict\nq\x00}(" + PAIRS + b"uq\x01"
DOUBLED = b"".join(b"0}(X\1\0\0\0ah%cX\1\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(60))
BYTES = b"c_codecs\nencode\nX\x04\0\0\0aaaaX\x06\0\0\0latin1\x86R"
WEIGHT = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\0\0\0f4K\0K\x01\x87R" + BYTES + b"\x86R"

PICKLES: dict[str, Callable[[], bytes]] = {
    "empty sets": lambda: listed(b"\x8f"),
    "empty lists": lambda: listed(b"]"),
    "empty dicts": lambda: listed(b"}"),
    "dicts of one": lambda: listed(b"}K\x01K\x01s"),
    "marks": lambda: HEAD + b"(" * N + b".",
    "duplicates": lambda: HEAD + b"N" + b"2" * N + b".",
    "lists on the stack": lambda: HEAD + b"]" * N + b".",
    "strings": lambda: listed(b"X\x02\0\0\0ab"),
    "integers": lambda: listed(b"J\xff\xff\xff\x01"),
    "integers as text": lambda: listed(b"I12345\n"),
    "wide integers that share a hash": lambda: listed(b"\x8a\x09" + b"\xff" * 8 + b"\x01"),
    "names": lambda: HEAD + b"(" + b"".join(b"ca\n%d\n" % i for i in range(N // 10)) + b"l.",
    "one name": lambda: listed(b"ca\nb\n"),
    "calls": lambda: repeated(b"ca\nb\nq\x00", b"h\x00)R", N // 4),
    "objects": lambda: repeated(b"ca\nb\nq\x00", b"h\x00)\x81", N // 4),
    "a deep tuple as a key": lambda: HEAD + b"})" + b"\x85" * 900_000 + b"K\x01s.",
    "a deeper tuple as a key": lambda: HEAD + b"})" + b"\x85" * N + b"K\x01s.",
    "a deep tuple in a set": lambda: b"\x80\x04\x8f(" + b")" + b"\x85" * 500_000 + b"\x90.",
    "a deep list": lambda: HEAD + b"]" * 500_000 + b"a" * 499_999 + b".",
    "a memo index": lambda: HEAD + b"Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "a memo index as text": lambda: HEAD + b"Np2147483647\n.",
    "memo indexes": lambda: HEAD + b"N" + b"r\xff\xff\x01\x00" * (N // 5) + b".",
    "memo indexes as text": lambda: HEAD + b"N" + b"p12345\n" * (N // 7) + b".",
    "a long text": lambda: HEAD + b"X\xff\xff\xff\x7fabc.",
    "a longer text": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc.",
    "a long byte array": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "a long integer": lambda: HEAD + b"\x8b\xff\xff\xff\x7fabc.",
    "a negative length": lambda: HEAD + b"T\xff\xff\xff\xffabc.",
    "a frame": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"N.",
    "an extension": lambda: HEAD + b"\x82\x01.",
    "no end": lambda: HEAD + b"N" * 1000,
    "a wide text": lambda: HEAD + b"X" + struct.pack("<I", 5 * N + 4) + "\U0001f600".encode() + b"a" * (5 * N) + b".",
    "one text encoded often": lambda: repeated(ENCODE, b"h\x00h\x01h\x02\x86R", 100_000),
    "one dict copied often": lambda: repeated(ORDERED, b"h\x00h\x01\x85R", 100_000),
    "dicts shared without end": lambda: HEAD + b"}q\x00X\1\0\0\0wNs" + DOUBLED + b".",
    "weights shared without end": lambda: HEAD + b"}q\x00X\1\0\0\0w" + WEIGHT + b"s" + DOUBLED + b".",
}


def measure(*paths: Path) -> list[tuple[float, str]]:
    """Peak growth in MiB, and what came out, for each file."""
    command = [sys.executable, "-c", PROBE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 5 * len(paths), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == len(paths), done.stderr[-2000:]
    return [(float(grown), answer) for grown, answer in lines]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    folder = tmp_path_factory.mktemp("bombs")
    paths = [folder / f"{i}.pkl" for i in range(len(PICKLES))]
    for path, make in zip(paths, PICKLES.values(), strict=True):
        path.write_bytes(make())
    return dict(zip(PICKLES, measure(*paths), strict=True))


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_asks_for_much(name: str, measured: dict[str, tuple[float, str]]) -> None:
    grown, answer = measured[name]
    assert answer.startswith("refused /")
    assert grown < LIMIT_MIB


def test_the_same_within_a_torch_archive(tmp_path: Path) -> None:
    paths = []
    for name in ("empty sets", "a memo index", "a deep tuple as a key", "calls"):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            paths.append(tmp_path / f"{name} {method}")
            with zipfile.ZipFile(paths[-1], "w", method) as archive:
                archive.writestr("w/data.pkl", PICKLES[name]())
    for grown, answer in measure(*paths):
        assert answer.startswith("refused")
        assert grown < LIMIT_MIB


def packed_zeros(path: Path, name: str, size: int) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    chunk = bytes(1 << 20)
    body = b"".join(packer.compress(chunk) for _ in range(size >> 20)) + packer.flush()
    crc = 0
    for _ in range(size >> 20):
        crc = zlib.crc32(chunk, crc)
    raw = name.encode()
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(body), size, len(raw), 0) + raw
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(body), size, len(raw), 0, 0, 0, 0, 0, 0
    )
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entry) + len(raw), len(local) + len(body), 0)
    path.write_bytes(local + body + entry + raw + end)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    paths = [tmp_path / "pickle", tmp_path / "array"]
    for path, name in zip(paths, ("w/data.pkl", "w.npy"), strict=True):
        packed_zeros(path, name, 256 << 20)
        assert path.stat().st_size < 1 << 20
    for grown, answer in measure(*paths):
        assert answer.startswith("refused")
        assert grown < 64


def test_a_safetensors_header_of_brackets(tmp_path: Path) -> None:
    bodies = (b'{"a":[' + b"[]," * 15_000_000 + b"[]]}", b'{"a":' + b"[" * 1_000_000, b"{" + b'"",' * 9_000_000)
    paths = [tmp_path / str(i) for i in range(len(bodies))]
    for path, body in zip(paths, bodies, strict=True):
        path.write_bytes(struct.pack("<Q", len(body)) + body)
    for grown, answer in measure(*paths):
        assert answer.startswith("refused")
        assert grown < LIMIT_MIB
