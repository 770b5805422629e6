"""What names alone leave open: tensors at corresponding places, told apart by shared words, by shapes, or not at all."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

from warmstart.mapping.suggesting.matching import Candidate, Side, corresponding, order_agrees
from warmstart.mapping.suggesting.templates import Path, Place, Shape, Template, numbered
from warmstart.mapping.suggesting.vocabulary import PHRASES, Phrase
from warmstart.mapping.suggesting.words import INDEX

# The names torch's own layers give their tensors: a `bias` is never a `running_mean`.
LEAVES = frozenset(
    ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight", "in_proj_bias")
)


_MARGIN = 0.2  # by which a pair must beat every rival, of the share of words in common
_CROWD = 32  # words that more items share do not pair them
_TWINS = 4  # more of one shape have too many readings to say them
_LAST = chr(0x10FFFF)
_MISSING = 0.03  # share of one side's templates without a partner up to which the other is taken to have them all
_SUPPORT = 3  # names that must differ by the same words before these say nothing

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
class Item:
    """A module's own tensors that are not matched yet, or one tensor that has no layer of torch around it.

    Attributes:
        path: The module's path, or the tensor's.
        tensors: (leaf or "", shape) to the template.
    """

    path: Path
    tensors: dict[tuple[str, Shape], Template] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its last segment; of a single tensor the tensor's."""
        return next(iter(self.tensors.values())).path[-1] if len(self.tensors) == 1 else self.path[-1]

    @property
    def shapes(self) -> Counter[Shape]:
        return Counter(shape for _, shape in self.tensors)


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
class Structure:
    """What was found beyond names in context."""

    links: list[Link] = field(default_factory=list)
    twins: list[Twins] = field(default_factory=list)
    closed: bool = False
    sure: set[Link] = field(default_factory=set)


def structure(keys: Side, entries: Side, pairs: Mapping[Template, Candidate], vocabulary: bool) -> Structure:
    """Pairs for what `pairs` leaves open, each with its evidence."""
    taken = {candidate.entry for candidate in pairs.values()}
    open_keys = _items(t for t in keys.templates if t not in pairs)
    open_entries = _items(t for t in entries.templates if t not in taken)
    found = Structure()
    places = _places(pairs, keys, entries)
    work = _Work(keys, entries, set(open_keys), set(open_entries), PHRASES if vocabulary else (), _modules(pairs))
    for decide in (work.by_all_words, work.by_words, work.by_shapes):
        for place in places:
            found.links += decide(place)
    found.twins = [twins for place in places for twins in work.twins(place)]
    found.sure = _sure(found, keys, entries, pairs)
    return found


def _closed(found: Structure, keys: Side, entries: Side, pairs: Mapping[Template, Candidate]) -> bool:
    """Whether next to nothing of one of the sides is without a partner, be it a proposed one."""
    both = [(c.key, c.entry) for c in pairs.values()]
    both += [two for link in found.links for two in matched(link.key, link.entry)]
    both += [two for t in found.twins for x, y in zip(t.keys, t.entries, strict=True) for two in matched(x, y)]
    paired: list[Counter[Template]] = [Counter(), Counter()]
    for key, entry in both:
        same = len(key.names.keys() & entry.names.keys())
        shifted = same < len(key.names) == len(entry.names)
        for side, template in enumerate((key, entry)):
            paired[side][template] = len(template.names) if shifted else same
    shares = []
    for side, counts in zip((keys, entries), paired, strict=True):
        missing = sum(1 - counts[template] / len(template.names) for template in side.templates)
        shares.append(missing / max(1, len(side.templates)))
    return min(shares) <= _MISSING


def _sure(found: Structure, keys: Side, entries: Side, pairs: Mapping[Template, Candidate]) -> set[Link]:
    """Which links have enough for them to be applied.

    Every word explained is enough. Less is enough only where next to nothing is missing on one of the sides (`closed`): where
    tensors are missing on both, the true partner of one may be among them, and what is left over may be a stranger. And
    even there one tensor of each side may be missing that would have been the other's partner, so that a shape and a
    place alone are never enough.
    """
    found.closed = _closed(found, keys, entries, pairs)
    affixes: dict[Extra, set[frozenset[str]]] = defaultdict(set)
    rows: dict[object, set[frozenset[Shape]]] = defaultdict(set)
    repeats: dict[Extra, set[Shape]] = defaultdict(set)
    for link in found.links:
        affixes[link.extra].add(link.shared)
        repeats[link.extra].update(link.key.shapes)
        for places in link.rows:
            rows[places].add(frozenset(link.key.shapes))
    for twins in found.twins:
        rows[twins.keys[0].path[:-1], twins.entries[0].path[:-1]].add(frozenset(twins.keys[0].shapes))
    settled = {
        t.path[:depth] for pair in pairs.values() for t in (pair.key, pair.entry) for depth in range(len(t.path))
    }
    there: dict[Path, Counter[Path]] = defaultdict(Counter)
    back: dict[Path, Counter[Path]] = defaultdict(Counter)
    beside: dict[Place, list[Link]] = defaultdict(list)
    for link in found.links:
        above = link.key.path[:-1], link.entry.path[:-1]
        there[above[0]][above[1]] += 1
        back[above[1]][above[0]] += 1
        beside[above].append(link)
    crossed = {above: _crossed(row) for above, row in beside.items()}
    sure = set()
    for link in found.links:
        a, b = link.extra
        some = link.evidence >= Evidence.SOME_WORDS
        if link.evidence >= Evidence.PHRASE or (some and not (a and b) and len(affixes[link.extra]) >= _SUPPORT):
            sure.add(link)
            continue
        if not found.closed or link.doubted:
            continue
        row = any(
            len(rows[places]) > 1 and (together or not settled & {link.key.path[:-1], link.entry.path[:-1]})
            for places, together in link.rows.items()
        )
        known = any(w in entries.words for w in a - LEAVES) or any(w in keys.words for w in b - LEAVES)
        if (
            (some and not (a and b) and not known)
            or (
                (row or len(repeats[link.extra]) > 1)
                and not _strays(link, there, back)
                and not _swapped(link, keys, entries)
            )
            or link.evidence == Evidence.NUMBERS
            or _rare(link, keys, entries)
        ) and not crossed[link.key.path[:-1], link.entry.path[:-1]]:
            sure.add(link)
    return sure


def _swapped(link: Link, keys: Side, entries: Side) -> bool:
    """Whether both names are used on both sides, so that each has its own partner: `to_q` is not `out_proj`.

    A row of numbers that starts late has lost its first.
    """
    above = link.key.path[:-1], link.entry.path[:-1]
    if above[0] != above[1] and above[0] in entries.paths and above[1] in keys.paths:
        return True
    said = []
    for words, item, other in ((link.extra[0], link.key, entries), (link.extra[1], link.entry, keys)):
        if any(w[0].isdecimal() and int(w.partition(" of ")[2].partition("-")[0] or 0) > 1 for w in words):
            return True
        last = other.lexicon.content(item.path[-1])
        telling = frozenset(w for w in words if not w[0].isdecimal())
        said.append((telling & set(last) or telling, bool(last) and all(w.isdecimal() for w in last), other))
    bare = [only_number for _, only_number, _ in said]
    return all(
        any(w in other.words for w in words) and (not only_number or all(bare)) for words, only_number, other in said
    )


def _strays(link: Link, there: Mapping[Path, Counter[Path]], back: Mapping[Path, Counter[Path]]) -> bool:
    """Whether more of what lies beside one of the two went to another place than its own."""
    a, b = link.key.path[:-1], link.entry.path[:-1]
    return max(there[a].values()) > there[a][b] or max(back[b].values()) > back[b][a]


def _crossed(row: Sequence[Link]) -> bool:
    """Whether the numbers of two rows would go together in another order than ascending."""
    numbers = [(numbered(link.key.path[-1])[1], numbered(link.entry.path[-1])[1]) for link in row]
    order = sorted((a, b) for a, b in numbers if a is not None and b is not None)
    return [b for _, b in order] != sorted(b for _, b in order)


def _rare(link: Link, keys: Side, entries: Side) -> bool:
    """Whether one name is the end of the other, and starts with a segment that either side has once."""
    a, b = link.key.path, link.entry.path
    if "" not in {leaf for leaf, _ in link.key.tensors} or a[-1] != b[-1] or len(keys.lexicon.segment(a[-1])) < 3:
        short, long = sorted((a, b), key=len)
        if long[len(long) - len(short) :] != short:
            return False
        segment = short[0]
    else:
        segment = a[-1]
    return keys.parents[segment] == entries.parents[segment] == 1


def _modules(pairs: Mapping[Template, Candidate]) -> tuple[dict[Path, Path], dict[Path, Path]]:
    layers = [(c.key.path[:-1], c.entry.path[:-1]) for c in pairs.values() if c.key.path[-1] in LEAVES]
    return dict(layers), {b: a for a, b in layers}


def _items(templates: Iterable[Template]) -> list[Item]:
    items: dict[Path, Item] = {}
    for template in templates:
        leaf = template.path[-1] if template.path[-1] in LEAVES and len(template.path) > 1 else ""
        path = template.path[:-1] if leaf else template.path
        items.setdefault(path, Item(path)).tensors[leaf, template.shape] = template
    return list(items.values())


def _places(pairs: Mapping[Template, Candidate], keys: Side, entries: Side) -> list[Place]:
    """Which nodes correspond, by the pairs below them; the deepest first, the roots last."""
    votes: dict[Path, Counter[Path]] = defaultdict(Counter)
    for candidate in pairs.values():
        for a, b in corresponding(candidate.key, candidate.entry, keys, entries):
            votes[a][b] += 1
    places = []
    for node, images in votes.items():
        most = max(images.values())
        places += [(node, image) for image, count in images.items() if count == most]
    places.append(((), ()))
    return sorted(set(places), key=lambda place: (-len(place[0]), -len(place[1]), place))


@dataclass(slots=True)
class _Work:
    keys: Side
    entries: Side
    keys_left: set[Item]
    entries_left: set[Item]
    phrases: tuple[Phrase, ...]
    modules: tuple[dict[Path, Path], dict[Path, Path]]  # of tensors in layers of torch: where the layer went
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

    def by_all_words(self, place: Place) -> Iterator[Link]:
        """Pairs of the same words."""
        return self.by_words(place, least=1.0)

    def by_words(self, place: Place, least: float = 0.0) -> Iterator[Link]:
        """Pairs that share more words with each other than with any rival of their shape."""
        a, b = self._below(place)
        if not a or not b:
            return
        words = _Words(self, place, a, b)
        having: dict[str, list[Item]] = defaultdict(list)
        for y in b:
            for word in words.said(y):
                having[word].append(y)
        options = []
        for x in a:
            sharing = {y: None for word in sorted(words.said(x)) if len(having[word]) <= _CROWD for y in having[word]}
            options += [
                (score, x, y) for y in sharing if _fit(x, y) and (score := words.score(x, y)) > 0 and score >= least
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
            yield self._link(place, words, x, y)

    def by_shapes(self, place: Place) -> Iterator[Link]:
        """Pairs of which only one on each side has the shapes."""
        a, b = self._below(place)
        if not a or not b:
            return
        words = _Words(self, place, a, b)
        groups: dict[frozenset[tuple[Shape, int]], tuple[list[Item], list[Item]]] = defaultdict(lambda: ([], []))
        for side, items in enumerate((a, b)):
            for item in items:
                groups[frozenset(item.shapes.items())][side].append(item)
        for xs, ys in groups.values():
            if len(xs) == len(ys) == 1 and _fit(xs[0], ys[0]) and not words.vetoed(xs[0], ys[0]):
                yield self._link(place, words, xs[0], ys[0])
            elif len(xs) == len(ys) == 2:
                yield from self._by_phrase(place, words, xs, ys)
            if 1 < len(xs) == len(ys) <= _TWINS and xs[0] in self.keys_left:
                yield from self._by_abbreviation(place, words, xs, ys)
            if len(xs) == len(ys) > 1 and xs[0] in self.keys_left:
                yield from self._by_numbers(place, words, xs, ys)

    def _by_phrase(self, place: Place, words: _Words, xs: list[Item], ys: list[Item]) -> Iterator[Link]:
        said = [words.said(x) for x in xs], [words.said(y) for y in ys]
        for phrase in self.phrases:
            if not phrase.tells:
                continue
            turns = [[_turn(w, phrase.rows) for w in side] for side in said]
            if all(sorted(t or (9,) for t in side) == [(0,), (1,)] for side in turns):
                for x, turn in zip(xs, turns[0], strict=True):
                    y = ys[turns[1].index(turn)]
                    if _fit(x, y):
                        yield self._link(place, words, x, y, phrase=True)
                return

    def _by_abbreviation(self, place: Place, words: _Words, xs: list[Item], ys: list[Item]) -> Iterator[Link]:
        """Rows of which each name begins the name of exactly one of the other: `b` and `s` are `bias` and `scale`."""
        chosen = [[y for y in ys if _begins(x.name, y.name)] for x in xs]
        if all(len(found) == 1 for found in chosen) and len({found[0] for found in chosen}) == len(ys):
            for x, (y,) in zip(xs, chosen, strict=True):
                if not words.vetoed(x, y):
                    yield self._link(place, words, x, y, phrase=True)

    def _by_numbers(self, place: Place, words: _Words, xs: list[Item], ys: list[Item]) -> Iterator[Link]:
        """Two rows that differ by nothing but a number go together in ascending order."""
        rows = [_row(items) for items in (xs, ys)]
        if all(rows):
            for x, y in zip(*rows, strict=True):
                yield self._link(place, words, x, y, numbers=True)

    def _link(
        self, place: Place, words: _Words, x: Item, y: Item, *, phrase: bool = False, numbers: bool = False
    ) -> Link:
        self.keys_left.discard(x)
        self.entries_left.discard(y)
        a, b = words.said(x), words.said(y)
        extra = a - b, b - a
        if a and a == b and order_agrees(self.keys, x.path, self.entries, y.path):
            evidence = Evidence.WORDS
        elif numbers:
            evidence = Evidence.NUMBERS
        elif phrase or words.same_turn(x, y):
            evidence = Evidence.PHRASE
        elif any(not w[0].isdecimal() for w in a & b):
            evidence = Evidence.SOME_WORDS
        else:
            evidence = Evidence.SHAPES
        return Link(x, y, place, evidence, extra, a & b, words.contradicts(x, y, tells=False))

    def twins(self, place: Place) -> Iterator[Twins]:
        a, b = self._below(place)
        groups: dict[frozenset[tuple[Shape, int]], tuple[list[Item], list[Item]]] = defaultdict(lambda: ([], []))
        for side, items in enumerate((a, b)):
            for item in items:
                groups[frozenset(item.shapes.items())][side].append(item)
        for xs, ys in groups.values():
            if 1 < len(xs) == len(ys) <= _TWINS:
                self.keys_left.difference_update(xs)
                self.entries_left.difference_update(ys)
                yield self._likely(place, xs, ys)

    def _likely(self, place: Place, xs: list[Item], ys: list[Item]) -> Twins:
        words = _Words(self, place, xs, ys)
        for phrase in self.phrases:
            turns = [[words.turn(item, phrase) for item in items] for items in (xs, ys)]
            if all(turns[0]) and sorted(turns[0]) == sorted(turns[1]) and len(set(turns[0])) == len(xs):
                ordered = tuple(ys[turns[1].index(turn)] for turn in turns[0])
                return Twins(tuple(xs), ordered, f"the more usual of two readings ({phrase.source})")
        return Twins(tuple(xs), tuple(ys))


class _Words:
    """The words of items below a place; a word that many of them have weighs little."""

    def __init__(self, work: _Work, place: Place, a: Sequence[Item], b: Sequence[Item]) -> None:
        self.work, self.place = work, place
        self._said: dict[Item, frozenset[str]] = {}
        for side, items in enumerate((a, b)):
            for item in items:
                self._said[item] = self._read(item, side)
        self.counts = [Counter(w for i in items for w in self._said[i]) for items in (a, b)]

    def _read(self, item: Item, side: int) -> frozenset[str]:
        lexicon = self.work.keys.lexicon
        path = item.path[len(self.place[side]) :]
        out = set()
        for depth, segment in enumerate(path, len(self.place[side])):
            stem, number = numbered(segment)
            for word in lexicon.content(segment):
                if word.isdecimal() and number is not None:
                    row = (self.work.keys, self.work.entries)[side].families[item.path[:depth], stem]
                    word = f"{word} of {min(row)}-{max(row)}"
                if word != INDEX:
                    out.add(word)
        if len(item.tensors) == 1 or all(not leaf for leaf, _ in item.tensors):
            pass
        return frozenset(out)

    def said(self, item: Item) -> frozenset[str]:
        return self._said[item]

    def score(self, x: Item, y: Item) -> float:
        a, b = self._said[x], self._said[y]
        if self.vetoed(x, y):
            return 0.0
        shared = sum(self._weight(w) for w in a & b)
        total = sum(self._weight(w) for w in a) + sum(self._weight(w) for w in b)
        return 2 * shared / total if total else 0.0

    def _weight(self, word: str) -> float:
        return 1 / max(1, self.counts[0][word], self.counts[1][word])

    def same_turn(self, x: Item, y: Item) -> bool:
        """Whether the vocabulary says that the two stand at the same place of one row."""
        rows = [(_turn(self._said[x], p.rows), _turn(self._said[y], p.rows)) for p in self.work.phrases if p.tells]
        return any(a and a == b for a, b in rows)

    def vetoed(self, x: Item, y: Item) -> bool:
        """Whether a tensor beside one of them went elsewhere, or the vocabulary says they stand at different places."""
        there, back = self.work.modules[0].get(x.path), self.work.modules[1].get(y.path)
        if (there and there not in (y.path, y.path[:-1])) or (back and back not in (x.path, x.path[:-1])):
            return True
        return self.contradicts(x, y, tells=True)

    def contradicts(self, x: Item, y: Item, *, tells: bool) -> bool:
        """Whether the vocabulary says that the two stand at different places of a row."""
        turns = (self._turns(x, y, p) for p in self.work.phrases if p.tells is tells)
        return any(a and b and a != b for a, b in turns)

    def _turns(self, x: Item, y: Item, phrase: Phrase) -> tuple[tuple[int, ...], ...]:
        return self.turn(x, phrase), self.turn(y, phrase)

    def turn(self, item: Item, phrase: Phrase) -> tuple[int, ...]:
        """Which place of a row the words of an item name, or those of its last segment; nothing if none."""
        last = frozenset(self.work.keys.lexicon.content(item.path[-1]))
        return _turn(self._said[item], phrase.rows) or _turn(last, phrase.rows)


def _begins(a: str, b: str) -> bool:
    return a != b and (a.startswith(b) or b.startswith(a))


def _row(items: Sequence[Item]) -> list[Item]:
    """Items whose paths differ in one number only, in its order; nothing if they do not."""
    found = []
    for item in items:
        number = numbered(item.path[-1])[1]
        if number is not None:
            found.append((number, item))
    stems = {(item.path[:-1], numbered(item.path[-1])[0]) for _, item in found}
    numbers = {number for number, _ in found}
    if len(found) < len(items) or len(stems) > 1 or len(numbers) < len(items):
        return []
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


@lru_cache(maxsize=1 << 14)
def _turn(words: frozenset[str], rows: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    words = frozenset(word.partition(" ")[0] for word in words)
    return tuple(sorted({turn for row in rows for turn, text in enumerate(row) if words == frozenset(text.split())}))


def _fit(x: Item, y: Item) -> bool:
    """Whether all tensors that both have are of one shape, and there is one."""
    for leaf, shape in x.tensors:
        if (leaf, shape) in y.tensors:
            continue
        if leaf and any(other == leaf for other, _ in y.tensors):
            return False
    return bool(matched(x, y))


def matched(x: Item, y: Item) -> list[tuple[Template, Template]]:
    """The tensors of two items that go together: by leaf and shape, or by shape where one has no layer's names."""
    out = [(t, y.tensors[place]) for place, t in x.tensors.items() if place in y.tensors]
    if not out and ("" in {leaf for leaf, _ in x.tensors} or "" in {leaf for leaf, _ in y.tensors}):
        by_shape = {shape: t for (_, shape), t in y.tensors.items()}
        out = [(t, by_shape[shape]) for (_, shape), t in x.tensors.items() if shape in by_shape]
    return [(a, b) for a, b in out if len(next(iter(a.names))) == len(next(iter(b.names)))]
