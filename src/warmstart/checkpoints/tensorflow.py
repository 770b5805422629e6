"""TensorFlow's own checkpoints: recognised, and refused with the lines that convert them; only TensorFlow reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from warmstart.checkpoints.files import MappedFile
from warmstart.errors import CheckpointError

_DATA: Final = re.compile(r"(.*)\.data-\d{5}-of-\d{5}", re.DOTALL)
# The end of an SSTable, which an index is.
_TABLE: Final = bytes.fromhex("57fb808b247547db")
_STATE: Final = b"model_checkpoint_path:"


def refuse_tensorflow(path: Path, file: MappedFile | None = None) -> None:
    """Refuse a part of a TensorFlow checkpoint, the prefix that names one, or a folder that holds one.

    Args:
        path: What was given; it need not be there.
        file: The file, where it is one.

    Raises:
        CheckpointError: It is one.
    """
    if file is not None:
        data = _DATA.fullmatch(path.name)
        if data is not None and _index_of(path.with_name(data[1])).is_file():
            raise _refused(path, path.with_name(data[1]))
        if path.suffix == ".index" and file.map[max(0, file.size - 8) : file.size] == _TABLE:
            raise _refused(path, path.with_suffix(""))
        if path.name == "checkpoint" and file.map[: len(_STATE)] == _STATE:
            raise _refused(path, path.parent / _newest(file))
        return
    if path.is_dir():
        for folder in (path, path / "variables"):
            found = sorted(folder.glob("*.index")) if folder.is_dir() else []
            prefixes = [p.with_suffix("") for p in found if any(folder.glob(f"{_plain(p.stem)}.data-*"))]
            if prefixes:
                raise _refused(path, prefixes[-1])
        return
    if not path.exists() and path.name and _index_of(path).is_file():
        raise _refused(path, path)


def _newest(file: MappedFile) -> str:
    match = re.match(rb'model_checkpoint_path:\s*"([^"\n]*)"', file.map[:4096])
    return match[1].decode("utf-8", "replace") if match else "model.ckpt"


def _index_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")


def _plain(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _refused(path: Path, prefix: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: a TensorFlow checkpoint, which only TensorFlow itself reads; convert it once, where that is installed:\n"
        "  import numpy, tensorflow\n"
        f"  reader = tensorflow.train.load_checkpoint({str(prefix)!r})\n"
        "  numpy.savez('weights.npz', **{k: reader.get_tensor(k) for k in reader.get_variable_to_shape_map()})"
    )
