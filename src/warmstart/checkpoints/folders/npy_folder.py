"""A folder of `.npy` files: one tensor each, named by its path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from torch import Tensor

from warmstart.checkpoints.base import Checkpoint, Index, TensorInfo
from warmstart.checkpoints.files import FileStamp, MappedFile
from warmstart.checkpoints.numpy_file import open_npy
from warmstart.checkpoints.signatures import NPY
from warmstart.errors import CheckpointError
from warmstart.showing import shown

MAX_FILES: Final = 100_000


class NpyFolderCheckpoint(Checkpoint):
    """Arrays in files of their own; each is mapped only while it is read, for there may be more than can be open at once."""

    def __init__(self, path: Path, files: dict[str, tuple[FileStamp, TensorInfo]]) -> None:
        super().__init__(
            location=str(path),
            format=f"folder of numpy npy, {len(files):,} files",
            infos={
                key: TensorInfo(info.shape, info.dtype, info.offset, place)
                for place, (key, (_, info)) in enumerate(files.items())
            },
            files=[stamp for stamp, _ in files.values()],
        )

    def _read(self, key: str, index: Index | None) -> Tensor:
        stamp = self.files[self.info(key).file]
        file = MappedFile(stamp.path)
        if file.stamp != stamp:
            raise CheckpointError(f"{stamp.path}: was written to after it was opened; open the folder again")
        checkpoint = open_npy(file, checkpoint_key=None)
        return checkpoint.read(checkpoint.keys()[0], index)


def open_npy_folder(path: Path, *, checkpoint_key: str | None) -> Checkpoint:
    """Open a folder of `.npy` files: `encoder/weight.npy` is the key `encoder.weight`.

    Raises:
        CheckpointError: A file of it is damaged or holds no numeric array, or two have the same key.
    """
    if checkpoint_key is not None:
        raise CheckpointError(
            f"{path}: a folder of npy files holds one tree, so checkpoint_key={shown(checkpoint_key)} names nothing in it; "
            f'leave checkpoint_key out, or choose names with select="{shown(checkpoint_key)[1:-1]}"'
        )
    files: dict[str, tuple[FileStamp, TensorInfo]] = {}
    for found in _walk(path):
        key = ".".join(found.relative_to(path).with_suffix("").parts)
        if key in files:
            raise CheckpointError(
                f"{path}: two files are both the key {shown(key)}: {files[key][0].path} and {found}; rename one"
            )
        files[key] = _look(found)
    return NpyFolderCheckpoint(path, files)


def _walk(path: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".npy")]
        if len(found) > MAX_FILES:
            raise CheckpointError(f"{path}: holds more than {MAX_FILES:,} npy files; save the arrays in one npz file")
    return found


def _look(path: Path) -> tuple[FileStamp, TensorInfo]:
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); copy or download it again")
    file = MappedFile(path)
    with file.scattered():
        magic = file.map[: len(NPY)]
    if magic != NPY:
        raise CheckpointError(f"{path}: is named as a numpy file and is none; take it out of the folder")
    checkpoint = open_npy(file, checkpoint_key=None)
    if checkpoint.keys() != (path.stem,) or checkpoint.info(path.stem).file != 0:
        raise CheckpointError(f"{path}: holds Python objects, not one plain array; give this file itself as the source")
    return file.stamp, checkpoint.info(path.stem)
