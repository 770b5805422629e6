"""A rename that is proven in one place is a spelling in all others: `w2` is `down_proj` where their shapes do not tell, too."""

from __future__ import annotations

from collections import defaultdict

from warmstart.mapping.suggesting.contest import replaced
from warmstart.mapping.suggesting.linking import Evidence
from warmstart.mapping.suggesting.matching import Pairing
from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.structure import Structure
from warmstart.mapping.suggesting.templates import Place, numbered


def learned(keys: Side, entries: Side, pairing: Pairing, beyond: Structure) -> dict[str, str]:
    """Segments of either side to those of the other that stand for them wherever one of the two is part of a sure pair.

    Segments that both sides use have partners of their own, and numbers mean something in their row only.
    """
    sure = [(c.key.path, c.entry.path, c.place) for c in pairing.pairs.values()]
    sure += [
        (link.key.path, link.entry.path, (link.key.path[len(link.place[0]) :], link.entry.path[len(link.place[1]) :]))
        for link in beyond.sure
        if link.evidence != Evidence.NUMBERS
    ]
    having: tuple[dict[str, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for at, (key, entry, _) in enumerate(sure):
        for side, path in zip(having, (key, entry), strict=True):
            for segment in path:
                side[segment].append(at)
    out = {}
    for old, new in sorted({two for _, _, place in sure if (two := _one(place, keys))}):
        own = old not in entries.segments and new not in keys.segments and having[0][old] == having[1][new]
        if own and _counts_alike(old, keys) and _counts_alike(new, entries):
            plain, other = sorted((old, new), key=lambda segment: (numbered(segment)[1] is not None, segment))
            out[other] = plain
    return out


def _counts_alike(segment: str, side: Side) -> bool:
    """Whether a number is of the same row everywhere: the second of two norms may be the third where there are three."""
    stem, number = numbered(segment)
    rows = [row for (_, name), row in side.families.items() if name == stem and number in row]
    return all(row == rows[0] for row in rows)


def _one(place: Place, side: Side) -> tuple[str, str] | None:
    """The segments that differ right after ones of the same words, or as the only ones; None if there are none."""
    a, b = replaced(place, side.lexicon)
    if not a or not b or a[-1].isdecimal() or b[-1].isdecimal():
        return None
    before = [[side.lexicon.content(segment) for segment in path[-2:-1]] for path in (a, b)]
    return (a[-1], b[-1]) if before[0] == before[1] else None
