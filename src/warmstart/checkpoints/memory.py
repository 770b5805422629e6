"""Tensors that are in memory already: a state dict, nested mappings, numpy arrays, a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from warmstart.checkpoints.base import Index, TensorInfo
from warmstart.checkpoints.files import FileStamp
from warmstart.checkpoints.leaves import Leaf, LeafCheckpoint, TensorLeaf
from warmstart.checkpoints.pickled.refs import ML_DTYPES, numpy_code, torch_dtype, why_not
from warmstart.checkpoints.trees import take_tree
from warmstart.errors import CheckpointError
from warmstart.shards import is_sharded
from warmstart.showing import listed, shown


@dataclass(frozen=True, slots=True, eq=False)
class NumpyLeaf:
    """A numpy array or scalar, turned into a tensor when it is read."""

    array: np.ndarray[Any, Any]
    dtype: torch.dtype

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.array.shape, self.dtype)

    def read(self, index: Index | None) -> Tensor:
        array = self.array if index is None else np.asarray(self.array[index])
        if array.dtype.name in ML_DTYPES:
            array = array.view(f"u{array.dtype.itemsize}")
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        # torch takes no negative strides, and warns of memory that it could write to by mistake.
        if not array.flags.writeable or any(step < 0 or step % array.itemsize for step in array.strides):
            array = array.copy()
        tensor = torch.from_numpy(array)
        return tensor if tensor.dtype == self.dtype else tensor.view(self.dtype)


class MemoryCheckpoint(LeafCheckpoint):
    """Tensors in memory; torch counts what is written to them, numpy does not."""

    def watch(self) -> None:
        self._counts = {key: _writes(leaf) for key, leaf in self._leaves.items()}

    def changed(self) -> str | None:
        for key, leaf in self._leaves.items():
            if _writes(leaf) != self._counts[key]:
                return f"{self.location}: {shown(key)} was written to after it was opened"
        return super().changed()


def _writes(leaf: Leaf) -> int:
    tensor = leaf.tensor if isinstance(leaf, TensorLeaf) else None
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def open_memory(
    source: Mapping[Any, Any] | nn.Module,
    *,
    checkpoint_key: str | None,
    location: str | None = None,
    format: str = "memory",
    files: Sequence[FileStamp] = (),
    notes: Sequence[str] = (),
) -> LeafCheckpoint:
    """A state dict, nested mapping or module as a checkpoint; nothing is copied.

    Raises:
        CheckpointError: It holds no tensors, several trees, or tensors without plain data.
    """
    if location is None:
        location = f"a {type(source).__name__} in memory" if isinstance(source, nn.Module) else "a state dict in memory"
    tree = take_tree(source, location=location, checkpoint_key=checkpoint_key)
    leaves: dict[str, Leaf] = {}
    left_out = []
    for key, raw in tree.tensors.items():
        if isinstance(raw, Tensor):
            check_tensor(raw, f"{location}: {shown(key)}")
            leaves[key] = TensorLeaf(raw)
            continue
        array = np.asarray(raw)
        dtype = dtype_of_array(array)
        if dtype is not None:
            leaves[key] = NumpyLeaf(array, dtype)
        elif array.dtype.kind in "SUMm":
            left_out.append(key)
        else:
            raise CheckpointError(
                f"{location}: {shown(key)} has dtype {array.dtype}: {why_not(numpy_code(array.dtype))}"
            )
    if not leaves:
        raise CheckpointError(
            f"{location}: holds no numeric tensors, only {listed(left_out)}; pass a mapping of tensors"
        )
    left = [f"strings or dates were left out: {listed(left_out)}"] if left_out else []
    held = MemoryCheckpoint(
        leaves,
        location=location,
        format=format,
        files=files,
        checkpoint_key=tree.key,
        versions=tree.versions,
        notes=[*notes, *tree.notes, *left],
    )
    held.watch()
    return held


def check_tensor(tensor: Tensor, where: str) -> None:
    """Refuse a tensor whose elements are not plain data in one place.

    Raises:
        CheckpointError: It is on meta, distributed, sparse, quantized or nested.
    """
    if is_sharded(tensor):
        raise CheckpointError(
            f"{where} is sharded over ranks, and this one holds a part of it; pass all of it: tensor.full_tensor(), or a copy "
            "made inside deepspeed.zero.GatheredParameters([tensor])"
        )
    if tensor.is_meta:
        raise CheckpointError(f"{where} is on the meta device and has no data; pass the model after it got its weights")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise CheckpointError(f"{where} is a {tensor.layout} or nested tensor; pass tensor.to_dense()")
    if tensor.is_quantized:
        raise CheckpointError(f"{where} is a quantized tensor; pass tensor.dequantize()")


def dtype_of_array(array: np.ndarray[Any, Any]) -> torch.dtype | None:
    """The torch dtype of an array's elements; None if torch has none."""
    if type(array.dtype).__module__ != "numpy.dtypes" and array.dtype.name in ML_DTYPES:
        found: torch.dtype = ML_DTYPES[array.dtype.name]
        return found
    if array.dtype.names is not None or array.dtype.kind not in "biufc":
        return None
    return torch_dtype(numpy_code(array.dtype))
