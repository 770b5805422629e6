"""HDF5 files: Keras' `.h5` and `.weights.h5`, the one inside a `.keras` archive, and any other with numeric datasets.

A damaged HDF5 file can crash the library that reads it, so the library only ever runs in a process of its own, which says
what lies where (`hdf5_walk.py`). The data itself is read here, from the mapped file, without that library.
"""

from __future__ import annotations

import base64
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from warmstart.checkpoints import jsons
from warmstart.checkpoints.archive import STORED, Member
from warmstart.checkpoints.base import TensorInfo
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.hdf5.hdf5_chunks import FILTERS, Chunk
from warmstart.checkpoints.leaves import (
    MAX_DIMS,
    OVERLAP_LIMIT,
    HeldBytes,
    Leaf,
    LeafCheckpoint,
    StridedLeaf,
    row_major,
    unfolds_too_far,
)
from warmstart.checkpoints.pickled.building import is_swapped
from warmstart.checkpoints.pickled.refs import StorageRef, TensorRef, Unreadable, torch_dtype, why_not
from warmstart.checkpoints.signatures import H5, KERAS_MEMBER
from warmstart.checkpoints.torch_files.boxes import PiecedLeaf
from warmstart.checkpoints.trees import take_tree
from warmstart.checkpoints.walking import is_optimizer_name
from warmstart.checkpoints.windows import Window
from warmstart.errors import CheckpointError
from warmstart.showing import shown

MAX_ANSWER: Final = 96 << 20
SECONDS: Final = 120
INSTALL: Final = "pip install 'warmstart[keras]'"
_WALK: Final = Path(__file__).with_name("hdf5_walk.py")


def open_h5(source: str | Path | MappedFile, *, checkpoint_key: str | None = None) -> LeafCheckpoint:
    """Open an HDF5 file: every dataset is a key, its path with dots.

    Args:
        source: The file.
        checkpoint_key: The group to take, its path with dots; its datasets are then named from there. Optimizer states,
            which Keras keeps in a group beside the weights, are never taken.

    Raises:
        CheckpointError: It is damaged or hostile, its data lies in other files, or h5py is not installed.
    """
    file = source if isinstance(source, MappedFile) else MappedFile(Path(source))
    return checkpoint_of(file, inventory(file), checkpoint_key=checkpoint_key)


def open_keras(file: MappedFile, member: Member, *, checkpoint_key: str | None = None) -> LeafCheckpoint:
    """Open the weights of a `.keras` archive.

    Raises:
        CheckpointError: They are compressed, damaged or hostile, or h5py is not installed.
    """
    if member.method != STORED:
        raise CheckpointError(
            f"{file.path}: {shown(member.name)} is compressed, which Keras never does; unpack it and give the file itself: "
            f"unzip {file.path.name} {KERAS_MEMBER}"
        )
    window = Window(file, member.start, member.size)
    if window.map[:8] != H5:
        raise CheckpointError(
            f"{file.path}: {shown(member.name)} is no HDF5 file; get the file again from where it came"
        )
    answer = inventory(file, member.start, member.size)
    return checkpoint_of(window, answer, checkpoint_key=checkpoint_key, format="Keras archive", shift=member.start)


def inventory(file: MappedFile, start: int = 0, size: int | None = None) -> dict[str, Any]:
    """What lies in an HDF5 file, as a process of its own found it.

    Raises:
        CheckpointError: h5py is not installed, or it could not read the file, crashed over it or did not come to an end.
    """
    where = str(file.path)
    if importlib.util.find_spec("h5py") is None:
        raise CheckpointError(f"{where}: is an HDF5 file (Keras), which is read with h5py; install it: {INSTALL}")
    if not sys.executable:
        raise CheckpointError(
            f"{where}: an HDF5 file is examined by a Python process of its own, and this program does not say where Python "
            "is; set sys.executable to it, or convert the file: numpy.savez(path, **arrays)"
        )
    command = [sys.executable, "-P", str(_WALK), where, str(start), str(file.size if size is None else size)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "PYTHONWARNINGS": "ignore",
        "OPENBLAS_NUM_THREADS": "1",
        "HDF5_PLUGIN_PRELOAD": "::",  # no code from filter plugins
    }
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _damaged(where, f"the HDF5 library did not come to an end within {SECONDS} s") from error
    file.check()
    if done.returncode < 0:
        raise _damaged(where, f"the HDF5 library crashes over it (signal {-done.returncode})")
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise CheckpointError(
            f"{where}: h5py does not run ({shown(last[0] if last else 'no message', 300)}); install it anew: {INSTALL}"
        )
    return read_answer(done.stdout, where)


def read_answer(raw: bytes, where: str) -> dict[str, Any]:
    """The answer of the walking process.

    Raises:
        CheckpointError: The walk failed, or its answer is none.
    """
    if len(raw) > MAX_ANSWER:
        raise _damaged(where, f"what it describes takes more than {MAX_ANSWER >> 20} MiB")
    try:
        answer = jsons.parse(raw)
    except ValueError as error:
        raise _damaged(where, f"what it describes cannot be told ({str(error)[:200]})") from error
    if type(answer) is not dict or "error" in answer:
        text = answer["error"] if type(answer) is dict else "no answer"
        raise _damaged(where, f"the HDF5 library says {shown(text, 300)}")
    return answer


def checkpoint_of(
    file: MappedFile,
    answer: Mapping[str, Any],
    *,
    checkpoint_key: str | None = None,
    format: str = "HDF5",
    shift: int = 0,
) -> LeafCheckpoint:
    """The checkpoint of what the walking process found.

    Args:
        file: The file, or the part of one.
        answer: What lies in it.
        checkpoint_key: The group to take.
        format: The container, in words.
        shift: Where `file` starts within the whole file.

    Raises:
        CheckpointError: A dataset does not lie inside the file, lies in another one, or is none that can be read.
    """
    where = str(file.path)
    datasets = {tuple(found["path"]): found for found in answer["datasets"]}
    groups = {tuple(path) for path in answer["groups"]}
    for path, kind, target in answer["links"]:
        _follow(where, tuple(path), kind, target, datasets, groups)
    if not datasets:
        raise CheckpointError(f"{where}: an HDF5 file without datasets; save the model's weights again")
    root: dict[str, Any] = {}
    for number, (path, found) in enumerate(datasets.items()):
        _put(where, root, path, _raw(str(number), found), nested=checkpoint_key not in {None, ""})
    tree = take_tree(root, location=where, checkpoint_key=checkpoint_key)
    by_number = list(datasets.values())
    leaves: dict[str, Leaf] = {}
    for key, raw in tree.tensors.items():
        if isinstance(raw, Unreadable):
            raise CheckpointError(f"{where}: {shown(key)} is {raw.reason}")
        assert isinstance(raw, TensorRef)
        leaves[key] = _leaf(file, f"{where}: {shown(key)}", by_number[int(raw.storage.key)], raw, shift)
    return LeafCheckpoint(
        leaves, location=where, format=format, files=[file.stamp], checkpoint_key=tree.key, notes=tree.notes
    )


def _follow(
    where: str,
    path: tuple[str, ...],
    kind: str,
    target: str,
    datasets: dict[tuple[str, ...], Any],
    groups: set[tuple[str, ...]],
) -> None:
    if kind != "soft":
        raise CheckpointError(
            f"{where}: {shown('/'.join(path))} is a link to another file, {shown(target)}, and is not followed; copy what it "
            "leads to into this file: h5copy"
        )
    steps = [step for step in target.split("/") if step not in {"", "."}]
    goal = tuple(steps) if target.startswith("/") else (*path[:-1], *steps)
    if goal in datasets:
        datasets[path] = datasets[goal]
    elif goal in groups and path[: len(goal)] != goal:
        inside = {p: found for p, found in datasets.items() if p[: len(goal)] == goal}
        datasets.update({(*path, *p[len(goal) :]): found for p, found in inside.items()})
    elif goal not in groups:
        raise CheckpointError(
            f"{where}: {shown('/'.join(path))} is a link to {shown(target)}, which does not lie in the file; remove the link, "
            "or copy what it leads to into this file: h5copy"
        )


def _put(where: str, root: dict[str, Any], path: tuple[str, ...], raw: object, *, nested: bool) -> None:
    branch, parts = root, path
    if nested:
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        parts = path[-1:]
    elif len(path) > 1 and is_optimizer_name(path[0]):
        branch, parts = root.setdefault(path[0], {}), path[1:]
    name = ".".join(parts)
    if name in branch:
        raise CheckpointError(
            f"{where}: two datasets are both spelled {shown(name)} with dots; rename one of them: h5copy"
        )
    branch[name] = raw


def _raw(number: str, found: Mapping[str, Any]) -> TensorRef | Unreadable | None:
    why, code = found["why"], (found["dtype"] or "").lstrip("<>|=")
    if why in {"string", "empty"}:
        return None
    if why is not None:
        return Unreadable(_in_words(why))
    dtype = torch_dtype(code)
    if dtype is None:
        return Unreadable(f"of numpy dtype {shown(code)}: {why_not(code)}")
    shape = tuple(found["shape"])
    if len(shape) > MAX_DIMS or unfolds_too_far(shape) or any(size < 0 for size in shape):
        return Unreadable("a dataset whose sizes are beyond all use; get the file again from where it came")
    layout = found["layout"]
    if layout not in {"contiguous", "compact", "chunked"}:
        return Unreadable(
            f"a dataset of layout {shown(layout)}, whose data lies elsewhere, in other files mostly; copy it into a plain "
            "dataset: h5py.File(path, 'w')[name] = dataset[()]"
        )
    return TensorRef(StorageRef(dtype, number, math.prod(shape)), dtype, 0, shape, row_major(shape))


def _in_words(why: str) -> str:
    kind, _, detail = why.partition(" ")
    if kind == "opaque":
        return "of an opaque type: " + why_not("V2")
    if kind == "bits":
        return f"of a number type of its own, which h5py reads as {detail}; save it as a plain one, such as float32"
    return f"of a type that holds no plain numbers ({shown(detail)}); save its fields as datasets of their own"


def _leaf(file: MappedFile, where: str, found: Mapping[str, Any], ref: TensorRef, shift: int) -> Leaf:
    swapped = is_swapped(found["dtype"][:1])
    info = TensorInfo(ref.shape, ref.dtype)
    layout = found["layout"]
    if layout == "compact":
        data = base64.b64decode(found["data"])
        if len(data) != info.nbytes:
            raise _damaged(where, f"it needs {info.nbytes:,} bytes and its header holds {len(data):,}")
        return StridedLeaf(HeldBytes(data), 0, ref.shape, ref.dtype, row_major(ref.shape), swapped, file=-1)
    if layout == "contiguous" and found["at"] is not None and info.numel:
        at, size = found["at"], found["size"]
        if at < 0 or size != info.nbytes or at + size > file.size:
            raise _damaged(
                where, f"shape {ref.shape} of {ref.dtype} needs {info.nbytes:,} bytes at byte {at:,}, of {file.size:,}"
            )
        # A window's first byte is not the file's: the place that is told is the file's.
        leaf = StridedLeaf(file, at, ref.shape, ref.dtype, row_major(ref.shape), swapped)
        return leaf if not shift else PiecedLeaf(TensorInfo(ref.shape, ref.dtype, shift + at, 0), [_Whole(leaf)])
    chunks = _chunks(file, where, found, ref, swapped) if layout == "chunked" and info.numel else []
    held = len(chunks) * math.prod(found["chunk"]) * ref.dtype.itemsize if chunks else 0
    if info.nbytes > max(held, file.size, OVERLAP_LIMIT):
        raise _damaged(where, f"it claims {info.nbytes:,} bytes and the file holds {held:,} for it")
    place = shift + chunks[0].at if chunks else -1
    info = TensorInfo(ref.shape, ref.dtype, place, 0 if chunks else -1)
    return PiecedLeaf(info, chunks, _fill(found, ref.dtype, swapped))


class _Whole:
    """A dataset in one place as the only piece of itself."""

    def __init__(self, leaf: StridedLeaf) -> None:
        self.offsets = (0,) * len(leaf.shape)
        self.sizes = leaf.shape
        self.read = leaf.read


def _chunks(file: MappedFile, where: str, found: Mapping[str, Any], ref: TensorRef, swapped: bool) -> list[Chunk]:
    box, filters, flat = tuple(found["chunk"]), tuple(found["filters"]), found["stored"]
    unknown = [number for number in filters if number not in FILTERS]
    if unknown:
        raise CheckpointError(
            f"{where} is compressed by a method (filter {unknown[0]}) that is not read here; pack it anew with the usual one: "
            "h5repack -f GZIP=1 FILE NEW"
        )
    rank = len(ref.shape)
    if len(box) != rank or any(n <= 0 for n in box) or unfolds_too_far(box) or len(flat) % (rank + 3):
        raise _damaged(where, "its chunks have sizes that are none")
    chunks: dict[tuple[int, ...], Chunk] = {}
    total = 0
    for i in range(0, len(flat), rank + 3):
        offsets, (mask, at, size) = tuple(flat[i : i + rank]), flat[i + rank : i + rank + 3]
        if offsets in chunks or any(o < 0 or o >= n or o % b for o, n, b in zip(offsets, ref.shape, box, strict=True)):
            raise _damaged(where, f"a chunk at {offsets} lies outside, or is there twice")
        sizes = tuple(min(b, n - o) for b, n, o in zip(box, ref.shape, offsets, strict=True))
        chunk = Chunk(file, offsets, sizes, box, ref.dtype, at, size, filters, mask, swapped, where)
        total += size
        if at < 0 or size < 0 or at + size > file.size or total > file.size or not chunk.plausible():
            raise _damaged(
                where, f"the chunk at {offsets} cannot lie in {size:,} bytes at byte {at:,} of {file.size:,}"
            )
        chunks[offsets] = chunk
    return list(chunks.values())


def _fill(found: Mapping[str, Any], dtype: torch.dtype, swapped: bool) -> Tensor:
    raw = bytes.fromhex(found["fill"])
    if swapped:
        half = len(raw) // 2 if dtype.is_complex else len(raw)
        raw = b"".join(raw[i : i + half][::-1] for i in range(0, len(raw), half or 1))
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy()).view(dtype).reshape(())


def _damaged(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: damaged HDF5 file: {what}; get the file again from where it came")
