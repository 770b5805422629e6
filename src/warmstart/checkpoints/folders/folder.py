"""Folders of weights: which file of one is the model's, told by the names the ecosystem uses, never by a guess."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.folders.sharded import INDEX_SUFFIX, read_index
from warmstart.checkpoints.refusals import refuse_engine_folder
from warmstart.errors import CheckpointError
from warmstart.showing import counted, listed, shown

# What save_pretrained of transformers, diffusers and PEFT writes; the first that is there is preferred.
_FAMILIES: Final = {
    "a model": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "a diffusion model": (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.bin.index.json",
    ),
    "an adapter": ("adapter_model.safetensors", "adapter_model.bin"),
}
_WEIGHTS: Final = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".h5", ".hdf5", ".keras",
)  # fmt: skip
# What trainers write beside the weights.
_BESIDE: Final = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state)[\w.-]*", re.IGNORECASE
)
MAX_ENTRIES: Final = 200_000
_SHARD: Final = re.compile(r".*-\d{5}-of-\d{5}\.\w+")


@dataclass(frozen=True, slots=True)
class Choice:
    """What a folder's names say of it.

    Attributes:
        main: The file that is the model's.
        others: Files that may hold the same model in another format.
        strays: Other files of weights, by their suffix.
    """

    main: str
    others: tuple[str, ...]
    strays: tuple[str, ...]


def choose(names: Sequence[str], *, where: str, spell: Callable[[str], str]) -> Choice:
    """Which of a folder's files is its model.

    Args:
        names: The names of the files in it.
        where: The folder, for messages.
        spell: A file's name as the source to type.

    Raises:
        CheckpointError: None of them is, or several may be; the message lists what there is, each as a line to type.
    """
    weights = sorted(name for name in names if _is_weights(name))
    families = {
        what: [name for name in family if name in names]
        for what, family in _FAMILIES.items()
        if any(name in names for name in family)
    }
    if len(families) > 1:
        mains = [present[0] for present in families.values()]
        raise CheckpointError(
            f"{where}: holds {' and '.join(families)}; say which one to take, with one of:\n{_menu(mains, spell)}"
        )
    if families:
        (present,) = families.values()
        return Choice(present[0], tuple(present[1:]), tuple(name for name in weights if name not in present))
    indexes = [name for name in weights if name.endswith(INDEX_SUFFIX)]
    mains = [name for name in weights if not (indexes and _SHARD.fullmatch(name))]
    if len(indexes) == 1 and mains == indexes:
        return Choice(indexes[0], (), tuple(name for name in weights if name not in indexes))
    if len(mains) == 1:
        return Choice(mains[0], (), ())
    if mains:
        several = "" if len(mains) > 8 or indexes else "; to load several into one model, give them as a list"
        raise CheckpointError(
            f"{where}: holds {counted(len(mains), 'file')} of weights and nothing that says which one is the model{several}; "
            f"give one of:\n{_menu(mains, spell)}"
        )
    raise CheckpointError(f"{where}: holds no weights: {_what_there_is(names)}")


def open_folder(
    path: Path,
    *,
    checkpoint_key: str | None,
    open_file: Callable[[Path], Checkpoint],
    look_at: Callable[[Path], Checkpoint],
) -> Checkpoint:
    """Open the model of a folder: of `save_pretrained`, of `.npy` files, or with just one file of weights.

    Args:
        path: The folder.
        checkpoint_key: The tree to take, for what holds no files with trees of their own.
        open_file: Opens one file or index of it.
        look_at: The same for a file that is only compared: never trusted to run code.

    Raises:
        CheckpointError: Nothing in it is the model, several files may be, or two formats in it disagree.
    """
    files, folders = _entries(path)
    refuse_engine_folder(path, [*files, *folders])
    weights = [name for name in files if _is_weights(name)]
    if all(name.endswith(".npy") for name in weights) and _holds_only_npy(path):
        from warmstart.checkpoints.folders.npy_folder import open_npy_folder

        return open_npy_folder(path, checkpoint_key=checkpoint_key)
    try:
        choice = choose(files, where=str(path), spell=lambda name: str(path / name))
    except CheckpointError as error:
        if weights:
            raise
        raise CheckpointError(f"{error}{_subfolders(path, folders)}") from None
    checkpoint = open_file(path / choice.main)
    notes = [note for name in choice.others for note in _compare(path, choice.main, checkpoint, name, look_at)]
    shards = {name for index in (choice.main, *choice.others) for name in _shards(path / index)}
    strays = [name for name in choice.strays if name not in shards]
    if strays:
        verb = "was" if len(strays) == 1 else "were"
        notes.append(f"{counted(len(strays), 'file')} beside {choice.main} {verb} left aside: {listed(strays)}")
    checkpoint.notes = (*checkpoint.notes, *notes)
    return checkpoint


def _compare(
    path: Path, main: str, checkpoint: Checkpoint, other: str, open_file: Callable[[Path], Checkpoint]
) -> list[str]:
    if other.endswith(INDEX_SUFFIX) and main in _shards(path / other):
        return []  # an index of the one file
    try:
        rival = open_file(path / other)
    except (CheckpointError, OSError) as error:
        return [f"{other} beside {main} was left aside, it is not complete: {str(error)[:300]}"]
    ours, theirs = set(checkpoint.keys()), set(rival.keys())
    # A file of torch keeps every name of a tied tensor, safetensors just one.
    kept = {_place(rival, key) for key in theirs & ours}
    extra = sorted(key for key in theirs - ours if _place(rival, key) not in kept or _place(rival, key)[1] < 0)
    lacking = sorted(ours - theirs)
    if extra or lacking:
        differ = [f"{listed(keys, 1)} only in {name}" for name, keys in ((main, lacking), (other, extra)) if keys]
        raise CheckpointError(
            f"{path}: {main} and {other} are both complete and hold different tensors ({'; '.join(differ)}), so one of them is "
            f"not this model; say which one to take, with one of:\n{_menu([main, other], lambda name: str(path / name))}"
        )
    common = ours & theirs
    reshaped = sorted(key for key in common if checkpoint.info(key).shape != rival.info(key).shape)
    if reshaped:
        key = reshaped[0]
        raise CheckpointError(
            f"{path}: {main} and {other} are both complete and {counted(len(reshaped), 'tensor')} differ in shape "
            f"({shown(key)} is {checkpoint.info(key).shape} and {rival.info(key).shape}), so one of them is not this model; "
            f"say which one to take, with one of:\n{_menu([main, other], lambda name: str(path / name))}"
        )
    same = all(checkpoint.info(key).dtype == rival.info(key).dtype for key in common)
    what = "the same names and shapes" if same else "the same names and shapes in another dtype"
    return [f"{main} was taken and {other} beside it was not: they hold {what}; their values were not compared"]


def _place(checkpoint: Checkpoint, key: str) -> tuple[int, int, tuple[int, ...]]:
    info = checkpoint.info(key)
    return info.file, info.offset, info.shape


def _shards(path: Path) -> set[str]:
    if not path.name.endswith(INDEX_SUFFIX):
        return set()
    try:
        return set(read_index(path).values())
    except (CheckpointError, OSError):
        return set()


def _entries(path: Path) -> tuple[list[str], list[str]]:
    with os.scandir(path) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    return [entry.name for entry in entries if not entry.is_dir() and entry.is_file()], folders


def _is_weights(name: str) -> bool:
    return name.lower().endswith((*_WEIGHTS, INDEX_SUFFIX)) and _BESIDE.fullmatch(name) is None


def _holds_only_npy(path: Path) -> bool:
    """Whether a folder and all below it hold `.npy` files and no other weights."""
    found, seen = False, 0
    for _, folders, names in os.walk(path):
        seen += len(folders) + len(names)
        weights = [name for name in names if _is_weights(name)]
        if seen > MAX_ENTRIES or not all(name.endswith(".npy") for name in weights):
            return False
        found = found or bool(weights)
    return found


def _menu(names: Sequence[str], spell: Callable[[str], str], limit: int = 12) -> str:
    lines = [f"  {shown(spell(name), 300)}" for name in names[:limit]]
    return "\n".join([*lines, f"  and {len(names) - limit:,} more"] if len(names) > limit else lines)


def _what_there_is(names: Sequence[str]) -> str:
    if any(name.lower().endswith(".gguf") for name in names):
        return (
            f"only {listed([name for name in names if name.lower().endswith('.gguf')])}, GGUF files, whose tensors are "
            "quantized blocks; use the original weights (safetensors) of that model"
        )
    return f"there is {listed(sorted(names), 8)}" if names else "there are no files in it"


def _subfolders(path: Path, folders: Sequence[str]) -> str:
    known = {".metadata", *(name for family in _FAMILIES.values() for name in family)}
    holding = [name for name in folders if os.access(path / name, os.R_OK | os.X_OK)]
    holding = [name for name in holding if known.intersection(os.listdir(path / name))]
    if holding:
        return f'; give the part to take: subfolder="{holding[-1]}" (of {listed(holding, 8)})'
    beside = f"; its folders are {listed(folders, 8)}" if folders else ""
    return f"{beside}; give the file of weights itself, or the folder that save_pretrained() wrote"
