"""Commands as processes of their own: pipes, signals, full and read-only disks, and what starting one costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

WARMSTART = (sys.executable, "-m", "warmstart")

SLOW = """
import pathlib, time

def slow(tensors):
    if tensors[0].device.type != "meta":
        pathlib.Path("reached").touch()
        time.sleep(60)
    return tensors
"""


@pytest.fixture
def folder(tmp_path, source):
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def in_the_middle(folder: Path, out: str, *options: str) -> subprocess.Popen[str]:
    """A conversion that has written half of its tensors and waits."""
    (folder / "reached").unlink(missing_ok=True)
    rule = "[{sources: encoder.layer.2.v.weight, targets: z, ops: [{apply: {fn: 'slow:slow'}}]}]"
    words = ("convert", "source.safetensors", out, "--convert", rule, *options)
    process = subprocess.Popen([*WARMSTART, *words], cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (folder / "reached").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "out", "options"), [
    (signal.SIGINT, "out.safetensors", ("--force",)),
    (signal.SIGTERM, "out", ("--format", "dcp")),
])  # fmt: skip
def test_a_signal_leaves_the_old_file_and_nothing_of_the_new_one(folder, number, out, options):
    if out == "out.safetensors":
        save_file({"old": torch.ones(3)}, folder / out)
    process = in_the_middle(folder, out, *options)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    left = {p.name for p in folder.iterdir()} - {"slow.py", "__pycache__", "reached", "source.safetensors"}
    assert left == ({out} if out == "out.safetensors" else set())
    if left:
        assert list(load_file(folder / out)) == ["old"]


def test_kill_9_in_the_middle_leaves_the_old_file_whole(folder, run):
    save_file({"old": torch.ones(3)}, folder / "out.safetensors")
    process = in_the_middle(folder, "out.safetensors", "--force")
    process.kill()
    process.communicate(timeout=60)
    assert list(load_file(folder / "out.safetensors")) == ["old"]
    assert run("convert", "source.safetensors", "out.safetensors", "--force").code == 0
    assert len(load_file(folder / "out.safetensors")) == 18


def test_a_broken_pipe_is_quiet_and_keeps_the_exit_code(folder):
    script = f"{sys.executable} -m warmstart inspect source.safetensors --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stdout == "{\n0\n"
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_printed_is_an_error(folder):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*WARMSTART, "inspect", "source.safetensors"], cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert done.stderr == "warmstart: cannot print: No space left on device\n"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 KB, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("name", "options"), [
    ("out.safetensors", ()),
    ("out", ("--format", "sharded", "--max_shard_size", "1KB")),
    ("out", ("--format", "dcp")),
])  # fmt: skip
def test_a_full_disk_is_said_and_nothing_is_left(run, source, small_disk, name, options):
    ran = run("convert", source, small_disk / name, *options)
    assert ran.code == 3
    assert "No space left on device" in ran.err
    assert len(ran.err.splitlines()) == 1
    assert list(small_disk.iterdir()) == []


def test_a_read_only_disk_is_said(run, source, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for words in (("convert", source, small_disk / "out.safetensors"),
                  ("plan", source, "--model", source, "--lock", small_disk / "l.yaml")):  # fmt: skip
        ran = run(*words)
        assert ran.code == 3
        assert "Read-only file system" in ran.err
        assert len(ran.err.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_said(run, source):
    source.chmod(0)
    ran = run("inspect", source)
    assert ran.code == 3
    assert "Permission denied" in ran.err


def test_without_jsonargparse_the_line_to_install_it_is_said(folder):
    program = (
        "import sys; sys.modules['jsonargparse'] = None; from warmstart.cli import main; sys.exit(main(['inspect']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "warmstart: the command line needs jsonargparse: pip install 'warmstart[cli]'\n"


def test_inspect_brings_no_framework_along(folder):
    program = (
        "import sys; from warmstart.cli import main; main(['inspect', 'source.safetensors', '--json'])\n"
        "foreign = {'lightning', 'transformers', 'accelerate', 'rich', 'torch.distributed.checkpoint', 'h5py', 'fsspec'}\n"
        "print(sorted(foreign & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["elements"] == 2448
    assert done.stderr == "[]\n"
