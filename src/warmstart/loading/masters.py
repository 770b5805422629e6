"""Copies in higher precision that DeepSpeed's optimizer keeps of parameters and writes back at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warmstart.shards import Run, full_shape, shard_of
from warmstart.tensors import same_bits


def has_master(tensor: Tensor) -> bool:
    """Whether a DeepSpeed optimizer was made of the parameter: its own copy wins over what is written from then on."""
    return hasattr(tensor, "_z3_optimizer") or getattr(tensor, "_hp_mapping", None) is not None


def is_stale(tensor: Any) -> bool:
    """Whether the optimizer's copy of what this process holds has other values: its next step would undo the load."""
    if not has_master(tensor) or not tensor.requires_grad:
        return False
    shard = shard_of(tensor)
    if hasattr(tensor, "_z3_optimizer"):
        try:
            master = tensor._z3_optimizer.get_local_fp32_param(tensor)[: shard.local.numel()]
        except KeyError:  # in none of the optimizer's groups
            return False
        mine = shard.local
    else:
        mapping = tensor._hp_mapping
        start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        master = mapping.hp_fragment
        mine = Run(full_shape(tensor), start, start + count).take(shard.local.detach())
    with torch.no_grad():
        return not same_bits(master.detach().reshape(-1).to(mine.dtype), mine)
