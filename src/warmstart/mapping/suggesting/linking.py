"""Pairs at corresponding places: by shared words, by shapes, by rows that the vocabulary or numbers order."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.items import Item, fit
from warmstart.mapping.suggesting.matching import order_agrees, spread_apart
from warmstart.mapping.suggesting.place_words import Modules, PlaceWords, turn_of
from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.templates import Path, Place, numbered
from warmstart.mapping.suggesting.vocabulary import Phrase

_MARGIN = 0.2  # by which a pair must beat every rival, of the share of words in common
_CROWD = 32  # words that more items share do not pair them
_ABBREVIATION = 2  # letters of a name that may be the beginning of another: a longer one is a word of its own
_TWINS = 4  # more of one shape have too many readings to say them
_LAST = chr(0x10FFFF)

Extra = tuple[frozenset[str], frozenset[str]]


class Evidence(IntEnum):
    """What speaks for a pair, the stronger the higher."""

    ELIMINATION = 0  # the last ones left of their shape
    SHAPES = 1  # the shapes of a whole row of siblings are one to one, no word is shared
    NUMBERS = 2  # rows that only numbers tell apart
    SOME_WORDS = 3  # shared words, and words that only one or both have
    PHRASE = 4  # the vocabulary names both, or the one is the beginning of the other
    WORDS = 5  # every word


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A pair of items.

    Attributes:
        extra: Words that only one of them has: (the checkpoint's, the model's).
        shared: Words that both have.
        doubted: Whether the vocabulary would rather have it the other way.
    """

    key: Item
    entry: Item
    place: Place
    evidence: Evidence
    extra: Extra
    shared: frozenset[str]
    doubted: bool

    @property
    def rows(self) -> dict[tuple[Path, ...], bool]:
        """The rows of siblings it stands in, and whether they are siblings on both sides."""
        a, b = self.key.path[:-1], self.entry.path[:-1]
        return {(a, b): True} | ({(a,): False, (b,): False} if self.place != ((), ()) else {})


@dataclass(frozen=True, slots=True)
class Twins:
    """Items that shapes and words cannot tell apart: every one of the checkpoint's may be every one of the model's.

    Attributes:
        keys: Those of the checkpoint, in the order of the more likely reading.
        entries: Those of the model.
        why: What makes it the more likely one; nothing: no more than the order of names.
    """

    keys: tuple[Item, ...]
    entries: tuple[Item, ...]
    why: str = ""


@dataclass(slots=True)
class Linker:
    """What is left of both sides, and pairs of it."""

    keys: Side
    entries: Side
    keys_left: set[Item]
    entries_left: set[Item]
    phrases: tuple[Phrase, ...]
    modules: Modules
    _sorted: list[list[Item]] = field(init=False)

    def __post_init__(self) -> None:
        self._sorted = [sorted(items, key=lambda item: item.path) for items in (self.keys_left, self.entries_left)]

    def _below(self, place: Place) -> tuple[list[Item], list[Item]]:
        """What is left below a place, in the order of paths."""
        out = []
        for items, left, path in zip(self._sorted, (self.keys_left, self.entries_left), place, strict=True):
            start = bisect_left(items, path, key=lambda item: item.path)
            end = bisect_left(items, (*path, _LAST), key=lambda item: item.path) if path else len(items)
            out.append([item for item in items[start:end] if item in left] if left else [])
        return out[0], out[1]

    def _words(self, place: Place, a: list[Item], b: list[Item]) -> PlaceWords:
        return PlaceWords((self.keys, self.entries), self.phrases, self.modules, place, (a, b))

    def by_all_words(self, place: Place) -> Iterator[Link]:
        """Pairs of the same words."""
        return self.by_words(place, least=1.0)

    def by_words(self, place: Place, least: float = 0.0) -> Iterator[Link]:
        """Pairs that share more words with each other than with any rival of their shape."""
        a, b = self._below(place)
        if not a or not b:
            return
        words = self._words(place, a, b)
        having: dict[str, list[Item]] = defaultdict(list)
        for y in b:
            for word in words.said(y):
                having[word].append(y)
        options = []
        for x in a:
            sharing = {y: None for word in sorted(words.said(x)) if len(having[word]) <= _CROWD for y in having[word]}
            options += [
                (score, x, y) for y in sharing if fit(x, y) and (score := words.score(x, y)) > 0 and score >= least
            ]
        best: dict[Item, list[tuple[float, Item]]] = defaultdict(list)
        for score, x, y in options:
            best[x].append((score, y))
            best[y].append((score, x))
        for score, x, y in sorted(options, key=lambda o: (-o[0], o[1].path, o[2].path)):
            if x not in self.keys_left or y not in self.entries_left:
                continue
            rivals = [s for node in (x, y) for s, other in best[node] if other is not x and other is not y]
            if rivals and max(rivals) > score - _MARGIN:
                continue
            shared = words.said(x) & words.said(y)
            if score < 1 and all(
                any(words.said(node) & words.said(other) >= shared for _, other in best[node] if other not in (x, y))
                for node in (x, y)
            ):
                continue  # both have others that share as much: only what they say more would tell
            yield self._link(place, words, x, y)

    def by_shapes(self, place: Place) -> Iterator[Link]:
        """Pairs of which only one on each side has the shapes."""
        a, b = self._below(place)
        if not a or not b:
            return
        words = self._words(place, a, b)
        for xs, ys in _by_shapes(a, b):
            if len(xs) == len(ys) == 1 and fit(xs[0], ys[0]) and not words.vetoed(xs[0], ys[0]):
                yield self._link(place, words, xs[0], ys[0])
            elif len(xs) == len(ys) == 2:
                yield from self._by_phrase(place, words, xs, ys)
            if 1 < len(xs) == len(ys) <= _TWINS and xs[0] in self.keys_left:
                yield from self._by_abbreviation(place, words, xs, ys)
            if len(xs) == len(ys) > 1 and xs[0] in self.keys_left:
                yield from self._by_numbers(place, words, xs, ys)

    def _by_phrase(self, place: Place, words: PlaceWords, xs: list[Item], ys: list[Item]) -> Iterator[Link]:
        said = [words.told(x) for x in xs], [words.told(y) for y in ys]
        for phrase in self.phrases:
            if not words.telling(phrase, xs, ys):
                continue
            turns = [[turn_of(w, phrase.rows) for w in side] for side in said]
            if all(sorted(t or (9,) for t in side) == [(0,), (1,)] for side in turns):
                for x, turn in zip(xs, turns[0], strict=True):
                    y = ys[turns[1].index(turn)]
                    if fit(x, y):
                        yield self._link(place, words, x, y, phrase=True)
                return

    def _by_abbreviation(self, place: Place, words: PlaceWords, xs: list[Item], ys: list[Item]) -> Iterator[Link]:
        """Rows of which each name begins the name of exactly one of the other: `b` and `s` are `bias` and `scale`."""
        chosen = [[y for y in ys if _begins(x.name, y.name)] for x in xs]
        if all(len(found) == 1 for found in chosen) and len({found[0] for found in chosen}) == len(ys):
            for x, (y,) in zip(xs, chosen, strict=True):
                if not words.vetoed(x, y):
                    yield self._link(place, words, x, y, phrase=True)

    def _by_numbers(self, place: Place, words: PlaceWords, xs: list[Item], ys: list[Item]) -> Iterator[Link]:
        """Two rows that differ by nothing but a number go together in ascending order."""
        rows = [_row(items, side) for items, side in ((xs, self.keys), (ys, self.entries))]
        if all(rows):
            for x, y in zip(*rows, strict=True):
                yield self._link(place, words, x, y, numbers=True)

    def _link(
        self, place: Place, words: PlaceWords, x: Item, y: Item, *, phrase: bool = False, numbers: bool = False
    ) -> Link:
        self.keys_left.discard(x)
        self.entries_left.discard(y)
        a, b = words.said(x), words.said(y)
        extra = a - b, b - a
        if spread_apart(self.keys, x.path, self.entries, y.path):
            evidence = Evidence.ELIMINATION
        elif a == b and any(map(_is_word, a)) and order_agrees(self.keys, x.path, self.entries, y.path):
            fillers = self.keys.has_fillers(x.path) or self.entries.has_fillers(y.path)
            evidence = Evidence.SOME_WORDS if fillers and x.path[-1] != y.path[-1] else Evidence.WORDS
        elif numbers:
            evidence = Evidence.NUMBERS
        elif phrase or words.sameturn_of(x, y):
            evidence = Evidence.PHRASE
        elif any(map(_is_word, a & b)):
            evidence = Evidence.SOME_WORDS
        else:
            evidence = Evidence.SHAPES
        return Link(x, y, place, evidence, extra, a & b, words.contradicts(x, y, tells=False))

    def twins(self, place: Place) -> Iterator[Twins]:
        for xs, ys in _by_shapes(*self._below(place)):
            if 1 < len(xs) == len(ys) <= _TWINS:
                self.keys_left.difference_update(xs)
                self.entries_left.difference_update(ys)
                yield self._likely(place, xs, ys)

    def _likely(self, place: Place, xs: list[Item], ys: list[Item]) -> Twins:
        words = self._words(place, xs, ys)
        for phrase in self.phrases:
            turns = [[words.turn(item, phrase) for item in items] for items in (xs, ys)]
            if all(turns[0]) and sorted(turns[0]) == sorted(turns[1]) and len(set(turns[0])) == len(xs):
                ordered = tuple(ys[turns[1].index(turn)] for turn in turns[0])
                return Twins(tuple(xs), ordered, f"the more usual of two readings ({phrase.source})")
        return Twins(tuple(xs), tuple(ys))


def _by_shapes(a: Iterable[Item], b: Iterable[Item]) -> Iterable[tuple[list[Item], list[Item]]]:
    """Items of both sides that have the same shapes."""
    groups: dict[frozenset[tuple[Shape, int]], tuple[list[Item], list[Item]]] = defaultdict(lambda: ([], []))
    for side, items in enumerate((a, b)):
        for item in items:
            groups[frozenset(item.shapes.items())][side].append(item)
    return groups.values()


def _is_word(word: str) -> bool:
    return not word[0].isdecimal()


def _begins(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return len(short) <= _ABBREVIATION < len(long) and long.startswith(short)


def _row(items: Sequence[Item], side: Side) -> list[Item]:
    """Items whose paths differ in one number only, in its order; nothing if they do not, or their row has lost its first."""
    found = []
    for item in items:
        number = numbered(item.path[-1])[1]
        if number is not None:
            found.append((number, item))
    stems = {(item.path[:-1], numbered(item.path[-1])[0]) for _, item in found}
    numbers = {number for number, _ in found}
    if len(found) < len(items) or len(stems) > 1 or len(numbers) < len(items) or min(side.families[stems.pop()]) > 1:
        return []
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]
