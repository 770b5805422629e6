"""The directory of a zip archive, read without unpacking anything: where each member's bytes lie in the file."""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

from warmstart.checkpoints.files import MappedFile
from warmstart.errors import CheckpointError
from warmstart.showing import shown

STORED: Final = 0
DEFLATED: Final = 8
MAX_MEMBERS: Final = 1_000_000
# Deflate cannot shrink anything by more than this.
MAX_RATIO: Final = 1040

_STEP: Final = 1 << 20

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_NAME_AND_EXTRA = struct.Struct("<HH")  # its last two fields


class Member(NamedTuple):
    """One member: its bytes are `start` to `start + stored` of the file, and `size` once unpacked."""

    name: str
    method: int
    start: int
    stored: int
    size: int
    crc: int


def read_directory(file: MappedFile) -> dict[str, Member]:
    """All members of the archive by name; none overlaps another, and all lie inside the file.

    Raises:
        CheckpointError: The directory is missing (a truncated file), damaged, or claims what cannot be.
    """
    count, size, start = _find_directory(file)
    if count > MAX_MEMBERS or count * _ENTRY.size > size:
        raise _damaged(file, f"its directory of {size:,} bytes claims {count:,} members")
    if start + size > file.size:
        raise _damaged(file, f"its directory should end at byte {start + size:,} of {file.size:,}")
    directory = file.map[start : start + size]
    with file.scattered():
        members = _members(file, directory, count, start)
    _check_overlap(file, members)
    return members


def _members(file: MappedFile, directory: bytes, count: int, start: int) -> dict[str, Member]:
    size = len(directory)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > size or directory[position : position + 4] != b"PK\x01\x02":
            raise _damaged(file, f"no directory entry at byte {start + position:,}")
        (_, _, _, flags, method, _, _, crc, stored, full, n_name, n_extra, n_comment, disk, _, _, offset) = (
            _ENTRY.unpack_from(directory, position)
        )
        after = position + _ENTRY.size
        raw_name = directory[after : after + n_name]
        extra = directory[after + n_name : after + n_name + n_extra]
        position = after + n_name + n_extra + n_comment
        if position > size:
            raise _damaged(file, f"a directory entry runs beyond byte {start + size:,}")
        if 0xFFFFFFFF in {stored, full, offset}:
            full, stored, offset = _wide(file, extra, full, stored, offset)
        name = raw_name.decode("utf-8", "surrogateescape")
        if flags & 1 or disk:
            raise _damaged(file, f"member {shown(name)} is encrypted or on another disk")
        if name in members:
            raise _damaged(file, f"member {shown(name)} is there twice")
        data = _data_start(file, name, raw_name, offset, start)
        if data + stored > start:
            raise _damaged(
                file, f"member {shown(name)} should end at byte {data + stored:,}, beyond {start:,} where members end"
            )
        if method == STORED and stored != full:
            raise _damaged(file, f"member {shown(name)} is stored as {stored:,} bytes but claims {full:,}")
        if method == DEFLATED and full > stored * MAX_RATIO + 64:
            raise _damaged(file, f"member {shown(name)} cannot hold {full:,} bytes in {stored:,}")
        members[name] = Member(name, method, data, stored, full, crc)
    return members


def inflate(file: MappedFile, member: Member, limit: int | None = None, *, start: int = 0) -> bytearray:
    """The unpacked bytes of a member, from `start` up to `limit`; no more than these is ever held.

    Raises:
        CheckpointError: They are damaged, or not as many as the directory says.
    """
    file.check()
    stop = member.size if limit is None else min(limit, member.size)
    if member.method == STORED:
        return bytearray(file.map[member.start + start : member.start + stop])
    if member.method != DEFLATED:
        raise _damaged(
            file, f"member {shown(member.name)} is packed by a method (number {member.method}) not read here"
        )
    out = bytearray(max(0, stop - start))
    done, crc, unpacker, pending = 0, 0, zlib.decompressobj(-15), b""
    position, end = member.start, member.start + member.stored
    try:
        while done < stop and not unpacker.eof and (pending or position < end):
            if not pending:
                pending = file.map[position : min(position + _STEP, end)]
                position += len(pending)
            part = unpacker.decompress(pending, min(_STEP, stop - done))
            pending = unpacker.unconsumed_tail
            crc = zlib.crc32(part, crc)
            if done + len(part) > start:
                kept = part[max(0, start - done) :]
                at = max(0, done - start)
                out[at : at + len(kept)] = kept
            done += len(part)
    except zlib.error as error:
        raise _damaged(file, f"member {shown(member.name)} cannot be unpacked ({error})") from error
    if done != stop:
        raise _damaged(file, f"member {shown(member.name)} unpacks to {done:,} bytes, not {stop:,}")
    if stop == member.size and crc != member.crc:
        raise _damaged(file, f"member {shown(member.name)} has another checksum than the directory says")
    return out


def _find_directory(file: MappedFile) -> tuple[int, int, int]:
    tail_start = max(0, file.size - (1 << 16) - _END.size)
    tail = file.map[tail_start : file.size]
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise CheckpointError(
            f"{file.path}: a zip archive (torch or numpy) without the directory at its end: the file is truncated at "
            f"{file.size:,} bytes; expected more: compare the size with the original's and copy or download it again"
        )
    _, disk, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    position = tail_start + at
    if disk not in {0, 0xFFFF}:
        raise _damaged(file, "it claims to be one of several disks")
    locator = position - _END64_LOCATOR.size
    if locator >= 0 and file.map[locator : locator + 4] == b"PK\x06\x07":
        _, _, end64, _ = _END64_LOCATOR.unpack(file.map[locator:position])
        if end64 + _END64.size > locator or file.map[end64 : end64 + 4] != b"PK\x06\x06":
            raise _damaged(file, f"no end record at byte {end64:,}")
        *_, count, size, start = _END64.unpack(file.map[end64 : end64 + _END64.size])
        position = end64
    if start + size > position:
        raise _damaged(file, f"its directory should end at byte {start + size:,}, beyond {position:,} where it can")
    return count, size, start


def _wide(file: MappedFile, extra: bytes, full: int, stored: int, offset: int) -> tuple[int, int, int]:
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind != 1:
            continue
        values = [int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field) - 7, 8)]
        wide = []
        for value in (full, stored, offset):
            if value == 0xFFFFFFFF:
                if not values:
                    raise _damaged(file, "a directory entry without its 64-bit sizes")
                value = values.pop(0)
            wide.append(value)
        return wide[0], wide[1], wide[2]
    return full, stored, offset


def _data_start(file: MappedFile, name: str, raw_name: bytes, offset: int, limit: int) -> int:
    start = offset + _LOCAL.size
    header = file.map[offset : start + len(raw_name)]
    if start > limit or header[:4] != b"PK\x03\x04":
        raise _damaged(file, f"member {shown(name)} has no header at byte {offset:,}")
    n_name, n_extra = _NAME_AND_EXTRA.unpack_from(header, 26)
    if n_name != len(raw_name) or header[_LOCAL.size :] != raw_name:
        raise _damaged(file, f"member {shown(name)} has another name at byte {start:,}")
    return int(start + n_name + n_extra)


def _check_overlap(file: MappedFile, members: dict[str, Member]) -> None:
    stop, before = 0, ""
    for member in sorted(members.values(), key=lambda m: (m.start, m.stored)):
        if member.start < stop:
            raise _damaged(file, f"members {shown(before)} and {shown(member.name)} overlap")
        stop, before = member.start + member.stored, member.name


def _damaged(file: MappedFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: damaged zip archive: {what}; get the file again from where it came")
