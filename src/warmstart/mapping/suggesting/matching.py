"""Matching by names in context: equal tails of names below places that many tensors say correspond."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.contest import contested, replaced, words_of
from warmstart.mapping.suggesting.indices import spread
from warmstart.mapping.suggesting.layouts import biases_of
from warmstart.mapping.suggesting.leaves import LEAVES
from warmstart.mapping.suggesting.side import Bag, Side, bag
from warmstart.mapping.suggesting.templates import Path, Place, Template, numbered
from warmstart.mapping.suggesting.vocabulary import apart
from warmstart.mapping.suggesting.words import Lexicon

Tail = tuple[Bag, Shape]

_CROWD = 24  # tails that more templates share say nothing about which is which
_SUPPORT = 3  # modules with different tails that must agree before two places with unlike names correspond
_PREFIXED = 2  # and before all of one name stands behind a prefix
_RIVALS = 2  # and before a place of another name is as likely


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to pair a checkpoint's template with a model's.

    Attributes:
        place: What is left of both paths before their common tail.
        rank: 3 for letter-equal tails, 2 for equal words, 1 for equal words but fillers.
    """

    key: Template
    entry: Template
    place: Place
    tail: Bag
    rank: int


def candidates(keys: Side, entries: Side) -> dict[Template, list[Candidate]]:
    """For each template of the checkpoint, the model's templates of its shape with the longest common tail."""
    index: dict[Tail, list[tuple[Template, int]]] = defaultdict(list)
    for entry in entries.templates:
        seen = set()
        for start, words in enumerate(entries.tails[entry]):
            if words not in seen:
                seen.add(words)
                index[words, entry.shape].append((entry, start))
    found: dict[Template, list[Candidate]] = {}
    for key in keys.templates:
        best: dict[Template, Candidate] = {}
        for start, words in enumerate(keys.tails[key]):
            there = index.get((words, key.shape), [])
            if len(there) > _CROWD or not words:
                continue
            for entry, other in there:
                if entry in best or not _overlap(key, entry):
                    continue
                place = key.path[:start], entry.path[:other]
                if (
                    _numbers_agree(keys, key, start, entries, entry, other)
                    and order_agrees(keys, key.path[start:], entries, entry.path[other:])
                    and not own_partner(keys, key.path, entries, entry.path, place)
                    and not _own_module(keys, key.path[start:], entries, entry.path[other:], place)
                    and not _other_bias(keys, key.path, entries, entry.path)
                ):
                    rank = _rank(key.path[start:], entry.path[other:], keys.lexicon)
                    best[entry] = Candidate(key, entry, place, words, rank)
        found[key] = list(best.values())
    return found


def _overlap(key: Template, entry: Template) -> bool:
    """Whether the two could be the same tensors: as many lists, and most indices of the smaller in the other."""
    a, b = key.names, entry.names
    depth = len(next(iter(a)))
    if depth != len(next(iter(b))):
        return False
    return depth == 0 or 2 * len(a.keys() & b.keys()) >= min(len(a), len(b)) or len(a) == len(b)


def order_agrees(keys: Side, key: Path, entries: Side, entry: Path) -> bool:
    """Whether words in another order are the same name: `image_to_token` is not `token_to_image` if one side has both.

    Nor is the norm in a module, `conv.norm`, one that is named after it, `norm_conv`.
    """
    a, b = ([w for s in path for w in keys.lexicon.content(s)] for path in (key, entry))
    if a == b:
        return True
    contents = ([keys.lexicon.content(s) for s in path] for path in (key, entry))
    inside = [any([w for w in content if not w.isdecimal()] == ["norm"] for content in each) for each in contents]
    if inside[0] != inside[1]:
        return False
    return not any(
        s in entries.segments for s in key if s not in entry and len(keys.lexicon.content(s)) > 1
    ) and not any(s in keys.segments for s in entry if s not in key and len(keys.lexicon.content(s)) > 1)


def own_partner(keys: Side, key: Path, entries: Side, entry: Path, place: Place) -> bool:
    """Whether one of two names below corresponding places is there on the other side as well, of whatever shape.

    `mlp.c_fc` is not `mlp.c_proj` where both sides have both: it is transposed, or another model's.
    """
    a, b = key[len(place[0]) :], entry[len(place[1]) :]
    return a != b and ((*place[1], *a) in entries.paths or (*place[0], *b) in keys.paths)


def _own_module(keys: Side, key: Path, entries: Side, entry: Path, place: Place) -> bool:
    """Whether a module in two tails of one length has its own partner: `block.1` is not `proj.1`, which say the same."""
    return len(key) == len(entry) and any(
        a != b
        and (
            (*place[1], *entry[:turn], a) in entries.paths
            or (*place[0], *key[:turn], b) in keys.paths
            or entries.has_fillers((*place[1], *entry[:turn], b))
            or keys.has_fillers((*place[0], *key[:turn], a))
        )
        for turn, (a, b) in enumerate(zip(key, entry, strict=True))
    )


def _other_bias(keys: Side, key: Path, entries: Side, entry: Path) -> bool:
    """Whether two layers have biases of other lengths: a map stored as (in, out) has the shape of the map back."""
    here, there = biases_of(key[:-1], keys), biases_of(entry[:-1], entries)
    return bool(here and there) and here.isdisjoint(there) and key[-1] in LEAVES and entry[-1] in LEAVES


def _numbers_agree(keys: Side, key: Template, start: int, entries: Side, entry: Template, other: int) -> bool:
    """Whether numbers count from the same start: `conv1` of `conv1..3` is not `convs.1` of `convs.0..2`."""
    both = list(zip(_numbers(key.path, start), _numbers(entry.path, other), strict=False))
    return all(
        _count_alike(keys, x, entries, y, key.path == entry.path)
        if x.segment == y.segment
        else x.number == y.number and _rows_alike(keys.families[x.row], entries.families[y.row])
        for x, y in both
    ) and not any(_spread_apart(keys, x, entries, y) for x, y in both)


def _rows_alike(a: set[int], b: set[int]) -> bool:
    """Whether rows of other names count from the same start, which one that may have lost its first does not say."""
    return min(a) == min(b) and min(len(a), len(b)) > 1


def _count_alike(keys: Side, x: _Number, entries: Side, y: _Number, same_path: bool) -> bool:
    """Whether a number of two rows may be one: `norm1` of `norm0..1` is not that of `norm1..2`.

    Under one path a row of which the other side has only some starts where these do.
    """
    a, b = keys.families[x.row], entries.families[y.row]
    if same_path and (a <= b or b <= a):
        return True
    return min(a) == min(b) and keys.first(*x.row) == entries.first(*y.row)


def spread_apart(keys: Side, key: Path, entries: Side, entry: Path) -> bool:
    """Whether a number of two paths may be another's, as one side has fewer of its row, and names beside it instead."""
    there = {(y.segment, len(entry) - y.depth): y for y in _numbers(entry, 0)}
    return any(
        _spread_apart(keys, x, entries, there[x.segment, len(key) - x.depth])
        for x in _numbers(key, 0)
        if (x.segment, len(key) - x.depth) in there
    )


def _spread_apart(keys: Side, x: _Number, entries: Side, y: _Number) -> bool:
    a, b = keys.families[x.row], entries.families[y.row]
    if a == b or x.stem or y.stem:
        return False
    here, there = (*x.parent, x.segment), (*y.parent, y.segment)
    return spread(map(str, a - b), entries.children, there, keys.children, here) or spread(
        map(str, b - a), keys.children, here, entries.children, there
    )


class _Number(NamedTuple):
    """A number in a path, with its segment, what stands before it there, and the path above."""

    number: int
    segment: str
    stem: str
    parent: Path

    @property
    def depth(self) -> int:
        return len(self.parent)

    @property
    def row(self) -> tuple[Path, str]:
        return self.parent, self.stem


def _numbers(path: Path, start: int) -> list[_Number]:
    """Each number in a tail."""
    out = []
    for depth in range(start, len(path)):
        stem, number = numbered(path[depth])
        if number is not None:
            out.append(_Number(number, path[depth], stem, path[:depth]))
    return sorted(out)


def _rank(key: Path, entry: Path, lexicon: Lexicon) -> int:
    if key == entry:
        return 3
    a, b = ([w for s in path for w in lexicon.segment(s)] for path in (key, entry))
    return 2 if sorted(a) == sorted(b) else 1


@dataclass(frozen=True, slots=True)
class Pairing:
    """What names in context say.

    Attributes:
        pairs: The pairs they are evidence for; each template is in one pair at most.
        contested: Nodes of unlike names that as well may be other nodes: nothing below them is sure.
        landmarks: Modules that are one, whatever lies around them.
    """

    pairs: dict[Template, Candidate]
    contested: frozenset[Place]
    landmarks: tuple[Place, ...] = ()

    def is_contested(self, key: Path, entry: Path) -> bool:
        """Whether two names would go together below nodes that may be others."""
        return bool(self.contested) and any(
            (key[:i], entry[:j]) in self.contested for i in range(1, len(key)) for j in range(1, len(entry))
        )


def pair(keys: Side, entries: Side) -> Pairing:
    """Pair both sides by names in context."""
    found = candidates(keys, entries)
    votes: dict[Place, set[Tail]] = defaultdict(set)
    for key, options in found.items():
        for option in options:
            votes[option.place].add((_module(option, keys.lexicon), key.shape))
    agreed = [place for place, tails in votes.items() if _agree(tails, _RIVALS)]
    unclear = contested(agreed, keys, entries)
    pairing = Pairing({}, unclear)
    chosen: dict[Template, Candidate] = {}
    for key, options in found.items():
        best = _best([o for o in options if not pairing.is_contested(o.key.path, o.entry.path)], votes, keys, entries)
        if best is not None:
            chosen[key] = best
    return Pairing(_mutual(chosen, votes), unclear)


def _module(option: Candidate, lexicon: Lexicon) -> Bag:
    """The words of a tail, but for what a layer calls its tensors: weight and bias of one norm are one name."""
    tail = option.key.path[len(option.place[0]) :]
    return bag(tail[:-1], lexicon) if tail[-1] in LEAVES else option.tail


def _strength(option: Candidate, votes: dict[Place, set[Tail]]) -> tuple[int, int, int]:
    root = option.place == ((), ())
    return (root, len(votes[option.place]), option.rank)


def _best(options: list[Candidate], votes: dict[Place, set[Tail]], keys: Side, entries: Side) -> Candidate | None:
    good = [o for o in options if _corresponds(o.place, votes[o.place], keys, entries)]
    if not good:
        return None
    good.sort(key=lambda o: _strength(o, votes), reverse=True)
    if any(_strength(good[0], votes) == _strength(other, votes) for other in good[1:]):
        return None
    return good[0]


def _corresponds(place: Place, tails: set[Tail], keys: Side, entries: Side) -> bool:
    """Whether two places may be one: by their words, or because different tensors below agree and no name speaks against."""
    if place == ((), ()):
        return True
    return _agree(tails, _SUPPORT if all(place) else _PREFIXED) and not _both_own(place, keys, entries)


def _agree(tails: set[Tail], least: int) -> bool:
    """Whether so many different modules, and more than one shape, stand below two places."""
    return len({words for words, _ in tails}) >= least and len({shape for _, shape in tails}) > 1


def _both_own(place: Place, keys: Side, entries: Side) -> bool:
    """Whether a name is replaced by another although a side has both, side by side, or by one that is never the other."""
    key, entry = place
    a, b = replaced(place, keys.lexicon)
    if not a or not b:
        return False
    if keys.lexicon.vocabulary and apart(*(words_of(path, keys.lexicon) for path in place)):
        return True
    if keys.counts_short(key) or entries.counts_short(entry):
        return True
    left = next(i for i in range(len(key) + 1) if key[i : i + len(a)] == a)
    other = next(i for i in range(len(entry) + 1) if entry[i : i + len(b)] == b)
    return entries.reads((*entry[:other], *a)) or keys.reads((*key[:left], *b))


def _mutual(chosen: dict[Template, Candidate], votes: dict[Place, set[Tail]]) -> dict[Template, Candidate]:
    """Each entry keeps the strongest of the keys that chose it, if one is."""
    by_entry: dict[Template, list[Candidate]] = defaultdict(list)
    for option in chosen.values():
        by_entry[option.entry].append(option)
    kept = {}
    for options in by_entry.values():
        options.sort(key=lambda o: _strength(o, votes), reverse=True)
        if len(options) == 1 or _strength(options[0], votes) > _strength(options[1], votes):
            kept[options[0].key] = options[0]
    return kept
