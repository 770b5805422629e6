"""Optimizer moments among flat keys: tensors beside the weights that are none."""

from __future__ import annotations

import re
from typing import Final

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.walking import is_optimizer_name
from warmstart.showing import counted, listed

_NAMES: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_MOMENT: Final = re.compile(rf"(.+)[./](?:{'|'.join(_NAMES)})", re.DOTALL)


def leave_moments(checkpoint: Checkpoint) -> None:
    """Take keys under an optimizer's name, and moments beside the tensor they belong to, out of a checkpoint, with a note.

    What is nothing but such keys is left as it is: a model's own module may be called so.
    """
    keys = checkpoint.keys()
    moments = [key for key in keys if _is_moment(key, checkpoint)]
    if moments and len(moments) < len(keys):
        checkpoint.leave_out(moments)
        what = f"{counted(len(moments), 'tensor')} of an optimizer's state left out: {listed(moments)}"
        checkpoint.notes = (*checkpoint.notes, f'{what}; checkpoint_key="" takes them')


def _is_moment(key: str, checkpoint: Checkpoint) -> bool:
    if is_optimizer_name(key) and re.search("[./]", key):
        return True
    match = _MOMENT.fullmatch(key) if key.endswith(_NAMES) else None
    return match is not None and match[1] in checkpoint
