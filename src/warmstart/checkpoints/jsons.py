"""JSON of unknown origin, read within bounds."""

from __future__ import annotations

import json
from typing import Any, Final

from warmstart.showing import shown

BUDGET: Final = 160 << 20


def parse(raw: bytes) -> object:
    """The value that a JSON text spells: no key twice, no NaN, and never more memory than `BUDGET`.

    Raises:
        ValueError: It is anything else; the message says what, to stand after "it is not valid JSON".
    """
    # What Python's objects for the text would take, before any is made.
    cost = 120 * (raw.count(b"[") + raw.count(b"{")) + 40 * raw.count(b",") + 40 * raw.count(b'"')
    if cost > BUDGET:
        raise ValueError(f"its {len(raw):,} bytes have too many parts to be read within {BUDGET >> 20} MiB")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
