"""Which pairs have enough evidence to be applied."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.items import Item, matched
from warmstart.mapping.suggesting.layouts import either_layout
from warmstart.mapping.suggesting.leaves import LEAVES
from warmstart.mapping.suggesting.linking import Evidence, Extra, Link, Twins
from warmstart.mapping.suggesting.matching import Candidate, Pairing, order_agrees, own_partner
from warmstart.mapping.suggesting.siblings import Siblings
from warmstart.mapping.suggesting.side import Side, item_around
from warmstart.mapping.suggesting.spelling import spelled_alike
from warmstart.mapping.suggesting.templates import Path, Place, Template, numbered
from warmstart.mapping.suggesting.vocabulary import FUSED, apart

_MISSING = 0.03  # share of one side's templates without a partner up to which the other is taken to have them all
_SUPPORT = 3  # names that must differ by the same words before these say nothing


def judged(links: Sequence[Link], twins: Sequence[Twins], keys: Side, entries: Side, pairing: Pairing) -> set[Link]:
    """Which links have enough for them to be applied.

    Every word explained is enough. Less is enough only where next to nothing is missing on one of the sides (`closed`): where
    tensors are missing on both, the true partner of one may be among them, and what is left over may be a stranger. And
    even there one tensor of each side may be missing that would have been the other's partner, so that a shape and a
    place alone are never enough.
    """
    pairs = pairing.pairs
    closed = _closed(links, twins, keys, entries, pairs)
    affixes: dict[Extra, set[frozenset[str]]] = defaultdict(set)
    rows: dict[object, set[frozenset[Shape]]] = defaultdict(set)
    repeats: dict[Extra, set[Shape]] = defaultdict(set)
    for link in links:
        affixes[link.extra].add(link.shared)
        repeats[link.extra].update(link.key.shapes)
        for places in link.rows:
            rows[places].add(frozenset(link.key.shapes))
    for group in twins:
        rows[group.keys[0].path[:-1], group.entries[0].path[:-1]].add(frozenset(group.keys[0].shapes))
    settled = {
        t.path[:depth] for pair in pairs.values() for t in (pair.key, pair.entry) for depth in range(len(t.path))
    }
    there: dict[Path, Counter[Path]] = defaultdict(Counter)
    back: dict[Path, Counter[Path]] = defaultdict(Counter)
    beside: dict[Place, list[Link]] = defaultdict(list)
    for link in links:
        above = link.key.path[:-1], link.entry.path[:-1]
        there[above[0]][above[1]] += 1
        back[above[1]][above[0]] += 1
        beside[above].append(link)
    siblings = Siblings(((c.key, c.entry) for c in pairs.values()), keys, entries, pairing.landmarks)
    crossed = {above: _crossed(row) for above, row in beside.items()}
    sure = set()
    for link in links:
        if pairing.is_contested(link.key.path, link.entry.path):
            continue
        a, b = link.extra
        if _outnumbered(link, keys, entries) or (
            not a
            and not b
            and link.evidence == Evidence.SOME_WORDS
            and not order_agrees(keys, link.key.path, entries, link.entry.path)
        ):
            continue
        some = link.evidence >= Evidence.SOME_WORDS
        owned = (
            _both_own(link, keys, entries)
            or any(own_partner(keys, x.path, entries, y.path, link.place) for x, y in matched(link.key, link.entry))
            or not siblings.go_along(link.key.path, link.entry.path)
        )
        if link.evidence == Evidence.WORDS or (
            not owned
            and (
                (link.evidence >= Evidence.PHRASE and not _is_other_norm(link, siblings))
                or (some and not (a and b) and len(affixes[link.extra]) >= _SUPPORT)
            )
        ):
            sure.add(link)
            continue
        if not (closed and link.evidence) or link.doubted or owned or apart(a, b):
            continue
        if _lacks(link.key.path, keys) or _lacks(link.entry.path, entries) or any(map(_lost, a | b)):
            continue
        if _around_numbers(link.key.path, link.place[0]) != _around_numbers(link.entry.path, link.place[1]):
            continue
        if either_layout(link.key, keys) or either_layout(link.entry, entries):
            continue
        row = any(
            len(rows[places]) > 1 and (together or not settled & {link.key.path[:-1], link.entry.path[:-1]})
            for places, together in link.rows.items()
        )
        a, b = _unexplained(link, keys, entries)
        known_there = any(_said_around(link.entry, link.place[1], w, entries) for w in a)
        known_here = any(_said_around(link.key, link.place[0], w, keys) for w in b)
        known = (
            known_there
            or known_here
            or any(w in entries.words for w in _above(a, link.key, keys))
            or any(w in keys.words for w in _above(b, link.entry, entries))
        )
        stranger = bool(a or b) and siblings.keep_names(link.key.path, link.entry.path)
        if (
            (some and not (a and b) and not known and not stranger)
            or (not (some and known) and spelled_alike(a, b))
            or (some and len(affixes[link.extra]) > 1 and not (known_there and known_here))
            or (
                (row or len(repeats[link.extra]) > 1)
                and (some or (_is_long(link, rows) and not (known_there and known_here)))
                and not stranger
                and not _strays(link, there, back)
                and not _swapped(link, keys, entries)
            )
            or link.evidence == Evidence.NUMBERS
            or _rare(link, keys, entries)
        ) and not crossed[link.key.path[:-1], link.entry.path[:-1]]:
            sure.add(link)
    return sure


def _is_other_norm(link: Link, siblings: Siblings) -> bool:
    """Whether one norm's name is the other's and a word more, where names are kept: `post_ffn_norm` is not `ffn_norm`."""
    more = "norm" in link.shared and bool(link.extra[0]) != bool(link.extra[1])
    return more and siblings.keep_names(link.key.path, link.entry.path)


def _said_around(item: Item, place: Path, word: str, side: Side) -> bool:
    """Whether a tensor says a word in the list item of another, or where that was looked for, the narrower of the two."""
    around = max(item_around(item.path[:-1]), place, key=len)
    return any(True for _ in side.beside(around, word, item))


def _unexplained(link: Link, keys: Side, entries: Side) -> Extra:
    """The extra words that the other's whole path does not say either: `self_attn.sink` is `attention_sink`."""
    out = []
    for words, side, other in ((link.extra[0], entries, link.entry), (link.extra[1], keys, link.key)):
        said = {word for segment in other.path for word in side.lexicon.content(segment)}
        out.append(words - LEAVES - said)
    return out[0], out[1]


def _above(words: frozenset[str], item: Item, side: Side) -> frozenset[str]:
    """Words that name a module around an item: wherever the other side says one, it may be that module."""
    return words - set(side.lexicon.content(item.path[-1]))


def _both_own(link: Link, keys: Side, entries: Side) -> bool:
    """Whether each side has all segments in which the two differ, so that each has its own partner."""
    a, b = set(link.key.path), set(link.entry.path)
    return bool(a - b) and bool(b - a) and a - b <= entries.segments and b - a <= keys.segments


def _swapped(link: Link, keys: Side, entries: Side) -> bool:
    """Whether both names are used on both sides, so that each has its own partner: `to_q` is not `out_proj`.

    A row of numbers that starts late has lost its first, and a row of one has lost the others.
    """
    above = link.key.path[:-1], link.entry.path[:-1]
    if above[0] != above[1] and above[0] in entries.paths and above[1] in keys.paths:
        return True
    said = []
    for words, item, other in ((link.extra[0], link.key, entries), (link.extra[1], link.entry, keys)):
        if any(_lost(word) for word in words):
            return True
        last = other.lexicon.content(item.path[-1])
        telling = frozenset(w for w in words if not w[0].isdecimal())
        said.append((telling & set(last) or telling, bool(last) and all(w.isdecimal() for w in last), other))
    bare = [only_number for _, only_number, _ in said]
    return all(
        any(w in other.words for w in words) and (not only_number or all(bare)) for words, only_number, other in said
    )


def _is_long(link: Link, rows: Mapping[object, set[frozenset[Shape]]]) -> bool:
    """Whether a row has enough shapes for a linear map to be known by them: two may be what is left of an attention."""
    linear = any(len(shape) == 2 for shape in link.key.shapes)
    return not linear or any(len(rows[places]) >= _SUPPORT or _go_and_return(rows[places]) for places in link.rows)


def _go_and_return(row: Collection[frozenset[Shape]]) -> bool:
    """Whether a row is one map and the map back, as an MLP's two, which biases tell apart."""
    matrices = {shape for shapes in row for shape in shapes if len(shape) == 2}
    biased = all(any(len(shape) == 1 for shape in shapes) for shapes in row)
    return biased and len(matrices) == 2 and matrices == {shape[::-1] for shape in matrices}


def _outnumbered(link: Link, keys: Side, entries: Side) -> bool:
    """Whether only a number names two of several alike, of which one side has more: of (w1, w2, w3), `w2` may be any of two."""
    alike, own = [], []
    for item, side in ((link.key, keys), (link.entry, entries)):
        beside = side.children[item.path[:-1]].values()
        alike.append(sum(any(shape in item.shapes for _, shape in tensors) for tensors in beside))
        own.append(set(side.lexicon.content(item.path[-1])))
    both = own[0] & own[1]
    return alike[0] != alike[1] and own[0] != own[1] and bool(both) and all(word.isdecimal() for word in both)


def _lost(word: str) -> bool:
    """Whether a number's row, as in `2 of 2-3`, starts late or has nothing else."""
    first, _, last = word.partition(" of ")[2].partition("-")
    return bool(last) and (_is_late(word) or first == last)


def _lacks(path: Path, side: Side) -> bool:
    """Whether a row of modules that a path goes through has gaps: what is left of it may be another's."""
    for depth, segment in enumerate(path):
        stem, number = numbered(segment)
        if number is not None:
            row = sorted(
                n for n in side.families[path[:depth], stem] if not _is_layer((*path[:depth], f"{stem}{n}"), side)
            )
            if any(after - before > 1 for before, after in pairwise(row)):
                return True
    return side.counts_short(path)


def _is_layer(path: Path, side: Side) -> bool:
    """Whether a module has tensors of its own, as those have that stand between activations in an `nn.Sequential`."""
    return path in side.names or not LEAVES.isdisjoint(side.children.get(path, ()))


def _around_numbers(path: Path, place: Path) -> list[int]:
    """The numbers of modules around a tensor: where the other side has others, it may mean the like of one."""
    return [number for segment in path[len(place) : -1] if (number := numbered(segment)[1]) is not None]


def _is_late(word: str) -> bool:
    """Whether a number's row, as in `2 of 2-3`, has lost its first."""
    return int(word.partition(" of ")[2].partition("-")[0] or 0) > 1


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
    """Whether a segment that either side has once says it.

    One name is the end of the other and starts with it, or both end in it: in a long word of a tensor's own, or with all
    words of the one in the other, in order.
    """

    def once(segment: str) -> bool:
        return keys.parents[segment] == entries.parents[segment] == 1

    short, long = sorted((link.key.path, link.entry.path), key=len)
    if long[len(long) - len(short) :] == short and once(short[0]):
        return True
    if short[-1] != long[-1] or not once(short[-1]) or numbered(short[-1])[1] is not None:
        return False
    rest = iter([keys.lexicon.content(segment) for segment in long])
    own = "" in {leaf for leaf, _ in link.key.tensors}
    return (own and len(short[-1].split("_")) > 2) or all(keys.lexicon.content(segment) in rest for segment in short)


def _closed(
    links: Sequence[Link], twins: Sequence[Twins], keys: Side, entries: Side, pairs: Mapping[Template, Candidate]
) -> bool:
    """Whether next to nothing of one of the sides is without a partner, be it a proposed one."""
    both = [(c.key, c.entry) for c in pairs.values()]
    both += [two for link in links for two in matched(link.key, link.entry)]
    both += [two for t in twins for x, y in zip(t.keys, t.entries, strict=True) for two in matched(x, y)]
    paired: list[Counter[Template]] = [Counter(), Counter()]
    for key, entry in both:
        same = len(key.names.keys() & entry.names.keys())
        shifted = same < len(key.names) == len(entry.names)
        for number, template in enumerate((key, entry)):
            paired[number][template] = len(template.names) if shifted else same
    shares = []
    for side, other, counts in ((keys, entries, paired[0]), (entries, keys, paired[1])):
        fused = _fused(side, other)
        missing = sum(
            1 - counts[template] / len(template.names) for template in side.templates if template not in fused
        )
        shares.append(missing / max(1, len(side.templates)))
    return min(shares) <= _MISSING


def _fused(side: Side, other: Side) -> set[Template]:
    """The queries, keys and values of which the other side has all three in one, or the other way round: no names pair them."""
    for one, more, parts in ((side, other, FUSED[:1]), (other, side, FUSED[1])):
        if FUSED[0] in one.words and FUSED[0] not in more.words and more.words.keys() >= set(FUSED[1]):
            return {template for part in parts for template in side.saying[part]}
    return set()
