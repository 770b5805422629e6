"""Files of `torch.save` before 1.6: a chain of pickles with the storages' bytes behind, or a tar archive of them."""

from __future__ import annotations

import struct
import sys
from typing import Final

from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import LeafCheckpoint
from warmstart.checkpoints.pickled import opcodes, pickles
from warmstart.checkpoints.pickled.building import Place, build_checkpoint
from warmstart.checkpoints.pickled.refs import StorageRef, StorageType, TensorRef
from warmstart.checkpoints.signatures import TORCH_LEGACY
from warmstart.checkpoints.torch_files.torch_file import storage_maker
from warmstart.errors import CheckpointError
from warmstart.showing import counted, shown

PROTOCOL: Final = 1001
TAR_MEMBERS: Final = {"sys_info", "pickle", "storages", "tensors"}
MAX_TAR_MEMBERS: Final = 64


def open_torch_legacy(file: MappedFile, *, checkpoint_key: str | None) -> LeafCheckpoint:
    """Open a file of `torch.save(..., _use_new_zipfile_serialization=False)`.

    Raises:
        CheckpointError: It is truncated, damaged or hostile, or holds no single tree of weights.
    """
    file.check()
    with file.scattered():
        content, stubbed, places = _read_chain(file.map, file.size, str(file.path))

    def place(storage: StorageRef) -> Place:
        return Place(file, *places[storage.key])

    return build_checkpoint(
        content,
        file,
        format="torch legacy",
        checkpoint_key=checkpoint_key,
        place=place,
        notes=pickles.stub_note(stubbed),
    )


def storage_from_bytes(data: bytes, where: str) -> StorageRef:
    """The storage that a tensor carries when it was pickled by itself.

    Raises:
        CheckpointError: The bytes are not one storage as torch writes it.
    """
    if not data.startswith(TORCH_LEGACY):
        raise CheckpointError(f"{where}: a storage that is not in torch's own format")
    content, _, places = _read_chain(data, len(data), where)
    if type(content) is not StorageRef:
        raise CheckpointError(f"{where}: something that is no storage, where one should be")
    start, swapped = places[content.key]
    return StorageRef(content.dtype, content.key, content.numel, data, start, swapped)


def open_plain_pickle(file: MappedFile, *, checkpoint_key: str | None) -> LeafCheckpoint:
    """Open a pickle of arrays or tensors that was written without torch or numpy's own formats.

    Raises:
        CheckpointError: It is truncated, damaged or hostile, or holds no single tree of weights.
    """
    where = str(file.path)
    file.check()
    extent = opcodes.scan(file.map, 0, where=where)
    if extent.stop != file.size:
        raise CheckpointError(
            f"{where}: the pickle ends at byte {extent.stop:,} and the file has {file.size:,}: it is no plain pickle; "
            "save the weights with torch.save or safetensors"
        )

    def load_bytes(data: bytes) -> StorageRef:
        return storage_from_bytes(data, where)

    content, stubbed = pickles.load(file.map[:], where=where, load_bytes=load_bytes, extent=extent)

    def place(storage: StorageRef) -> Place:
        raise CheckpointError(
            f"{where}: storage {shown(storage.key)} is not in the file; save the tensors with torch.save"
        )

    return build_checkpoint(
        content, file, format="pickle", checkpoint_key=checkpoint_key, place=place, notes=pickles.stub_note(stubbed)
    )


def _read_chain(data: opcodes.Buffer, size: int, where: str) -> tuple[object, list[str], dict[str, tuple[int, bool]]]:
    position = len(TORCH_LEGACY)
    protocol, position, _ = _next_pickle(data, position, size, f"{where} (protocol)")
    if protocol != PROTOCOL:
        raise CheckpointError(
            f"{where}: protocol {shown(protocol)} of torch's legacy format, not {PROTOCOL}; get the file again"
        )
    info, position, _ = _next_pickle(data, position, size, f"{where} (sys_info)")
    little = info.get("little_endian", True) if type(info) is dict else True
    swapped = bool(little) != (sys.byteorder == "little")
    storages: list[StorageRef] = []
    extent = opcodes.scan(data, position, where=f"{where} (structure)", limit=size, records=(size - position) // 8192)
    content, stubbed = pickles.load(
        bytes(data[position : extent.stop]),
        where=f"{where} (structure)",
        persistent=storage_maker(storages),
        extent=extent,
    )
    keys, position, _ = _next_pickle(data, extent.stop, size, f"{where} (storage keys)")
    by_key: dict[str, StorageRef] = {}
    for storage in storages:
        if by_key.setdefault(storage.key, storage).nbytes != storage.nbytes:
            raise _damaged(where, f"storage {shown(storage.key)} is described twice, with different sizes")
    if type(keys) is not list or not all(type(key) in {str, int} for key in keys):
        raise _damaged(where, "its list of storage keys is not one")
    return content, stubbed, _places(data, [str(key) for key in keys], by_key, position, size, swapped, where)


def _places(
    data: opcodes.Buffer,
    keys: list[str],
    storages: dict[str, StorageRef],
    position: int,
    size: int,
    swapped: bool,
    where: str,
) -> dict[str, tuple[int, bool]]:
    expected = position + sum(8 + storages[key].nbytes for key in keys if key in storages)
    places: dict[str, tuple[int, bool]] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in places:
            raise _damaged(where, f"storage {shown(key)} is listed twice, or belongs to no tensor")
        if position + 8 + storage.nbytes > size:
            raise CheckpointError(
                f"{where}: truncated: expected {expected:,} bytes for {counted(len(keys), 'storage')}, the file has {size:,} "
                f"(storage {shown(key)} ends it); copy or download it again"
            )
        numel = int.from_bytes(data[position : position + 8], "little")
        if numel != storage.numel:
            raise _damaged(
                where, f"storage {shown(key)} at byte {position:,} has {numel:,} elements, not {storage.numel:,}"
            )
        places[key] = (position + 8, swapped)
        position += 8 + storage.nbytes
    missing = [key for key in storages if key not in places]
    if missing:
        raise _damaged(where, f"the bytes of {counted(len(missing), 'storage')} are missing, {shown(missing[0])} first")
    return places


def open_torch_tar(
    file: MappedFile, members: dict[str, tuple[int, int]], *, checkpoint_key: str | None
) -> LeafCheckpoint:
    """Open a file as torch wrote it before 0.2: a tar archive of storages, tensors and a pickle.

    Raises:
        CheckpointError: It is truncated, damaged or hostile, or holds no single tree of weights.
    """
    where = str(file.path)
    storages = _tar_storages(file, *members["storages"])
    tensors = _tar_tensors(file, *members["tensors"], storages)
    start, size = members["pickle"]

    def persistent(pid: object) -> object:
        if type(pid) is tuple and pid:
            return pid[0]
        found = tensors.get(str(pid)) if type(pid) in {str, int} and len(str(pid)) < 100 else None
        if found is None:
            raise CheckpointError(f"a tensor {shown(pid)} that is not in the archive")
        return found

    content, stubbed = pickles.load(file.map[start : start + size], where=f"{where} (pickle)", persistent=persistent)

    def place(storage: StorageRef) -> Place:
        return storages[storage.key][1]

    return build_checkpoint(
        content, file, format="torch tar", checkpoint_key=checkpoint_key, place=place, notes=pickles.stub_note(stubbed)
    )


def tar_members(file: MappedFile) -> dict[str, tuple[int, int]] | None:
    """Start and size of each member of a tar archive; None if the file is none.

    Raises:
        CheckpointError: A member runs beyond the end of the file.
    """
    members: dict[str, tuple[int, int]] = {}
    position = 0
    while position + 512 <= file.size and len(members) < MAX_TAR_MEMBERS:
        block = file.map[position : position + 512]
        if not any(block):
            break
        checksum = _octal(block[148:156])
        if checksum is None or checksum != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            return members if members else None
        size = _octal(block[124:136])
        if size is None:
            return None
        name = block[:100].split(b"\0")[0].decode("utf-8", "surrogateescape")
        if position + 512 + size > file.size:
            raise CheckpointError(
                f"{file.path}: truncated: {shown(name)} should end at byte {position + 512 + size:,} and the file has "
                f"{file.size:,}; copy or download it again"
            )
        if block[156:157] in {b"0", b"\0"}:
            members[name.removeprefix("./")] = (position + 512, size)
        position += 512 + (size + 511) // 512 * 512
    return members or None


def _tar_storages(file: MappedFile, start: int, size: int) -> dict[str, tuple[StorageRef, Place]]:
    where, stop = f"{file.path} (storages)", start + size
    count, position, _ = _next_pickle(file.map, start, stop, where)
    if type(count) is not int or not 0 <= count <= size:
        raise _damaged(where, "the number of storages is not one")
    found: dict[str, tuple[StorageRef, Place]] = {}
    for _ in range(count):
        entry, position, _ = _next_pickle(file.map, position, stop, where)
        if type(entry) is not tuple or len(entry) != 3 or type(entry[2]) is not StorageType:
            raise _damaged(where, f"no storage at byte {position:,}")
        dtype = entry[2].dtype
        if dtype is None or position + 8 > stop:
            raise _damaged(where, f"no storage at byte {position:,}")
        numel = int.from_bytes(file.map[position : position + 8], "little")
        if position + 8 + numel * dtype.itemsize > stop:
            raise CheckpointError(
                f"{where}: storage {shown(entry[0])} should end at byte {position + 8 + numel * dtype.itemsize:,}, beyond "
                f"{stop:,}: the file is truncated or damaged; get it again from where it came"
            )
        ref = StorageRef(dtype, _tar_key(entry[0], where), numel)
        found[ref.key] = (ref, Place(file, position + 8))
        position += 8 + ref.nbytes
    views, _, _ = _next_pickle(file.map, position, stop, where)
    for view in views if type(views) is list else ():
        if type(view) is not tuple or len(view) != 4 or not all(type(n) is int for n in view[2:]):
            raise _damaged(where, "a view of a storage with a damaged description")
        target, root, offset, numel = view
        base = found.get(_tar_key(root, where))
        if base is None or offset < 0 or numel < 0 or offset + numel > base[0].numel:
            raise _damaged(where, "a view of a storage that does not lie inside it")
        itemsize = base[0].dtype.itemsize
        ref = StorageRef(base[0].dtype, _tar_key(target, where), numel)
        found[ref.key] = (ref, Place(file, base[1].start + offset * itemsize))
    return found


def _tar_tensors(
    file: MappedFile, start: int, size: int, storages: dict[str, tuple[StorageRef, Place]]
) -> dict[str, TensorRef]:
    where, stop = f"{file.path} (tensors)", start + size
    count, position, _ = _next_pickle(file.map, start, stop, where)
    if type(count) is not int or not 0 <= count <= size:
        raise _damaged(where, "the number of tensors is not one")
    found: dict[str, TensorRef] = {}
    for _ in range(count):
        entry, position, _ = _next_pickle(file.map, position, stop, where)
        if type(entry) is not tuple or len(entry) != 3 or _tar_key(entry[1], where) not in storages:
            raise _damaged(where, f"no tensor at byte {position:,}")
        ndim = int.from_bytes(file.map[position : position + 4], "little")
        if ndim > 64 or position + 8 + 16 * ndim + 8 > stop:
            raise _damaged(where, f"a tensor of {ndim:,} dimensions at byte {position:,}")
        numbers = struct.unpack_from(f"<{2 * ndim + 1}q", file.map, position + 8)
        position += 8 + 16 * ndim + 8
        storage = storages[_tar_key(entry[1], where)][0]
        found[_tar_key(entry[0], where)] = TensorRef(
            storage, storage.dtype, numbers[-1], numbers[:ndim], numbers[ndim : 2 * ndim]
        )
    return found


def _tar_key(key: object, where: str) -> str:
    if type(key) not in {int, str} or len(str(key)) > 100:
        raise _damaged(where, "a key that is neither a number nor a name")
    return str(key)


def _octal(field: bytes) -> int | None:
    text = field.strip(b"\0 ")
    if not text or len(text) > 11 or any(c not in b"01234567" for c in text):
        return None
    return int(text, 8)


def _next_pickle(data: opcodes.Buffer, start: int, stop: int, where: str) -> tuple[object, int, list[str]]:
    extent = opcodes.scan(data, start, where=where, limit=stop)
    content, stubbed = pickles.load(bytes(data[start : extent.stop]), where=where, extent=extent)
    return content, extent.stop, stubbed


def _damaged(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: damaged: {what}; get the file again from where it came")
