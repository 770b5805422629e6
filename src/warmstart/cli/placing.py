"""Files and folders that appear whole or not at all, and never over something else unasked."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from warmstart.errors import CheckpointError

_HERE: Final = -100  # AT_FDCWD: a relative path is one of the current folder
_EXCHANGE: Final = 2  # RENAME_EXCHANGE, and RENAME_SWAP


@contextmanager
def whole_file(out: Path, *, force: bool) -> Iterator[Path]:
    """A path to write a file at; when the block ends it stands at `out`, and if the block raises nothing does.

    Whatever was at `out` stays until the new file is complete and on disk. It is replaced only with `force`, and only if it
    is a regular file.

    Raises:
        CheckpointError: Something is there already, or there is no folder to write into.
    """
    if os.path.lexists(out):
        if not out.is_file():
            raise CheckpointError(f"{out}: is there and is no regular file; give another name")
        if not force:
            raise _taken(out)
    with _beside(out) as scratch:
        made = scratch / out.name
        yield made
        _to_disk(made)
        if force:
            os.replace(made, out)
        else:
            _without_replacing(made, out)
        _to_disk(out.parent)


@contextmanager
def whole_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """The same for a folder of files. With `force` a folder is replaced only if it holds a checkpoint and nothing else."""
    if os.path.lexists(out):
        if not out.is_dir() or out.is_symlink():
            raise CheckpointError(f"{out}: is there and is no folder; give another name")
        others = [path.name for path in out.iterdir() if not _is_ours(path)]
        if others:
            raise CheckpointError(f"{out}: holds more than a checkpoint, such as {others[0]!r}; give another name")
        if not force and any(out.iterdir()):
            raise _taken(out)
    with _beside(out) as scratch:
        made = scratch / out.name
        made.mkdir()
        yield made
        for path in made.iterdir():
            _to_disk(path)
        _to_disk(made)
        if out.exists() and any(out.iterdir()):
            _exchange(made, out)
        else:
            os.rename(made, out)
        _to_disk(out.parent)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A scratch folder on the same disk as `out`."""
    if not out.parent.is_dir():
        raise CheckpointError(
            f"{out}: there is no folder {out.parent} to write into; make it first: mkdir -p {out.parent}"
        )
    scratch = Path(tempfile.mkdtemp(prefix=".warmstart-", dir=out.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _without_replacing(made: Path, out: Path) -> None:
    try:
        os.link(made, out)  # unlike a rename, fails if something has come there meanwhile
    except FileExistsError:
        raise _taken(out) from None
    except OSError:  # a disk without hard links
        if os.path.lexists(out):
            raise _taken(out) from None
        os.rename(made, out)


def _exchange(made: Path, out: Path) -> None:
    """Both folders change places, in one step where the system has one: whoever looks finds the old or the new one, whole."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):  # Linux
        done = libc.renameat2(_HERE, os.fsencode(made), _HERE, os.fsencode(out), _EXCHANGE)
    elif hasattr(libc, "renamex_np"):  # macOS
        done = libc.renamex_np(os.fsencode(made), os.fsencode(out), _EXCHANGE)
    else:
        done = -1
    if done:  # Killed between these two, the old one is whole in the scratch folder, `replaced`.
        os.rename(out, made.parent / "replaced")
        os.rename(made, out)


def _taken(out: Path) -> CheckpointError:
    return CheckpointError(f"{out}: is there already; give another name, or --force to replace it")


def _is_ours(path: Path) -> bool:
    names = (".safetensors", ".safetensors.index.json", ".distcp")
    return path.is_file() and (path.name.endswith(names) or path.name in (".metadata", "warmstart.json"))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
