"""Models that accelerate dispatches: what lies on the CPU or on disk is a placeholder, and its hook has the value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors, offload_weight
from torch import Tensor, nn

from warmstart import CheckpointError

_MEMBER = "_warmstart_tensors"  # of a hook: the tensors over its memory, the same ones each time


@contextmanager
def onloaded(model: nn.Module) -> Iterator[None]:
    """Within it, what is offloaded is there: each placeholder gives way to a tensor over the memory that its hook reads.

    That is the tensor of the hook's map, or a mapping of its file on disk: nothing is copied, and what is written is what
    the next forward computes with. Weights that a hook reads from a safetensors file are first copied out of it into the
    offload folder: the file is not ours to write to.

    Raises:
        CheckpointError: A hook reads from a file, and has no folder to copy it to.
    """
    swapped: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    try:
        for root, hook in _offloading(model):
            for name, placeholder in _placeholders(root, hook):
                path, _, leaf = name.rpartition(".")
                owner = root.get_submodule(path)
                real = _real(hook, name, placeholder)
                _put(owner, leaf, real)
                swapped.append((owner, leaf, placeholder, real))
        yield
    finally:
        for owner, leaf, placeholder, real in swapped:
            _put(owner, leaf, placeholder)
            if isinstance(placeholder, nn.Parameter):
                placeholder.requires_grad_(real.requires_grad)


def is_offloaded(model: nn.Module) -> bool:
    """Whether a part of the model is a placeholder between its forwards."""
    return bool(_offloading(model))


def _offloading(model: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    found = []
    for module in model.modules():
        own: ModelHook | None = getattr(module, "_hf_hook", None)
        for hook in own.hooks if isinstance(own, SequentialHook) else (own,):
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                found.append((module, hook))
    return found


def _placeholders(root: nn.Module, hook: AlignDevicesHook) -> list[tuple[str, Tensor]]:
    tensors = named_module_tensors(
        root, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return [(name, tensor) for name, tensor in tensors if tensor.is_meta]


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        assert isinstance(tensor, nn.Parameter)
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _real(hook: AlignDevicesHook, name: str, placeholder: Tensor) -> Tensor:
    known: dict[str, Tensor] = vars(hook).setdefault(_MEMBER, {})
    if name not in known:
        memory = _memory(hook.weights_map, name).detach()
        is_parameter = isinstance(placeholder, nn.Parameter)
        known[name] = nn.Parameter(memory, placeholder.requires_grad) if is_parameter else memory
    return known[name]


def _memory(weights: Any, key: str) -> Tensor:
    """The tensor that a map has under a key, over the map's own memory."""
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    if not isinstance(weights, OffloadedWeightsLoader) or key in weights.state_dict:
        tensor: Tensor = weights[key]
        return tensor
    if weights.index[key].get("safetensors_file") is not None:
        if weights.save_folder is None:
            raise CheckpointError(
                f"'{key}' is read from {weights.index[key]['safetensors_file']} at each forward, and cannot be written to; "
                "dispatch the model with offload_folder="
            )
        offload_weight(weights[key], key, weights.save_folder, index=weights.index)
    facts = weights.index[key]
    shape, dtype = tuple(facts["shape"]), str(facts["dtype"])
    stored = {"bfloat16": "int16"}.get(dtype, "int8" if dtype.startswith("float8_") else dtype)
    mapped = np.memmap(Path(weights.save_folder, f"{key}.dat"), dtype=stored, mode="r+", shape=shape or (1,))
    tensor = torch.from_numpy(mapped).reshape(shape)
    return tensor if stored == dtype else tensor.view(getattr(torch, dtype))
