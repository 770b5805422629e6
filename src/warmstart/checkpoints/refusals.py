"""Checkpoints that an engine wrote for itself alone: recognised, and refused with the command that converts them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import CheckpointError
from warmstart.showing import listed

_ZERO_SHARD: Final = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_.*\.pt|.*_optim_states\.pt")
_SLICE: Final = re.compile(r"mp_rank_\d+_model_states\.pt")
_FLAT: Final = ("_flat_param", "flat_param")


def refuse_engine_folder(folder: Path, names: list[str]) -> None:
    """Refuse a folder that DeepSpeed wrote.

    Args:
        folder: The folder.
        names: What lies in it.

    Raises:
        CheckpointError: It is one.
    """
    root = folder
    if not any(_ZERO_SHARD.fullmatch(name) or _SLICE.fullmatch(name) for name in names):
        # The root of DeepSpeed's checkpoints: a file `latest` that names the newest of its folders.
        latest = folder / "latest"
        if not latest.is_file() or latest.stat().st_size > 4096:
            return
        tag = latest.read_text("utf-8", "replace").strip()
        if tag not in names or not any((folder / tag).glob("*_optim_states.pt")):
            return
    elif not (folder / "latest").is_file() and (folder.parent / "latest").is_file():
        root = folder.parent
    found = [name for name in names if _ZERO_SHARD.fullmatch(name) or _SLICE.fullmatch(name)] or names
    whole = [name for name in names if _SLICE.fullmatch(name)]
    hint = ""
    if len(whole) == 1 and not any(re.match(r"zero_pp_rank_\d+_mp_rank_\d+_model_states", name) for name in names):
        # ZeRO stages 1 and 2 leave the weights whole, in the precision of the training.
        hint = f'; its low-precision weights alone are in {folder / whole[0]}, with checkpoint_key="module"'
    raise CheckpointError(
        f"{folder}: a DeepSpeed checkpoint ({listed(sorted(found))}), whose weights are split over the ranks that trained; "
        f"join them once: {zero_command(root)}, and give {root / 'out'}{hint}"
    )


def refuse_engine_file(path: Path) -> None:
    """Refuse a file that holds one rank's part of a DeepSpeed checkpoint.

    Raises:
        CheckpointError: It is one.
    """
    if _ZERO_SHARD.fullmatch(path.name):
        root = path.parent.parent if (path.parent.parent / "latest").is_file() else path.parent
        raise CheckpointError(
            f"{path}: one rank's part of a DeepSpeed ZeRO checkpoint; join the parts once: {zero_command(root)}, and give "
            f"{root / 'out'}"
        )


def zero_command(root: Path) -> str:
    """The command that joins a ZeRO checkpoint's parts into weights in float32; DeepSpeed leaves the script beside them."""
    script = "zero_to_fp32.py" if (root / "zero_to_fp32.py").is_file() else "-m deepspeed.utils.zero_to_fp32"
    return f"cd {root} && python {script} . out"


def refuse_placeholders(checkpoint: Checkpoint) -> None:
    """Refuse a state dict that was saved without gathering what FSDP or ZeRO-3 had spread over ranks.

    Raises:
        CheckpointError: It is one.
    """
    flat = [key for key in checkpoint.keys() if key.rpartition(".")[2] in _FLAT]
    if flat:
        raise CheckpointError(
            f"{checkpoint.location}: {len(flat):,} of its {len(checkpoint):,} tensors are flat parameters of FSDP "
            f"({listed(flat)}), one rank's part without names or shapes; save the whole state dict, in the job that wrote it, "
            "on every rank: with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT): "
            'state = model.state_dict(); and on rank 0: torch.save(state, "weights.pt")'
        )
    # Only an entry of exactly this shape under a parameter's usual name: other empty tensors are what they are.
    weights = [key for key in checkpoint.keys() if key.endswith(("weight", "bias"))]
    empty = [key for key in weights if checkpoint.info(key).shape == (0,)]
    if not empty:
        return
    whole = {key.rpartition(".")[0] for key in weights if checkpoint.info(key).numel}
    if len(empty) == len(weights) or any(key.rpartition(".")[0] in whole for key in empty):
        root = checkpoint.files[0].path.parent if checkpoint.files else Path(".")
        raise CheckpointError(
            f"{checkpoint.location}: {len(empty):,} of its {len(weights):,} weights have size 0 ({listed(empty)}): the "
            "placeholders that DeepSpeed ZeRO-3 leaves where a weight is spread over ranks; take the engine's own checkpoint "
            f'and join its parts: {zero_command(root)}, or save with "stage3_gather_16bit_weights_on_model_save": true in '
            "DeepSpeed's config"
        )
