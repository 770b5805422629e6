"""What a few values say against a proposal: a running variance is positive, a norm's weight is near one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from warmstart.checkpoints.base import Checkpoint
from warmstart.mapping.model.targets import Target
from warmstart.mapping.suggesting.inference import Guess

_TENSORS = 4  # of each proposal that are looked at
_ROWS = 64  # of each of them
_FAR = 0.05  # a norm's weights whose mean is nearer to zero than this look like a bias


def refuted(guess: Guess, keys: Mapping[str, str], entries: Mapping[str, Target], checkpoint: Checkpoint) -> bool:
    """Whether the values of a proposal's keys cannot be those of its entries. Reads a bounded sample."""
    pairs = [pair for match in guess.readings[0] for pair in match.names().items()]
    return any(_refutes(checkpoint, keys[key], entries[entry]) for entry, key in pairs[:_TENSORS])


def _refutes(checkpoint: Checkpoint, key: str, target: Target) -> bool:
    info = checkpoint.info(key)
    if info.dtype.is_floating_point != target.dtype.is_floating_point:
        return True
    if not info.dtype.is_floating_point or len(info.shape) != 1:
        return False
    sample = checkpoint.read(key, slice(0, _ROWS)).to(torch.float32)
    if target.leaf == "running_var":
        return bool((sample < 0).any())
    norm = "norm" in type(target.owner).__name__.lower()
    return norm and target.leaf == "weight" and bool(sample.mean().abs() < _FAR)
