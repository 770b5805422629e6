"""From what an unpickled file describes to a checkpoint: each tensor is given its place, and its place is checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import (
    ByteSource,
    HeldBytes,
    Leaf,
    LeafCheckpoint,
    StridedLeaf,
    TensorLeaf,
    check_extent,
    column_major,
    row_major,
    unfolds_too_far,
)
from warmstart.checkpoints.pickled.refs import ArrayRef, StorageRef, TensorRef, Unreadable, torch_dtype, why_not
from warmstart.checkpoints.trees import take_tree
from warmstart.checkpoints.walking import Raw
from warmstart.errors import CheckpointError
from warmstart.showing import listed, shown


@dataclass(frozen=True, slots=True)
class Place:
    """Where a storage's bytes lie."""

    source: ByteSource
    start: int
    swapped: bool = False
    file: int = 0


def build_checkpoint(
    content: object,
    file: MappedFile,
    *,
    format: str,
    checkpoint_key: str | None,
    place: Callable[[StorageRef], Place],
    notes: Sequence[str] = (),
) -> LeafCheckpoint:
    """The checkpoint of what a pickle described.

    Raises:
        CheckpointError: No single tree can be taken, or a tensor of it does not lie inside its storage.
    """
    location = str(file.path)
    tree = take_tree(content, location=location, checkpoint_key=checkpoint_key)
    leaves: dict[str, Leaf] = {}
    left_out = []
    for key, raw in tree.tensors.items():
        leaf = _leaf(raw, f"{location}: {shown(key)}", file.size, place)
        if leaf is None:
            left_out.append(key)
        else:
            leaves[key] = leaf
    if not leaves:
        raise CheckpointError(
            f"{location}: holds no numeric tensors, only {listed(left_out)}; save tensors or numeric arrays"
        )
    left = [f"strings or dates were left out: {listed(left_out)}"] if left_out else []
    made = LeafCheckpoint(
        leaves,
        location=location,
        format=format,
        files=[file.stamp],
        checkpoint_key=tree.key,
        versions=tree.versions,
        notes=[*notes, *tree.notes, *left],
    )
    made.callbacks = content.get("callbacks") if isinstance(content, dict) else None
    return made


def held_place(storage: StorageRef) -> Place:
    """The place of a storage that its own pickle carries."""
    if storage.data is None:
        raise CheckpointError(f"a storage {shown(storage.key)} without data")
    return Place(HeldBytes(storage.data), storage.start, storage.swapped, -1)


def _leaf(raw: Raw, where: str, file_size: int, place: Callable[[StorageRef], Place]) -> Leaf | None:
    if isinstance(raw, TensorRef):
        return _tensor_leaf(raw, where, file_size, place)
    if isinstance(raw, ArrayRef):
        return array_leaf(raw, where)
    if isinstance(raw, Unreadable):
        raise CheckpointError(f"{where} is {raw.reason}")
    assert not isinstance(raw, (np.ndarray, np.generic))
    assert isinstance(raw, Tensor)
    return TensorLeaf(raw)


def _tensor_leaf(ref: TensorRef, where: str, file_size: int, place: Callable[[StorageRef], Place]) -> StridedLeaf:
    held = ref.storage.data is not None
    storage = held_place(ref.storage) if held else place(ref.storage)
    wrong = check_extent(ref.shape, ref.stride, ref.offset, ref.dtype, ref.storage.nbytes, file_size)
    if wrong is not None:
        raise CheckpointError(
            f"{where} (storage {shown(ref.storage.key)}): damaged: {wrong}; get the file again from where it came"
        )
    return StridedLeaf(
        storage.source,
        storage.start + (0 if held else ref.storage.start) + ref.offset * ref.dtype.itemsize,
        ref.shape,
        ref.dtype,
        ref.stride,
        storage.swapped,
        ref.conjugate and ref.dtype.is_complex,
        ref.negative and ref.dtype != torch.bool,
        storage.file,
    )


def array_leaf(ref: ArrayRef, where: str) -> StridedLeaf | None:
    """A numpy array that a pickle holds; None for strings and dates, which are no weights.

    Raises:
        CheckpointError: It has a dtype that torch lacks, or its data is not as long as its shape says.
    """
    if ref.dtype is None or isinstance(ref.data, list):
        raise CheckpointError(
            f"{where}: damaged: an array without a description; get the file again from where it came"
        )
    code = ref.dtype.code
    if code[:1] in {"S", "U", "M", "m", "a"}:
        return None
    dtype = torch_dtype(code) if ref.dtype.plain else None
    if dtype is None:
        kind = why_not(code) if ref.dtype.plain else "it is a structured array; save its fields as arrays of their own"
        raise CheckpointError(f"{where} has numpy dtype {shown(code)}: {kind}")
    need = math.prod(ref.shape) * dtype.itemsize
    if any(size < 0 for size in ref.shape) or unfolds_too_far(ref.shape) or need != len(ref.data):
        raise CheckpointError(
            f"{where}: damaged: shape {ref.shape} of {code} needs {need:,} bytes and has {len(ref.data):,}; "
            "get the file again from where it came"
        )
    stride = column_major(ref.shape) if ref.fortran else row_major(ref.shape)
    return StridedLeaf(HeldBytes(ref.data), 0, ref.shape, dtype, stride, is_swapped(ref.dtype.order), file=-1)


def is_swapped(order: str) -> bool:
    """Whether numpy's byte order mark is not this machine's order."""
    return order in {"<", ">"} and (order == "<") != (sys.byteorder == "little")
