"""One checkpoint joined from shards: an index says which tensor lies in which file, and nothing else is taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from torch import Tensor

from warmstart.checkpoints import jsons
from warmstart.checkpoints.base import Checkpoint, Index, TensorInfo
from warmstart.checkpoints.files import FileStamp, Place
from warmstart.checkpoints.places import snapshot_of
from warmstart.errors import CheckpointError
from warmstart.showing import counted, listed, shown

MAX_INDEX: Final = 100_000_000
INDEX_SUFFIX: Final = ".index.json"


class ShardedCheckpoint(Checkpoint):
    """The tensors that an index names, each read from its shard."""

    def __init__(
        self,
        index: FileStamp,
        shards: Mapping[str, Checkpoint],
        weight_map: Mapping[str, str],
        *,
        notes: list[str],
    ) -> None:
        """Join shards that hold what the index says.

        Args:
            index: The index file.
            shards: Each shard's checkpoint, by the name that the index gives it.
            weight_map: Tensor to shard.
            notes: What was left out.
        """
        files: list[FileStamp] = []
        first: dict[str, int] = {}
        for name, shard in shards.items():
            first[name] = len(files)
            files += shard.files
        infos = {key: _moved(shards[name].info(key), first[name]) for key, name in weight_map.items()}
        formats = sorted({shard.format for shard in shards.values()})
        super().__init__(
            location=str(index.path),
            format=f"{' and '.join(formats)}, {counted(len(shards), 'shard')}",
            infos=infos,
            files=[*files, index],  # the index last: tensors name the files before it by their place
            metadata={name: text for shard in shards.values() for name, text in shard.metadata.items()},
            versions={path: entry for shard in shards.values() for path, entry in shard.versions.items()},
            notes=notes,
        )
        self._shards = {key: shards[name] for key, name in weight_map.items()}

    def place(self, key: str) -> Place | None:
        return self._shards[key].place(key)

    def _read(self, key: str, index: Index | None) -> Tensor:
        return self._shards[key].read(key, index)


def open_sharded(path: Path, *, checkpoint_key: str | None, open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Open the checkpoint that an index file describes; every shard is there and whole, or nothing is opened.

    Args:
        path: The index, such as `model.safetensors.index.json`.
        checkpoint_key: Must be None: shards hold one tree.
        open_file: Opens one shard, whatever format it has.

    Raises:
        CheckpointError: The index is damaged or leads out of its folder, or a shard is missing, damaged, or lacks a tensor.
    """
    stamp = FileStamp.of(path)
    weight_map = read_index(path)
    if checkpoint_key is not None:
        raise CheckpointError(
            f"{path}: an index describes one tree, so checkpoint_key={shown(checkpoint_key)} names nothing in it; leave "
            f'checkpoint_key out, or choose names with select="{shown(checkpoint_key)[1:-1]}"'
        )
    wanted: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        wanted.setdefault(name, []).append(key)
    places = {name: _place(path, name) for name in sorted(wanted)}
    missing = [name for name, place in places.items() if not place.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: names {counted(len(places), 'shard')}, of which {len(missing):,} "
            f"{'is' if len(missing) == 1 else 'are'} not there: {listed(missing, 8)}; copy or download "
            f"{'it' if len(missing) == 1 else 'them'} into {path.parent}, beside the index"
        )
    shards = {name: open_file(place) for name, place in places.items()}
    for name, keys in wanted.items():
        _check_keys(path, name, keys, shards)
    return ShardedCheckpoint(stamp, shards, weight_map, notes=_notes(path, wanted, shards))


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor to shard, as the index spells them.

    Raises:
        CheckpointError: It is no index, or a shard's name in it leads out of its folder.
    """
    size = path.stat().st_size
    if size > MAX_INDEX:
        raise _damaged(path, f"it has {size:,} bytes; at most {MAX_INDEX:,} are read")
    try:
        content = jsons.parse(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, f"it is not valid JSON ({str(error)[:200]})") from error
    if type(content) is not dict:
        raise _damaged(path, f"it is a JSON {type(content).__name__}, not an object")
    weight_map = content.get("weight_map")
    if type(weight_map) is not dict:
        raise _damaged(path, "it has no object 'weight_map', which says in which file each tensor lies")
    if not weight_map:
        raise _damaged(path, "its 'weight_map' is empty")
    for key, name in weight_map.items():
        if type(name) is not str:
            raise _damaged(path, f"the shard of {shown(key)} is a JSON {type(name).__name__}, not a file name")
    for name in set(weight_map.values()):
        _check_name(path, name)
    return weight_map


def _check_name(path: Path, name: str) -> None:
    pure = PurePosixPath(name)
    leads_out = pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive or "\\" in name
    if leads_out or "\0" in name or not pure.parts:
        raise CheckpointError(
            f"{path}: its shard {shown(name)} is not a file within the folder of the index, which may be an attack; put "
            "every shard beside the index and name it there without a path"
        )


def _place(path: Path, name: str) -> Path:
    folder = path.parent
    place = folder / name
    target = place.resolve()
    if target.is_relative_to(folder.resolve()):
        return place
    # The hub's cache keeps a snapshot as links to files beside it, named by their hash: those are the model's own.
    snapshot = snapshot_of(folder) or snapshot_of(folder.resolve())
    if snapshot is not None and target.parent == (snapshot.root / "blobs").resolve():
        return place
    raise CheckpointError(
        f"{path}: its shard {shown(name)} is a link that leads out of the folder, to {target}; copy the file itself into "
        f"{folder}"
    )


def _check_keys(path: Path, name: str, keys: list[str], shards: Mapping[str, Checkpoint]) -> None:
    lacking = [key for key in keys if key not in shards[name]]
    if not lacking:
        return
    elsewhere = sorted({other for other, shard in shards.items() if lacking[0] in shard})
    where = f" ({shown(lacking[0])} lies in {shown(elsewhere[0])} instead)" if elsewhere else ""
    raise CheckpointError(
        f"{path}: {shown(name)} should hold {counted(len(keys), 'tensor')} and lacks {len(lacking):,} of them: "
        f"{listed(lacking)}{where}; index and shards are not of one save: get all of them again from where they came"
    )


def _notes(path: Path, wanted: Mapping[str, list[str]], shards: Mapping[str, Checkpoint]) -> list[str]:
    notes = list(dict.fromkeys(note for shard in shards.values() for note in shard.notes))
    beside = [key for name, shard in shards.items() for key in sorted(set(shard.keys()).difference(wanted[name]))]
    if beside:
        verb = "lies" if len(beside) == 1 else "lie"
        notes.append(
            f"{counted(len(beside), 'tensor')} that {verb} in the shards but not where {path.name} says "
            f"{'was' if len(beside) == 1 else 'were'} left out: {listed(beside)}"
        )
    return notes


def _moved(info: TensorInfo, by: int) -> TensorInfo:
    if info.file < 0:
        return info
    return TensorInfo(info.shape, info.dtype, info.offset, info.file + by)


def _damaged(path: str | os.PathLike[str], what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged index of shards: {what}; get the file again from where it came")
