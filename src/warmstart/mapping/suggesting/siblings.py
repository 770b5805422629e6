"""Siblings go together: where what is decided went, what lies beside it goes too, and under names that change alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from warmstart.mapping.suggesting.side import Bag, Side
from warmstart.mapping.suggesting.templates import Path, Place, Template


class Siblings:
    """Where the nodes of both trees go, by the pairs below them.

    Args:
        pairs: What is decided.
        keys: The checkpoint's templates.
        entries: The model's.
        landmarks: Modules that are one, whatever lies around them.
    """

    def __init__(
        self, pairs: Iterable[tuple[Template, Template]], keys: Side, entries: Side, landmarks: Iterable[Place] = ()
    ) -> None:
        self._landmarks = tuple(landmarks)
        self._images: tuple[dict[Path, Counter[Path]], ...] = (defaultdict(Counter), defaultdict(Counter))
        self._voters: tuple[Counter[Path], ...] = (Counter(), Counter())
        self._renamed: dict[Place, set[bool]] = defaultdict(set)
        for key, entry in pairs:
            for a, b in corresponding(key, entry, keys, entries):
                self._images[0][a][b] += 1
                self._images[1][b][a] += 1
                self._renamed[a, b].add(key.path[len(a) :] != entry.path[len(b) :])
            for side, path in enumerate((key.path, entry.path)):
                self._voters[side].update(path[:depth] for depth in range(1, len(path)))

    def go_along(self, key: Path, entry: Path) -> bool:
        """Whether a pair stays with what lies around it: most of that, on either side, went to no other place."""
        start = end = 1
        for a, b in self._landmarks:
            below = key[: len(a)] == a, entry[: len(b)] == b
            if any(below):
                if not all(below):
                    return False
                start, end = len(a) + 1, len(b) + 1
        return self._along(0, key, entry, start) and self._along(1, entry, key, end)

    def _along(self, side: int, path: Path, other: Path, start: int) -> bool:
        images, voters = self._images[side], self._voters[side]
        for depth in range(start, len(path)):
            node = path[:depth]
            usual = [image for image, count in images[node].items() if 2 * count > voters[node]]
            if usual and voters[node] > 1 and all(other[: len(image)] != image for image in usual):
                return False
        return True

    def keep_names(self, key: Path, entry: Path) -> bool:
        """Whether all that is decided beside a pair has one and the same name on both sides."""
        return self._renamed.get((key[:-1], entry[:-1])) == {False}


def corresponding(key: Template, entry: Template, keys: Side, entries: Side) -> Iterator[Place]:
    """The nodes above two templates below which their names have the same words."""
    there: dict[Bag, list[int]] = defaultdict(list)
    for depth, words in enumerate(entries.tails[entry]):
        there[words].append(depth)
    for depth, words in enumerate(keys.tails[key]):
        for other in there.get(words, ()):
            yield key.path[:depth], entry.path[:other]
