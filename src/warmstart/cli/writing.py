"""Writing a checkpoint tensor by tensor: safetensors in one file or in shards, and torch's distributed format.

Memory stays at about the largest tensor, or the largest group that one conversion makes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.safetensors_file import _DTYPES
from warmstart.errors import MappingError
from warmstart.lineage import METADATA_KEY, REPORT_NAME
from warmstart.mapping.grouping import printable
from warmstart.tensors import dtype_name

_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}
_ALIGNMENT: Final = 8
_CHUNK: Final = 64 << 20

Told = Callable[[int], None]
"""Called with the number of bytes that were written since."""


def write_safetensors(checkpoint: Checkpoint, path: Path, metadata: Mapping[str, str], told: Told) -> None:
    """One safetensors file.

    Raises:
        MappingError: A dtype or a name that the format does not have.
        CheckpointError: The source cannot be read.
        OSError: The file cannot be written.
    """
    _check(checkpoint)
    _write_file(checkpoint, list(checkpoint.keys()), path, metadata, told)


def write_shards(
    checkpoint: Checkpoint, folder: Path, metadata: Mapping[str, str], told: Told, max_shard_size: int
) -> None:
    """Shards of safetensors, of at most `max_shard_size` bytes (a larger tensor has one alone), and their index.

    Raises:
        MappingError, CheckpointError, OSError: As `write_safetensors`.
    """
    _check(checkpoint)
    shards = list(_shards(checkpoint, max_shard_size))
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(keys, name)
        _write_file(checkpoint, keys, folder / name, metadata, told)
    total = sum(checkpoint.info(key).nbytes for key in checkpoint.keys())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_dcp(checkpoint: Checkpoint, folder: Path, metadata: Mapping[str, str], told: Told) -> None:
    """A folder of `torch.distributed.checkpoint`, with the lineage beside it.

    Raises:
        CheckpointError: The source cannot be read.
        OSError: The folder cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.state_dict_saver import save

    class Streaming(DefaultSavePlanner):
        """Plans on tensors without memory and reads each when it is written."""

        def lookup_object(self, index: MetadataIndex) -> Tensor:
            tensor = checkpoint.read(index.fqn)
            told(tensor.numel() * tensor.element_size())
            return tensor

    infos = {key: checkpoint.info(key) for key in checkpoint.keys()}
    placeholders = {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in infos.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is meant
            save(
                placeholders,
                storage_writer=FileSystemWriter(folder),
                planner=Streaming(flatten_state_dict=False),
                no_dist=True,
            )
    except CheckpointException as error:
        (cause, *_) = [wrapped[0] for wrapped in error.failures.values()]
        raise cause from None
    (folder / REPORT_NAME).write_text(f'{{"lineage": {metadata[METADATA_KEY]}}}\n', encoding="utf-8")


def _check(checkpoint: Checkpoint) -> None:
    for key in checkpoint.keys():
        dtype = checkpoint.info(key).dtype
        if dtype not in _CODES:
            raise MappingError(
                f"dtype: '{printable(key)}' is {dtype_name(dtype)}, which safetensors files do not have; write "
                "--format dcp, or leave it out with --select"
            )
        if key == "__metadata__" or key != key.encode("utf-8", "replace").decode("utf-8"):
            raise MappingError(
                f"safetensors files cannot have a tensor named '{printable(key)}'; rename it with --rename"
            )


def _shards(checkpoint: Checkpoint, limit: int) -> Iterator[list[str]]:
    keys: list[str] = []
    filled = 0
    for key in checkpoint.keys():
        size = checkpoint.info(key).nbytes
        if keys and filled + size > limit:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += size
    yield keys


def _write_file(
    checkpoint: Checkpoint, keys: Sequence[str], path: Path, metadata: Mapping[str, str], told: Told
) -> None:
    # Wide elements first, so that every tensor is aligned for readers that map the file.
    keys = sorted(keys, key=lambda key: -checkpoint.info(key).dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in keys:
        info = checkpoint.info(key)
        header[key] = {"dtype": _CODES[info.dtype], "shape": info.shape, "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in keys:
            _write_tensor(checkpoint.read(key), file, told)


def _write_tensor(tensor: Tensor, file: BinaryIO, told: Told) -> None:
    """A tensor's elements in row-major order and little-endian, without a copy where they lie so."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big" and tensor.element_size() > 1:
        size = tensor.element_size() // (2 if tensor.is_complex() else 1)
        flat = flat.view(-1, size).flip(1).reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        told(file.write(flat[start : start + _CHUNK].numpy().data))


def checked_size(text: str) -> int:
    """`5GB`, `500MB` or a number of bytes.

    Raises:
        ValueError: It is none of them.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    size = int(float(number) * unit)
    if size <= 0:
        raise ValueError(text)
    return size
