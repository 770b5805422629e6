"""Commands as processes of their own: pipes, signals, full and read-only disks, and what starting one costs."""

from __future__ import annotations

import json
import os
import shutil
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
    # A shell lets what it starts in the background ignore SIGINT, which its children inherit.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*WARMSTART, *words], cwd=folder, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heard)
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


def test_kill_9_in_the_middle_leaves_the_old_folder_whole(folder, run):
    assert run("convert", "source.safetensors", "out", "--format", "sharded").code == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    process = in_the_middle(folder, "out", "--format", "sharded", "--force")
    process.kill()
    process.communicate(timeout=60)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
    renamed = ("--rename", '{"encoder": "e"}')
    assert run("convert", "source.safetensors", "out", "--format", "sharded", "--force", *renamed).code == 0
    assert "e.layer.0.q.bias" in (folder / "out" / "model.safetensors.index.json").read_text()


def test_a_folder_is_replaced_in_one_step(tmp_path):
    """Whoever looks while one folder takes the other's place finds one of them, whole."""
    out, program = (
        tmp_path / "out",
        (
            "import pathlib, sys, warmstart.cli.placing as placing\n"
            "out = pathlib.Path(sys.argv[1])\n"
            "for number in range(200):\n"
            "    with placing.whole_folder(out, force=True) as made:\n"
            "        for name in 'ab':\n"
            "            (made / f'{name}.safetensors').write_text(str(number))\n"
        ),
    )
    out.mkdir()
    for name in "ab":
        (out / f"{name}.safetensors").write_text("-1")
    process = subprocess.Popen([sys.executable, "-c", program, out])
    handle, seen = os.open(tmp_path, os.O_RDONLY), 0
    while process.poll() is None:
        assert os.access("out", os.F_OK, dir_fd=handle)
        seen += 1
    os.close(handle)
    assert process.returncode == 0
    assert seen > 0
    assert {path.read_text() for path in out.iterdir()} == {"199"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


def test_a_file_that_may_not_be_read_and_a_folder_that_may_not_be_written_are_said(folder):
    words: tuple[str, ...] = WARMSTART
    if os.geteuid() == 0:  # root reads everything, unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and there is no setpriv to give that up with")
        words = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", *WARMSTART)
    (folder / "secret.safetensors").write_bytes((folder / "source.safetensors").read_bytes())
    (folder / "secret.safetensors").chmod(0)
    (folder / "closed").mkdir(mode=0o500)
    for command in (
        ("inspect", "secret.safetensors"),
        ("convert", "source.safetensors", "closed/out.safetensors"),
        ("plan", "source.safetensors", "--model", "source.safetensors", "--lock", "closed/l.yaml"),
    ):
        done = subprocess.run([*words, *command], cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 3, done.stderr
        assert "Permission denied" in done.stderr
        assert len(done.stderr.splitlines()) == 1


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
