"""Whether two words are two spellings of one: an abbreviation, or a slip."""

from __future__ import annotations

from collections.abc import Collection

_STEM = 4  # letters from which the beginning of a word stands for it; of a word twice as long, one less
_LONG = 7  # letters from which one wrong letter does not make another word


def spelled_alike(a: Collection[str], b: Collection[str]) -> bool:
    """Whether every word of each has exactly one other spelling in the other, and there are some."""
    return (
        bool(a)
        and len(a) == len(b)
        and all(sum(_alike(x, y) for y in b) == 1 for x in a)
        and all(sum(_alike(x, y) for x in a) == 1 for y in b)
    )


def _alike(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    if not (short.isalpha() and long.isalpha()):
        return False
    if long.startswith(short):
        return len(short) >= _STEM or (len(short) == _STEM - 1 and len(long) >= 2 * len(short))
    return len(short) >= _LONG and _one_letter(short, long)


def _one_letter(short: str, long: str) -> bool:
    """Whether one letter is another, too many, or too few."""
    at = next((i for i, (x, y) in enumerate(zip(short, long, strict=False)) if x != y), len(short))
    return long[at + 1 :] in (short[at + 1 :], short[at:])
