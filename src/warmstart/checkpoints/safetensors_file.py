"""safetensors files: a length, a JSON header, and the tensors' bytes without a gap."""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from warmstart.checkpoints import jsons
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import (
    MAX_DIMS,
    ByteSource,
    Leaf,
    LeafCheckpoint,
    StridedLeaf,
    row_major,
    unfolds_too_far,
)
from warmstart.errors import CheckpointError
from warmstart.showing import counted, shown

MAX_HEADER: Final = 100_000_000

_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
for _name, _torch in {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}.items():
    if hasattr(torch, _torch):
        _DTYPES[_name] = getattr(torch, _torch)

_FIELDS: Final = {"dtype", "shape", "data_offsets"}


def open_safetensors(file: MappedFile, *, checkpoint_key: str | None) -> LeafCheckpoint:
    """Open a safetensors file.

    Raises:
        CheckpointError: It is truncated, or its header breaks a rule of the format.
    """
    where = str(file.path)
    leaves, metadata = read_layout(file, where, checkpoint_key)
    return LeafCheckpoint(leaves, location=where, format="safetensors", files=[file.stamp], metadata=metadata)


def read_layout(source: ByteSource, where: str, checkpoint_key: str | None) -> tuple[dict[str, Leaf], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, of which no more than its header is taken.

    Args:
        source: The file's bytes.
        where: The file, as messages name it.
        checkpoint_key: Must be None: such a file holds one tree.

    Raises:
        CheckpointError: It is truncated, or its header breaks a rule of the format.
    """
    header, data_start = _read_header(source, where)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise _damaged(where, "'__metadata__' is not a mapping of strings")
    leaves: dict[str, Leaf] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        leaf, begin, end = _leaf(source, where, name, entry, data_start)
        leaves[name] = leaf
        places.append((begin, end, name))
    _check_places(source.size, where, places, data_start)
    if checkpoint_key is not None:
        raise CheckpointError(
            f"{where}: a safetensors file holds one tree, so checkpoint_key={shown(checkpoint_key)} names nothing in it; "
            f'leave checkpoint_key out, or choose names with select="{shown(checkpoint_key)[1:-1]}"'
        )
    if not leaves:
        raise CheckpointError(f"{where}: a safetensors file without tensors; save the model's state dict again")
    return leaves, metadata


def _read_header(source: ByteSource, where: str) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(_bytes(source, 0, 8), "little")
    if length > MAX_HEADER:
        raise _damaged(where, f"its header claims {length:,} bytes; the format allows {MAX_HEADER:,}")
    if 8 + length > source.size:
        raise CheckpointError(
            f"{where}: truncated: the header alone should end at byte {8 + length:,} and the file has {source.size:,}; "
            "copy or download it again"
        )
    raw = _bytes(source, 8, 8 + length)
    try:
        header = jsons.parse(raw)
    except ValueError as error:
        raise _damaged(where, f"its header is not valid JSON ({str(error)[:200]})") from error
    if type(header) is not dict:
        raise _damaged(where, f"its header is a JSON {type(header).__name__}, not an object")
    return header, 8 + length


def _leaf(source: ByteSource, where: str, name: str, entry: object, data_start: int) -> tuple[StridedLeaf, int, int]:
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _damaged(where, f"the entry of {shown(name)} does not have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: {shown(name)} has dtype {shown(code)}, which this torch ({torch.__version__}) cannot read; "
            "save it in another dtype, or install a newer torch"
        )
    if not _naturals(shape) or len(shape) > MAX_DIMS or unfolds_too_far(shape):
        raise _damaged(where, f"the shape of {shown(name)} is not a list of at most {MAX_DIMS} possible sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(where, f"the data_offsets of {shown(name)} are not two rising positions")
    (begin, end), sizes = offsets, tuple(shape)
    need = math.prod(sizes) * dtype.itemsize
    if end - begin != need:
        raise _damaged(
            where, f"{shown(name)} with shape {sizes} of {code} needs {need:,} bytes and has {end - begin:,}"
        )
    return StridedLeaf(source, data_start + begin, sizes, dtype, row_major(sizes)), begin, end


def _check_places(size: int, where: str, places: list[tuple[int, int, str]], data_start: int) -> None:
    expected = 0
    for begin, end, name in sorted(places):
        if begin != expected:
            kind = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise _damaged(where, f"{shown(name)} starts at byte {begin:,} of the data, not {expected:,}: it {kind}")
        expected = end
    total = data_start + expected
    if size < total:
        raise CheckpointError(
            f"{where}: truncated: expected {total:,} bytes for {counted(len(places), 'tensor')}, the file has "
            f"{size:,}; copy or download it again"
        )
    if size > total:
        raise _damaged(where, f"expected {total:,} bytes, the file has {size:,}: {size - total:,} belong to no tensor")


def _bytes(source: ByteSource, start: int, stop: int) -> bytes:
    stop = min(stop, source.size)
    return bytes(source.take(start, stop, 1).numpy()) if start < stop else b""


def _naturals(value: object) -> bool:
    if type(value) is not list:
        return False
    for number in value:  # noqa: SIM110 - a generator costs as much again
        if type(number) is not int or not 0 <= number < 1 << 62:
            return False
    return True


def _damaged(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: damaged safetensors file: {what}; get the file again from where it came")
