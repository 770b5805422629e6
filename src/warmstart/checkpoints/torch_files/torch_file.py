"""Files of `torch.save`, the zip format: a pickle of the structure, and each storage's bytes as a member of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from warmstart.checkpoints.archive import STORED, Member, inflate
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import LeafCheckpoint
from warmstart.checkpoints.pickled import pickles
from warmstart.checkpoints.pickled.building import Place, build_checkpoint
from warmstart.checkpoints.pickled.refs import StorageRef, StorageType
from warmstart.errors import CheckpointError
from warmstart.showing import shown

MAX_DEFLATED_PICKLE: Final = 64 << 20


def find_pickle(members: dict[str, Member]) -> str | None:
    """The folder of a torch archive that holds its `data.pkl`; None if it is not one."""
    names = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    names.sort(key=lambda name: (name.count("/"), name))
    return names[0].removesuffix("data.pkl") if names else None


def open_torch_zip(
    file: MappedFile, members: dict[str, Member], folder: str, *, checkpoint_key: str | None
) -> LeafCheckpoint:
    """Open a file of `torch.save`.

    Raises:
        CheckpointError: It is damaged, hostile, or holds no single tree of weights.
    """
    content, stubbed, place = unpickle(file, members, folder)
    return build_checkpoint(
        content,
        file,
        format="torch zip",
        checkpoint_key=checkpoint_key,
        place=place,
        notes=pickles.stub_note(stubbed),
    )


def unpickle(
    file: MappedFile, members: dict[str, Member], folder: str
) -> tuple[object, list[str], Callable[[StorageRef], Place]]:
    """What the archive's pickle describes, the classes that were not built, and where each storage lies.

    Raises:
        CheckpointError: It is damaged or hostile, or a storage's record is missing or too short.
    """
    where = f"{file.path} ({shown(folder + 'data.pkl')})"
    data = _pickle_bytes(file, members[f"{folder}data.pkl"], where)
    swapped = _is_swapped(file, members, folder)

    def place(storage: StorageRef) -> Place:
        member = members.get(f"{folder}data/{storage.key}")
        if member is None:
            raise CheckpointError(
                f"{file.path}: the record {shown(f'{folder}data/{storage.key}')} is missing; "
                "get the file again from where it came"
            )
        if member.method != STORED:
            raise CheckpointError(
                f"{file.path}: {shown(member.name)} is compressed, which torch.save never does; unpack the file with torch and "
                "save it again: torch.save(torch.load(path), path)"
            )
        if member.size < storage.nbytes:
            raise CheckpointError(
                f"{file.path}: {shown(member.name)} should have {storage.nbytes:,} bytes and has {member.size:,}; "
                "get the file again from where it came"
            )
        return Place(file, member.start, swapped)

    storages: list[StorageRef] = []
    content, stubbed = pickles.load(data, where=where, persistent=storage_maker(storages), records=len(members))
    for storage in storages:
        place(storage)
    return content, stubbed, place


def storage_maker(made: list[StorageRef]) -> Callable[[object], object]:
    """What turns the persistent ids of `torch.save` into storages, once for each name and dtype; `made` collects them."""
    known: dict[tuple[str, str], StorageRef] = {}

    def make(pid: object) -> object:
        # ("module", class, source file, source): the legacy format's note on a class that was pickled whole.
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        # ("storage", storage type, key, location, number of elements[, view of another storage])
        if type(pid) is not tuple or len(pid) not in {5, 6} or pid[0] != "storage":
            raise CheckpointError("a reference to something that is no storage")
        _, kind, key, _, numel = pid[:5]
        if type(kind) is not StorageType or type(key) not in {str, int} or type(numel) is not int:
            raise CheckpointError("a storage with a damaged description")
        if kind.dtype is None:
            raise CheckpointError(f"a {kind.name} of quantized elements; dequantize() the tensors and save them again")
        if not 0 <= numel < 1 << 62:
            raise CheckpointError(f"a storage that claims {numel:,} elements")
        name = key if type(key) is str else str(key)
        name = name if len(name) < 100 else ""
        ref = known.get((name, kind.name))
        if ref is None or ref.numel != numel:
            ref = known[name, kind.name] = StorageRef(kind.dtype, name, numel)
            made.append(ref)
        return ref if len(pid) == 5 or pid[5] is None else _view(ref, pid[5])

    return make


def _view(root: StorageRef, view: object) -> StorageRef:
    # Torch before 0.4 had storages that were part of another: (key, first element, number of elements).
    if type(view) is not tuple or len(view) != 3 or type(view[1]) is not int or type(view[2]) is not int:
        raise CheckpointError("a view of a storage with a damaged description")
    _, first, numel = view
    if first < 0 or numel < 0 or first + numel > root.numel:
        raise CheckpointError(f"a view of storage {shown(root.key)} that does not lie inside it")
    return StorageRef(root.dtype, root.key, numel, start=first * root.dtype.itemsize)


def _pickle_bytes(file: MappedFile, member: Member, where: str) -> bytes:
    if member.method != STORED and member.size > MAX_DEFLATED_PICKLE:
        raise CheckpointError(
            f"{where}: a compressed pickle of {member.size:,} bytes; at most {MAX_DEFLATED_PICKLE >> 20} MiB are unpacked: "
            "save the file again with torch.save"
        )
    if member.method == STORED:
        return file.map[member.start : member.start + member.stored]
    return bytes(inflate(file, member))


def _is_swapped(file: MappedFile, members: dict[str, Member], folder: str) -> bool:
    member = members.get(f"{folder}byteorder")
    if member is None:
        return False
    order = bytes(inflate(file, member, 16))
    if order not in {b"little", b"big"}:
        raise CheckpointError(
            f"{file.path}: the byte order {order!r} is neither little nor big; get the file again from where it came"
        )
    return order.decode() != sys.byteorder
