"""Matching by suffix: for trees that differ by another prefix in every place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from warmstart.mapping.model.names import KeyShapes, Shapes, fits, suffixes


@dataclass(frozen=True, slots=True)
class SuffixMatches:
    """Which key goes to which entry, and which cannot be told apart.

    Attributes:
        pairs: Key to entry, each used once, sorted by key. The two have one shape, or one name: a key and an entry of
            equal names belong together whatever their shapes, so that another shape is found out and not worked around.
        ties: Rivals, keys and entries: one name and all the names of the other side that it fits equally well.
    """

    pairs: dict[str, str]
    ties: list[tuple[tuple[str, ...], tuple[str, ...]]]


def match_suffixes(keys: KeyShapes, entries: Shapes) -> SuffixMatches:
    """Pair keys and entries of which one name is the end of the other, in whole segments.

    Equal names come first. Of the rest the longest ends are settled first: a pair is made where a name and a longer one
    of the same shape have only each other at that length, and names that were paired are out of the way of shorter
    ends. A shared end alone (`a.conv.weight`, `b.conv.weight`) makes no pair: what the longer name has in front is one
    prefix added or removed, never another one in its place. Linear in the number of segments, whatever the order.

    The idea is detectron2's `align_and_update_state_dicts`, here in both directions, in whole segments and with
    shapes deciding before the length does.

    Args:
        keys: Checkpoint key to shape; None fits any shape.
        entries: Model entry to shape.
    """
    pairs = {name: name for name in keys.keys() & entries.keys()}
    free = keys.keys() ^ entries.keys()
    longer: dict[str, list[str]] = defaultdict(list)  # a name -> the longer names of the other side that end in it
    for names, others in ((keys.keys(), entries.keys()), (entries.keys(), keys.keys())):
        ends = free & others
        depth = max((end.count(".") + 1 for end in ends), default=0)
        for name in sorted(free & names):
            for suffix in suffixes(name, depth):
                if suffix in ends:
                    longer[suffix].append(name)

    ties: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    settled: set[str] = set()
    for short in sorted(longer, key=lambda name: (-name.count("."), name)):
        if short in settled:
            continue
        is_entry = short in entries
        rivals = [
            long
            for long in longer[short]
            if long not in settled
            and (fits(keys[long], entries[short]) if is_entry else fits(keys[short], entries[long]))
        ]
        if not rivals:
            continue
        settled.update((short, *rivals))
        if len(rivals) > 1:
            ties.append((tuple(rivals), (short,)) if is_entry else ((short,), tuple(rivals)))
        elif is_entry:
            pairs[rivals[0]] = short
        else:
            pairs[short] = rivals[0]
    return SuffixMatches(dict(sorted(pairs.items())), ties)
