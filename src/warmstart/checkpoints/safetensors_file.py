"""safetensors files: a length, a JSON header, and the tensors' bytes without a gap."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import torch

from warmstart.checkpoints.leaves import (
    MAX_DIMS,
    Leaf,
    LeafCheckpoint,
    MappedFile,
    StridedLeaf,
    counted,
    row_major,
    shown,
    unfolds_too_far,
)
from warmstart.errors import CheckpointError

MAX_HEADER: Final = 100_000_000
HEADER_BUDGET: Final = 160 << 20

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


def open_safetensors(file: MappedFile, *, checkpoint_key: str | None) -> LeafCheckpoint:
    """Open a safetensors file.

    Raises:
        CheckpointError: It is truncated, or its header breaks a rule of the format.
    """
    location = str(file.path)
    header, data_start = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise _damaged(file, "'__metadata__' is not a mapping of strings")
    leaves: dict[str, Leaf] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        leaf, begin, end = _leaf(file, name, entry, data_start)
        leaves[name] = leaf
        places.append((begin, end, name))
    _check_places(file, places, data_start)
    if checkpoint_key is not None:
        raise CheckpointError(
            f"{location}: a safetensors file holds one tree, so checkpoint_key={shown(checkpoint_key)} names nothing in it; "
            f'leave checkpoint_key out, or choose names with select="{shown(checkpoint_key)[1:-1]}"'
        )
    if not leaves:
        raise CheckpointError(f"{location}: a safetensors file without tensors; save the model's state dict again")
    return LeafCheckpoint(leaves, location=location, format="safetensors", files=[file.stamp], metadata=metadata)


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.map[:8], "little")
    if length > MAX_HEADER:
        raise _damaged(file, f"its header claims {length:,} bytes; the format allows {MAX_HEADER:,}")
    if 8 + length > file.size:
        raise CheckpointError(
            f"{file.path}: truncated: the header alone should end at byte {8 + length:,} and the file has {file.size:,}; "
            "copy or download it again"
        )
    raw = file.map[8 : 8 + length]
    # What Python's objects for the header would take, before any is made.
    cost = 120 * (raw.count(b"[") + raw.count(b"{")) + 40 * raw.count(b",") + 40 * raw.count(b'"')
    if cost > HEADER_BUDGET:
        raise _damaged(
            file, f"its header of {length:,} bytes has too many parts to be read within {HEADER_BUDGET >> 20} MiB"
        )
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not valid JSON ({str(error)[:200]})") from error
    if type(header) is not dict:
        raise _damaged(file, f"its header is a JSON {type(header).__name__}, not an object")
    return header, 8 + length


def _leaf(file: MappedFile, name: str, entry: object, data_start: int) -> tuple[StridedLeaf, int, int]:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"the entry of {shown(name)} does not have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        raise CheckpointError(
            f"{file.path}: {shown(name)} has dtype {shown(code)}, which this torch ({torch.__version__}) cannot read; "
            "save it in another dtype, or install a newer torch"
        )
    if not _naturals(shape) or len(shape) > MAX_DIMS or unfolds_too_far(shape):
        raise _damaged(file, f"the shape of {shown(name)} is not a list of at most {MAX_DIMS} possible sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"the data_offsets of {shown(name)} are not two rising positions")
    begin, end = offsets
    need = math.prod(shape) * dtype.itemsize
    if end - begin != need:
        raise _damaged(
            file, f"{shown(name)} with shape {tuple(shape)} of {code} needs {need:,} bytes and has {end - begin:,}"
        )
    return StridedLeaf(file, data_start + begin, tuple(shape), dtype, row_major(shape)), begin, end


def _check_places(file: MappedFile, places: list[tuple[int, int, str]], data_start: int) -> None:
    expected = 0
    for begin, end, name in sorted(places):
        if begin != expected:
            kind = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise _damaged(file, f"{shown(name)} starts at byte {begin:,} of the data, not {expected:,}: it {kind}")
        expected = end
    total = data_start + expected
    if file.size < total:
        raise CheckpointError(
            f"{file.path}: truncated: expected {total:,} bytes for {counted(len(places), 'tensor')}, the file has "
            f"{file.size:,}; copy or download it again"
        )
    if file.size > total:
        raise _damaged(
            file, f"expected {total:,} bytes, the file has {file.size:,}: {file.size - total:,} belong to no tensor"
        )


def _naturals(value: object) -> bool:
    return type(value) is list and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _damaged(file: MappedFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: damaged safetensors file: {what}; get the file again from where it came")
