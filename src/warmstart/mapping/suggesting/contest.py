"""Nodes of unlike names that may as well be other nodes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.templates import Path, Place
from warmstart.mapping.suggesting.words import Lexicon


def contested(places: Iterable[Place], keys: Side, entries: Side) -> frozenset[Place]:
    """Nodes of unlike names of which either may be another's: of two towers, what is missing does not tell which it is."""
    images: tuple[dict[Path, set[Path]], ...] = (defaultdict(set), defaultdict(set))
    for key, entry in places:
        images[0][key].add(entry)
        images[1][entry].add(key)
    nodes = {_node(place, keys.lexicon) for place in places}
    unlike = [node for node in nodes if all(replaced(node, keys.lexicon)) and not _named(node, images, keys, entries)]
    by_end: dict[tuple[int, Path], list[Place]] = defaultdict(list)
    for node in unlike:
        by_end[0, node[0]].append(node)
        by_end[1, node[1]].append(node)
    said = {node: _said(node, keys.lexicon) for node in unlike}
    rivals = {
        node: [o for side in (0, 1) for o in by_end[side, node[side]] if _apart(node[1 - side], o[1 - side])]
        for node in unlike
    }
    beaten = {node for node in unlike if any(said[o] > said[node] for o in rivals[node])}
    return frozenset(node for node in unlike if node in beaten or any(o not in beaten for o in rivals[node]))


def _named(node: Place, images: tuple[Mapping[Path, set[Path]], ...], keys: Side, entries: Side) -> bool:
    """Whether one of two nodes has a partner of its own name, where what lies above it went."""
    for path, there, side in ((node[0], images[0], entries), (node[1], images[1], keys)):
        for depth in range(len(path)):
            if any((*above, *path[depth:]) in side.paths for above in there.get(path[:depth], ())):
                return True
    return False


def _apart(a: Path, b: Path) -> bool:
    """Whether none of two nodes lies below the other."""
    return any(x != y for x, y in zip(a, b, strict=False))


def _node(place: Place, lexicon: Lexicon) -> Place:
    """Two places without the segments that both end in."""
    key, entry = place
    while len(key) > 1 and len(entry) > 1 and lexicon.content(key[-1]) == lexicon.content(entry[-1]):
        key, entry = key[:-1], entry[:-1]
    return key, entry


def replaced(place: Place, lexicon: Lexicon) -> tuple[Path, Path]:
    """What differs between two paths once what both start and end with is taken off."""
    key, entry = place
    a, b = ([lexicon.content(segment) for segment in path] for path in place)
    left = 0
    while left < min(len(a), len(b)) and a[left] == b[left]:
        left += 1
    right = 0
    while right < min(len(a), len(b)) - left and a[-1 - right] == b[-1 - right]:
        right += 1
    return key[left : len(a) - right], entry[left : len(b) - right]


def _said(place: Place, lexicon: Lexicon) -> int:
    """How many words two paths share."""
    a, b = (Counter(words_of(path, lexicon)) for path in place)
    return (a & b).total()


def words_of(path: Path, lexicon: Lexicon) -> Iterator[str]:
    return (word for segment in path for word in lexicon.content(segment))
