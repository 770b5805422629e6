"""A linear pass over a pickle's opcodes, before any of them runs: a dishonest stream is refused, none is believed."""

from __future__ import annotations

import functools
import mmap
import pickletools
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Final

from warmstart.errors import CheckpointError

Buffer = bytes | bytearray | mmap.mmap

OBJECT_BUDGET = 144 << 20
PER_RECORD = 2 << 10
MAX_TUPLES = 1_000_000
MAX_WIDE_INTEGERS = 1_000
MAX_STEPS = 2_000_000
SHORT = 64  # bytes of a string that the expression steps over; each length makes it longer to compile

_STOP, _FRAME, _LONG_BINPUT, _PUT, _LONG1 = 0x2E, 0x95, ord("r"), ord("p"), 0x8A
_EXTENSIONS = {0x82, 0x83, 0x84}
_FIXED: Final[dict[int, bytearray]] = {}
_COUNTED: Final[dict[int, tuple[int, str]]] = {}
_LINES: Final[dict[int, int]] = {}
_NAMES: Final[dict[int, str]] = {}

for _op in pickletools.opcodes:
    _code, _arg = ord(_op.code), _op.arg
    _NAMES[_code] = _op.name
    if _code == _STOP or _code in _EXTENSIONS:
        continue
    if _arg is None:
        _FIXED.setdefault(0, bytearray()).append(_code)
    elif _arg.n >= 0:
        if _code not in {_FRAME, _LONG_BINPUT}:
            _FIXED.setdefault(_arg.n, bytearray()).append(_code)
    elif _arg.n == pickletools.UP_TO_NEWLINE:
        _LINES[_code] = 2 if _arg.name == "stringnl_noescape_pair" else 1
    else:
        _width = {
            pickletools.TAKEN_FROM_ARGUMENT1: 1,
            pickletools.TAKEN_FROM_ARGUMENT4: 4,
            pickletools.TAKEN_FROM_ARGUMENT4U: 4,
            pickletools.TAKEN_FROM_ARGUMENT8U: 8,
        }[_arg.n]
        _COUNTED[_code] = (_width, _op.name)

# Upper bounds, in bytes, of what one opcode makes the unpickler allocate beside its payload.
_COST: Final = {
    **dict.fromkeys(b"]l", 120),
    **dict.fromkeys(b"}d", 80),
    **dict.fromkeys(b"su", 240),
    **dict.fromkeys(b"\x8f\x90\x91", 320),
    **dict.fromkeys(b")t\x85\x86\x87", 80),
    **dict.fromkeys(b"R\x81\x92oib\x93cQP", 240),
    **dict.fromkeys(b"ae", 60),
    **dict.fromkeys(b"JMGLI\x8a\x8b", 40),
    **dict.fromkeys(b"XUTCBSV\x8c\x8d\x8e\x96", 80),
}
_TUPLES = b"t\x85\x86\x87"


@dataclass(frozen=True, slots=True)
class Extent:
    """One pickle inside a buffer: where it ends, and whether it may nest so deep that hashing needs more stack."""

    start: int
    stop: int
    tuples: int


def scan(data: Buffer, start: int, *, where: str, records: int = 0, limit: int | None = None) -> Extent:
    """Where the pickle that begins at `start` ends; it cannot claim more than there is.

    Args:
        data: Anything with bytes; not copied.
        start: First byte of the pickle.
        where: File and member, for messages.
        records: How many data records the file holds: more records may come with more objects.
        limit: Where the data ends, if before the end of the buffer.

    Raises:
        CheckpointError: An opcode is unknown, forbidden, or claims bytes, memo entries or frames that cannot be there.
    """
    end = len(data) if limit is None else limit
    spans = array("q")
    stop = _walk(data, start, end, where, spans)
    payload = data[start:stop]
    payload = payload if isinstance(payload, bytes) else bytes(payload)
    tuples = sum(payload.count(code) for code in _TUPLES)
    budget = OBJECT_BUDGET + PER_RECORD * records
    rough = 8 * len(payload) + sum(payload.count(code) * cost for code, cost in _COST.items())
    if rough > budget or tuples > MAX_TUPLES:
        tuples = _weigh(data, spans, budget, where)
    return Extent(start, stop, tuples)


def _walk(data: Buffer, start: int, end: int, where: str, spans: array[int]) -> int:
    memo_bound = 1024 + (end - start) // 4
    run = _run(min(memo_bound, 1 << 31).bit_length() - 1)
    wide = text = 0
    position = start

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{where}: damaged or hostile pickle: byte {position:,}: {what}; "
            "nothing of it was executed: get the file again from where it came"
        )

    for _ in range(MAX_STEPS):
        match = run.match(data, position, end)
        assert match is not None
        if match.end() > position:
            spans.extend((position, match.end()))
            position = match.end()
        if position >= end:
            raise refuse("it ends without a STOP opcode, so the file is truncated")
        code = data[position]
        if code == _STOP:
            return position + 1
        if code in _COUNTED:
            width, name = _COUNTED[code]
            if position + 1 + width > end:
                raise refuse(f"{name} is cut off")
            length = int.from_bytes(data[position + 1 : position + 1 + width], "little")
            left = end - position - 1 - width
            if length > left:
                raise refuse(f"{name} claims {length:,} bytes where {left:,} are left")
            if (code == _LONG1 and length > 8) or name == "LONG4":
                wide += 1
                if wide > MAX_WIDE_INTEGERS:
                    raise refuse(f"more than {MAX_WIDE_INTEGERS:,} integers of over 64 bits")
            first = position + 1 + width
            if length > 1 << 16 and "UNICODE" in name and _BEYOND_LATIN1.search(data, first, first + length):
                # One such character makes Python spend four bytes on each.
                text += 4 * length
                if text > OBJECT_BUDGET:
                    raise refuse(f"more than {OBJECT_BUDGET >> 22} MiB of text")
            position = first + length
        elif code in _LINES:
            after = position + 1
            for _ in range(_LINES[code]):
                newline = _find_newline(data, after, end)
                if newline < 0:
                    raise refuse(f"{_NAMES[code]} without its end of line")
                line, after = data[after:newline], newline + 1
            if code == _PUT and not (bytes(line).isdigit() and len(line) < 12 and int(line) < memo_bound):
                raise refuse("PUT with an index beyond what the file can hold")
            position = after
        elif code in {_LONG_BINPUT, _FRAME}:
            width = 4 if code == _LONG_BINPUT else 8
            number = int.from_bytes(data[position + 1 : position + 1 + width], "little")
            if position + 1 + width > end:
                raise refuse(f"{_NAMES[code]} is cut off")
            if code == _LONG_BINPUT and number >= memo_bound:
                raise refuse(f"LONG_BINPUT with index {number:,}, beyond what the file can hold")
            if code == _FRAME and number > end - position - 9:
                raise refuse(f"FRAME claims {number:,} bytes where {end - position - 9:,} are left")
            position += 1 + width
        elif code in _EXTENSIONS:
            raise refuse("an extension code, which only a registry of live Python objects can resolve")
        elif code in _NAMES:
            raise refuse(f"{_NAMES[code]} is cut off")
        else:
            raise refuse(f"unknown opcode 0x{code:02x}")
    raise refuse(f"more than {MAX_STEPS:,} long strings and text lines")


def _find_newline(data: Buffer, start: int, end: int) -> int:
    match = _NEWLINE.search(data, start, end)
    return match.start() if match else -1


_BEYOND_LATIN1 = re.compile(rb"[\xc4-\xff]")
_NEWLINE = re.compile(rb"\n")


def _class(codes: bytes | bytearray) -> bytes:
    return b"[" + b"".join(b"\\x%02x" % code for code in codes) + b"]"


@functools.cache
def _tails(memo_bits: int) -> list[tuple[bytes, bytes]]:
    """Opcodes whose arguments a regular expression can step over in C, with the expression for the arguments."""
    tails = [(_class(codes), b"" if n == 0 else b".{%d}" % n) for n, codes in sorted(_FIXED.items())]
    byte, rest = divmod(memo_bits, 8)
    high = b"[\\x00-\\x%02x]" % ((1 << rest) - 1)
    tails.append((b"r", b"." * byte + high + b"\\x00" * (3 - byte)))
    for width in (1, 4):
        codes = bytes(code for code, (w, _) in _COUNTED.items() if w == width and code not in {_LONG1, 0x8B})
        pad = b"\\x00" * (width - 1)
        tails.append((_class(codes), b"(?:" + b"|".join(b"\\x%02x%s.{%d}" % (n, pad, n) for n in range(SHORT)) + b")"))
    tails.append((b"\\x8a", b"(?:" + b"|".join(b"\\x%02x.{%d}" % (n, n) for n in range(9)) + b")"))
    lines = bytes(code for code, n in _LINES.items() if n == 1 and code != _PUT)
    tails.append((_class(lines), b"[^\\n]{0,200}+\\n"))
    tails.append((b"p", b"[0-9]{1,3}+\\n"))
    tails.append((b"c", b"[^\\n]{0,200}+\\n[^\\n]{0,200}+\\n"))
    return tails


@functools.cache
def _run(memo_bits: int) -> re.Pattern[bytes]:
    body = b"|".join(codes + tail for codes, tail in _tails(memo_bits))
    return re.compile(b"(?s)(?:" + body + b")*+")


@functools.cache
def _token() -> re.Pattern[bytes]:
    body = b"|".join(b"(?<=" + codes + b")" + tail for codes, tail in _tails(31))
    return re.compile(b"(?s)(.)(?:" + body + b")")


def _weigh(data: Buffer, spans: array[int], budget: int, where: str) -> int:
    """Count what the opcodes will allocate, exactly; the number of tuples among them."""
    total = tuples = 0
    for count in _counts(data, spans):
        total += sum((8 + _COST.get(code[0], 0)) * n for code, n in count.items())
        tuples += sum(n for code, n in count.items() if code[0] in _TUPLES)
        if total > budget or tuples > MAX_TUPLES:
            raise CheckpointError(
                f"{where}: the pickle holds so many small objects that reading it would need more than "
                f"{budget >> 20} MiB; if you trust the file, pass trust_pickle=True"
            )
    return tuples


def _counts(data: Buffer, spans: array[int]) -> Iterator[Counter[bytes]]:
    group = itemgetter(1)
    pending: Counter[bytes] = Counter()
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        tokens = map(group, _token().finditer(data, start, stop))
        while chunk := list(islice(tokens, 65536)):
            pending.update(chunk)
            if len(chunk) == 65536:
                yield pending
                pending = Counter()
    pending[b"X"] += len(spans) // 2
    yield pending
