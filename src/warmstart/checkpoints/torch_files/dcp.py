"""Folders of `torch.distributed.checkpoint`: a pickle that says which box of which tensor lies where, and the files.

Neither that package nor a process group is needed: the pickle is read by our own restricted unpickler, in which the few
dataclasses it names stay inert, and each item of a file is an archive of `torch.save` that our own reader opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from warmstart.checkpoints.archive import read_directory
from warmstart.checkpoints.base import Index, TensorInfo
from warmstart.checkpoints.files import FileStamp, MappedFile
from warmstart.checkpoints.leaves import MAX_DIMS, Leaf, LeafCheckpoint, row_major, unfolds_too_far
from warmstart.checkpoints.pickled import pickles
from warmstart.checkpoints.pickled.building import build_checkpoint
from warmstart.checkpoints.pickled.refs import StorageRef, Stub, TensorRef, TorchConstant, Unreadable
from warmstart.checkpoints.signatures import DCP_METADATA as METADATA
from warmstart.checkpoints.torch_files.boxes import Piece, PiecedLeaf, not_a_tiling
from warmstart.checkpoints.torch_files.torch_file import find_pickle, unpickle
from warmstart.checkpoints.trees import take_tree
from warmstart.checkpoints.walking import is_optimizer_name
from warmstart.checkpoints.windows import Window
from warmstart.errors import CheckpointError
from warmstart.showing import shown

MAX_MAPS: Final = 64
_CONVERT: Final = (
    "convert the folder once: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt"
)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an item lies: a file of the folder by its number, and its bytes in it."""

    file: int
    offset: int
    length: int


@dataclass(slots=True)
class _Files:
    """The files of a folder, each mapped when it is first read, and no more than a few at a time."""

    folder: Path
    numbers: dict[str, int] = field(default_factory=dict)
    stamps: list[FileStamp] = field(default_factory=list)
    _maps: dict[int, MappedFile] = field(default_factory=dict)

    def number(self, name: object) -> int:
        if type(name) is not str or not name or name in {".", ".."} or any(c in name for c in "/\\\0"):
            raise CheckpointError(
                f"{self.folder}: {METADATA} names a file {shown(name)}, which is no file in the folder and may be an attack; "
                "get the folder again from where it came"
            )
        if name not in self.numbers:
            path = self.folder / name
            try:
                self.stamps.append(FileStamp.of(path))
            except OSError as error:
                raise CheckpointError(
                    f"{path}: is missing, and {METADATA} says that it holds tensors; copy the whole folder again"
                ) from error
            self.numbers[name] = len(self.numbers)
        return self.numbers[name]

    def map(self, number: int) -> MappedFile:
        file = self._maps.get(number)
        if file is None:
            stamp = self.stamps[number]
            file = MappedFile(stamp.path)
            if file.size < stamp.size:
                raise CheckpointError(
                    f"{stamp.path}: had {stamp.size:,} bytes when it was opened and has {file.size:,} now; something is "
                    "rewriting it: open it again when that is done"
                )
            if len(self._maps) >= MAX_MAPS:
                del self._maps[next(iter(self._maps))]
            self._maps[number] = file
        return file


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """One box of a tensor, as `torch.save` wrote it."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    files: _Files
    place: _Place

    def read(self, index: Index | None) -> Tensor:
        if 0 in self.sizes:
            return torch.empty(self.sizes, dtype=self.dtype)[... if index is None else index]
        window = Window(self.files.map(self.place.file), self.place.offset, self.place.length)
        where = f"{window.path} ({shown(self.name)}, at byte {self.place.offset:,})"
        if window.map[:4] != b"PK\x03\x04":
            kind = (
                "safetensors" if self.files.map(self.place.file).map[8:9] == b"{" else "nothing that torch.save writes"
            )
            raise CheckpointError(f"{where}: there is {kind}; {_CONVERT}")
        try:
            members = read_directory(window)
            folder = find_pickle(members)
            if folder is None:
                raise CheckpointError("an archive without a pickle; copy the whole folder again")
            content, _, place = unpickle(window, members, folder)
            if not isinstance(content, (TensorRef, Unreadable)):
                raise CheckpointError(f"holds something that is no tensor; {_CONVERT}")
            item = build_checkpoint({"item": content}, window, format="item", checkpoint_key=None, place=place)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        info = item.info("item")
        if (info.shape, info.dtype) != (self.sizes, self.dtype):
            raise CheckpointError(
                f"{where}: {METADATA} says {self.sizes} {self.dtype} and the item is {info.shape} {info.dtype}; "
                "copy the whole folder again"
            )
        return item.read("item", index)


def open_dcp(folder: str | Path, *, checkpoint_key: str | None = None) -> LeafCheckpoint:
    """Open a folder that `torch.distributed.checkpoint` wrote.

    Args:
        folder: The folder that holds `.metadata`.
        checkpoint_key: The tree to take, such as `model`, where it holds several.

    Returns:
        The checkpoint: tensors that were saved in shards read as one, and a slice reads the shards it meets.

    Raises:
        CheckpointError: A file is missing, truncated or damaged, or there is no single tree of weights.
    """
    folder = Path(folder)
    metadata, stamp = _metadata(folder)
    entries = _field(metadata, "state_dict_metadata")
    storage = _field(metadata, "storage_data")
    if type(entries) is not dict or type(storage) is not dict:
        raise _damaged(folder, "it does not say which tensors there are and where they lie")
    files = _Files(folder)
    places = _places(folder, storage, entries, files)
    leaves: dict[str, PiecedLeaf] = {}
    for name, entry in entries.items():
        if type(name) is not str:
            raise _damaged(folder, "a name that is no text")
        if _kind(entry) == "TensorStorageMetadata":
            leaves[name] = _leaf(folder, name, entry, places, files)
    paths = _field(metadata, "planner_data")
    content = _nested(folder, entries, leaves, paths if type(paths) is dict else {})
    tree = take_tree(content, location=str(folder), checkpoint_key=checkpoint_key)
    taken: dict[str, Leaf] = {}
    for key, raw in tree.tensors.items():
        assert isinstance(raw, TensorRef)
        taken[key] = leaves[raw.storage.key]
    return LeafCheckpoint(
        taken,
        location=str(folder),
        format="torch DCP",
        files=[*files.stamps, stamp],  # .metadata last: tensors name the files before it by their number
        checkpoint_key=tree.key,
        notes=tree.notes,
    )


def _metadata(folder: Path) -> tuple[object, FileStamp]:
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: holds no {METADATA}, which torch.distributed.checkpoint writes last: the save did not finish, or the "
            "file was left behind (its name starts with a dot): copy the whole folder again"
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); copy the whole folder again")
    file = MappedFile(path)
    file.check()
    # Names, boxes and places only: more data comes with more of them.
    records = sum(p.stat().st_size for p in folder.glob("*.distcp")) // 8192
    try:
        content, _ = pickles.load(file.map[:], where=str(path), records=min(records, file.size // 64))
    except CheckpointError as error:
        # What a pickle is told to do next does not fit: there is no folder to trust here.
        raise CheckpointError(
            f"{str(error).rpartition(';')[0] or error}; if you trust the folder, {_CONVERT}"
        ) from error
    return content, file.stamp


def _places(
    folder: Path, storage: Mapping[Any, Any], entries: Mapping[Any, Any], files: _Files
) -> dict[tuple[str, tuple[int, ...]], _Place]:
    places: dict[tuple[str, tuple[int, ...]], _Place] = {}
    for index, info in storage.items():
        name, offsets = _field(index, "fqn"), _field(index, "offset")
        if type(name) is not str:
            raise _damaged(folder, "a place that belongs to no name")
        if offsets is None or _kind(entries.get(name)) != "TensorStorageMetadata":
            continue  # a number or an object, which is never opened
        where = f"{shown(name)} at {_shown_sizes(offsets)}"
        if _field(info, "transform_descriptors"):
            raise CheckpointError(
                f"{folder}: {where} was transformed when it was saved (compressed, mostly); {_CONVERT}"
            )
        offset, length = _field(info, "offset"), _field(info, "length")
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise _damaged(folder, f"the place of {where} is not two positions")
        number = files.number(_field(info, "relative_path"))
        size = files.stamps[number].size
        if offset + length > size:
            raise CheckpointError(
                f"{files.stamps[number].path}: truncated: {where} should end at byte {offset + length:,} and the file has "
                f"{size:,}; copy it again"
            )
        if (name, _sizes(folder, name, offsets)) in places:
            raise _damaged(folder, f"{where} is there twice")
        places[name, _sizes(folder, name, offsets)] = _Place(number, offset, length)
    return places


def _leaf(
    folder: Path, name: str, entry: object, places: dict[tuple[str, tuple[int, ...]], _Place], files: _Files
) -> PiecedLeaf:
    dtype, shape = _dtype(folder, name, entry), _sizes(folder, name, _field(entry, "size"))
    if unfolds_too_far(shape):
        raise _damaged(folder, f"the sizes of {shown(name)} multiply to more than 2**58 elements")
    chunks = _field(entry, "chunks")
    if type(chunks) is not list:
        raise _damaged(folder, f"{shown(name)} has no list of shards")
    boxes = [(_sizes(folder, name, _field(c, "offsets")), _sizes(folder, name, _field(c, "sizes"))) for c in chunks]
    wrong = not_a_tiling(shape, boxes)
    if wrong is not None:
        raise CheckpointError(
            f"{folder}: {shown(name)}: {wrong}; the save did not finish on every rank: take an older one, or save it again"
        )
    pieces: list[Piece] = []
    for offsets, sizes in boxes:
        if 0 in sizes or 0 in shape:
            continue
        place = places.get((name, offsets))
        if place is None:
            raise _damaged(folder, f"it does not say where the shard of {shown(name)} at {offsets} lies")
        item = _Item(name, offsets, sizes, dtype, files, place)
        need = TensorInfo(sizes, dtype).nbytes
        if need > place.length:
            raise _damaged(
                folder, f"the shard of {shown(name)} at {offsets} needs {need:,} bytes and has {place.length:,}"
            )
        pieces.append(item)
    first = pieces[0].place if pieces and isinstance(pieces[0], _Item) else _Place(-1, -1, 0)
    return PiecedLeaf(TensorInfo(shape, dtype, first.offset, first.file), pieces)


def _dtype(folder: Path, name: str, entry: object) -> torch.dtype:
    properties = _field(entry, "properties")
    # TensorProperties spells its state as a tuple that starts with the dtype.
    state = properties.state if isinstance(properties, Stub) else None
    first = state[0] if type(state) is tuple and state else state.get("dtype") if type(state) is dict else None
    dtype = first.value if type(first) is TorchConstant else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"{folder}: {shown(name)} has a dtype that this torch ({torch.__version__}) does not have; install the version "
            "that wrote it"
        )
    if dtype in {torch.qint8, torch.quint8, torch.qint32}:
        raise CheckpointError(f"{folder}: {shown(name)} is a quantized tensor; dequantize() it and save it again")
    return dtype


def _nested(
    folder: Path, entries: Mapping[Any, Any], leaves: Mapping[str, PiecedLeaf], paths: Mapping[Any, Any]
) -> dict[Any, Any]:
    root: dict[Any, Any] = {}
    for name in entries:
        *above, last = _path(name, paths.get(name))
        branch = root
        for part in above:
            branch = branch.setdefault(part, {})
            if type(branch) is not dict:
                raise _damaged(folder, f"{shown(name)} lies below something that is no branch")
        if last in branch:
            raise _damaged(folder, f"{shown(name)} is there twice")
        leaf = leaves.get(name)
        if leaf is None:
            branch[last] = None
            continue
        info = leaf.info
        branch[last] = TensorRef(
            StorageRef(info.dtype, name, info.numel), info.dtype, 0, info.shape, row_major(info.shape)
        )
    return root


def _path(name: str, path: object) -> tuple[str | int, ...]:
    # The planner keeps where in the nested dict each flat name came from.
    if type(path) is tuple and 0 < len(path) <= MAX_DIMS and all(type(part) in {str, int} for part in path):
        return path
    parts = name.split(".")
    for i, part in enumerate(parts[:3], 1):
        if is_optimizer_name(part) and i < len(parts):
            return (*parts[:i], ".".join(parts[i:]))
    return (name,)


def _field(stub: object, name: str) -> Any:
    state = stub.state if isinstance(stub, Stub) else None
    return state.get(name) if type(state) is dict else None


def _kind(stub: object) -> str:
    return type(stub).qualified_name.rpartition(".")[2] if isinstance(stub, Stub) else ""


def _sizes(folder: Path, name: str, value: object) -> tuple[int, ...]:
    if (
        not isinstance(value, (tuple, list))
        or len(value) > MAX_DIMS
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    ):
        raise _damaged(folder, f"{shown(name)} has a size or offset that is none")
    return tuple(value)


def _shown_sizes(value: object) -> str:
    return str(tuple(value))[:100] if isinstance(value, (tuple, list)) else "an unknown offset"


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder / METADATA}: damaged: {what}; copy the whole folder again")
