"""numpy's own files: `.npy` with one array, or with pickled arrays; `.npz`, a zip archive of them."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from warmstart.checkpoints.archive import DEFLATED, STORED, Member, inflate
from warmstart.checkpoints.base import Index, TensorInfo
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import (
    MAX_DIMS,
    Leaf,
    LeafCheckpoint,
    StridedLeaf,
    column_major,
    row_major,
    unfolds_too_far,
)
from warmstart.checkpoints.pickled import pickles
from warmstart.checkpoints.pickled.building import build_checkpoint, held_place, is_swapped
from warmstart.checkpoints.pickled.refs import ArrayRef, OrderedDictRef, StorageRef, torch_dtype, why_not
from warmstart.checkpoints.signatures import NPY
from warmstart.checkpoints.torch_files.torch_legacy import storage_from_bytes
from warmstart.errors import CheckpointError
from warmstart.showing import listed, shown

MAX_HEADER: Final = 10_000
MAX_PICKLE: Final = 64 << 20
_DESCR = re.compile(r"([<>|=]?)([?biufcmMSUVOa]\d*(?:\[\w+\])?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Header:
    """What a `.npy` header says: numpy's type code and byte order, the layout, and how long the header is."""

    code: str
    order: str
    fortran: bool
    shape: tuple[int, ...]
    length: int

    @property
    def stride(self) -> tuple[int, ...]:
        return column_major(self.shape) if self.fortran else row_major(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLeaf:
    """A compressed member of an `.npz`, unpacked whenever it is read."""

    file: MappedFile
    member: Member
    header: Header
    dtype: torch.dtype

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.header.shape, self.dtype, self.member.start, 0)

    def read(self, index: Index | None) -> Tensor:
        source, swapped = _PackedBytes(self.file, self.member), is_swapped(self.header.order)
        leaf = StridedLeaf(source, self.header.length, self.header.shape, self.dtype, self.header.stride, swapped)
        return leaf.read(index)


@dataclass(frozen=True, slots=True, eq=False)
class _PackedBytes:
    """What a compressed member unpacks to; what is not asked for is let go on the way."""

    file: MappedFile
    member: Member

    @property
    def size(self) -> int:
        return self.member.size

    def take(self, start: int, stop: int, alignment: int) -> Tensor:
        return torch.frombuffer(inflate(self.file, self.member, stop, start=start), dtype=torch.uint8)


def open_npy(file: MappedFile, *, checkpoint_key: str | None) -> LeafCheckpoint:
    """Open a `.npy` file: a plain array is named by the file's stem, pickled arrays by their own names.

    Raises:
        CheckpointError: It is truncated, damaged or hostile, or holds anything but numeric arrays.
    """
    where = str(file.path)
    with file.scattered():
        header = read_header(file.map[: MAX_HEADER + 12], where)
    if header.code.startswith("O"):
        return _objects(file, file.map[header.length :], "numpy npy", checkpoint_key, file.path.stem)
    leaf = _mapped(file, header, 0, file.size, where)
    if leaf is None:
        raise CheckpointError(
            f"{where} has numpy dtype {shown(header.code)}: {why_not(header.code)}; give a numeric array"
        )
    if checkpoint_key is not None:
        raise CheckpointError(f"{where}: holds one array and no trees; leave checkpoint_key out")
    return LeafCheckpoint({file.path.stem: leaf}, location=where, format="numpy npy", files=[file.stamp])


def open_npz(file: MappedFile, members: dict[str, Member], *, checkpoint_key: str | None) -> LeafCheckpoint:
    """Open a `.npz` file.

    Raises:
        CheckpointError: It is truncated, damaged or hostile, or holds anything but numeric arrays.
    """
    location = str(file.path)
    if len(members) == 1:
        (only,) = members.values()
        header = _member_header(file, only)
        if header.code.startswith("O"):
            data = bytes(_limited(file, only))[header.length :]
            return _objects(file, data, "numpy npz", checkpoint_key, only.name.removesuffix(".npy"))
    if checkpoint_key is not None:
        raise CheckpointError(
            f"{location}: an npz file holds one tree, so checkpoint_key={shown(checkpoint_key)} names nothing in it; "
            "leave checkpoint_key out"
        )
    leaves: dict[str, Leaf] = {}
    left_out: list[str] = []
    notes: list[str] = []
    stubbed: list[str] = []
    for member in members.values():
        name = member.name.removesuffix(".npy")
        where = f"{location}: {shown(name)}"
        header = _member_header(file, member)
        found: dict[str, Leaf]
        if header.code.startswith("O"):
            inner = _objects(file, bytes(_limited(file, member))[header.length :], "numpy npz", None, name, stubbed)
            found = {f"{name}.{key}": leaf for key, leaf in inner.leaves()}
            notes += inner.notes
        elif member.method == STORED:
            leaf = _mapped(file, header, member.start, member.size, where)
            found = {} if leaf is None else {name: leaf}
        else:
            packed = _packed(file, member, header, where)
            found = {} if packed is None else {name: packed}
        if not found:
            left_out.append(name)
        for key, made in found.items():
            if key in leaves:
                raise CheckpointError(
                    f"{location}: two arrays are both spelled {shown(key)}; rename one and save again"
                )
            leaves[key] = made
    if not leaves:
        inside = f"only strings or dates: {listed(left_out)}" if left_out else "no arrays at all"
        raise CheckpointError(f"{location}: holds {inside}; save numeric arrays with numpy.savez")
    if left_out:
        notes.append(f"strings or dates were left out: {listed(left_out)}")
    notes += pickles.stub_note(stubbed)
    return LeafCheckpoint(leaves, location=location, format="numpy npz", files=[file.stamp], notes=notes)


def read_header(head: bytes | bytearray, where: str) -> Header:
    """Parse the header at the start of a `.npy` file.

    Raises:
        CheckpointError: It breaks a rule of the format.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: damaged npy header: {what}; get the file again from where it came")

    if len(head) < 10 or not head.startswith(NPY):
        raise refuse("it does not start with the magic bytes of numpy and a version")
    if head[6] not in {1, 2, 3} or head[7] != 0:
        raise refuse(f"version {head[6]}.{head[7]} is none that numpy writes")
    width = 2 if head[6] == 1 else 4
    length = int.from_bytes(head[8 : 8 + width], "little")
    start = 8 + width
    if length > MAX_HEADER:
        raise refuse(f"it claims {length:,} bytes; at most {MAX_HEADER:,} are read")
    if start + length > len(head):
        raise CheckpointError(
            f"{where}: truncated: expected {start + length:,} bytes of npy header, there are {len(head):,}; copy or download "
            "it again"
        )
    try:
        fields = ast.literal_eval(bytes(head[start : start + length]).decode("utf-8").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise refuse(f"no dictionary ({type(error).__name__})") from error
    if type(fields) is not dict or set(fields) != {"descr", "fortran_order", "shape"}:
        raise refuse("it does not have exactly descr, fortran_order and shape")
    shape, descr = fields["shape"], fields["descr"]
    sized = type(shape) is tuple and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
    if not sized or unfolds_too_far(shape):
        raise refuse("its shape is not a tuple of possible sizes")
    if len(shape) > MAX_DIMS or type(fields["fortran_order"]) is not bool:
        raise refuse(f"more than {MAX_DIMS} dimensions, or an order that is neither True nor False")
    match = _DESCR.fullmatch(descr) if type(descr) is str else None
    if match is None:
        raise CheckpointError(
            f"{where}: a structured array, or a dtype that is not one plain type; save its fields as arrays of their own"
        )
    return Header(match[2], match[1] or "=", fields["fortran_order"], shape, start + length)


def _limited(file: MappedFile, member: Member) -> bytearray:
    if member.method == DEFLATED and member.size > MAX_PICKLE:
        raise CheckpointError(
            f"{file.path}: {shown(member.name)} is a compressed pickle of {member.size:,} bytes; at most "
            f"{MAX_PICKLE >> 20} MiB are unpacked: save plain arrays with numpy.savez"
        )
    return inflate(file, member)


def _member_header(file: MappedFile, member: Member) -> Header:
    with file.scattered():
        return read_header(inflate(file, member, MAX_HEADER + 12), f"{file.path}: {shown(member.name)}")


def _torch_dtype(header: Header, where: str) -> torch.dtype | None:
    if header.code[:1] in {"S", "U", "a", "M", "m"}:
        return None
    dtype = torch_dtype(header.code)
    if dtype is None:
        raise CheckpointError(f"{where} has numpy dtype {shown(header.code)}: {why_not(header.code)}")
    return dtype


def _mapped(file: MappedFile, header: Header, start: int, size: int, where: str) -> StridedLeaf | None:
    dtype = _torch_dtype(header, where)
    if dtype is None:
        return None
    _check_size(header, dtype, size, where)
    place = start + header.length
    return StridedLeaf(file, place, header.shape, dtype, header.stride, is_swapped(header.order))


def _packed(file: MappedFile, member: Member, header: Header, where: str) -> PackedLeaf | None:
    dtype = _torch_dtype(header, where)
    if dtype is None:
        return None
    _check_size(header, dtype, member.size, where)
    return PackedLeaf(file, member, header, dtype)


def _check_size(header: Header, dtype: torch.dtype, size: int, where: str) -> None:
    need = header.length + math.prod(header.shape) * dtype.itemsize
    if size < need:
        raise CheckpointError(
            f"{where}: truncated: expected {need:,} bytes for shape {header.shape} of {dtype}, there are {size:,}; copy or "
            "download it again"
        )
    if size > need:
        raise CheckpointError(
            f"{where}: damaged: expected {need:,} bytes for shape {header.shape} of {dtype}, there are {size:,}; get the file "
            "again from where it came"
        )


def _objects(
    file: MappedFile,
    data: bytes,
    format: str,
    checkpoint_key: str | None,
    name: str,
    stubbed: list[str] | None = None,
) -> LeafCheckpoint:
    where = f"{file.path} ({shown(name)})"

    def load_bytes(held: bytes) -> StorageRef:
        return storage_from_bytes(held, where)

    content, stubs = pickles.load(data, where=where, load_bytes=load_bytes)
    if (
        isinstance(content, ArrayRef)
        and isinstance(content.data, list)
        and content.shape == ()
        and len(content.data) == 1
    ):
        content = content.data[0]
    if not isinstance(content, (dict, OrderedDictRef, list, tuple, ArrayRef)) or (
        isinstance(content, ArrayRef) and not isinstance(content.data, list)
    ):
        raise CheckpointError(
            f"{where}: an object array that holds neither a dict nor a list of arrays; save one: numpy.savez(path, **arrays)"
        )
    notes = pickles.stub_note(stubs) if stubbed is None else []
    if stubbed is not None:
        stubbed += stubs
    return build_checkpoint(content, file, format=format, checkpoint_key=checkpoint_key, place=held_place, notes=notes)
