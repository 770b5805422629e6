"""Numbered layers against named ones: what fits in one way only, by shapes, by numbers as an order, and by what lies around.

Names say nothing here, so that it is the whole that tells: every layer in a row of unlike blocks has its partner, and no
block of one side is spread over several of the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from warmstart.mapping.suggesting.layers import Layer, Row, Tree, item_of, ordered
from warmstart.mapping.suggesting.templates import Path, Template
from warmstart.mapping.suggesting.vocabulary import apart
from warmstart.mapping.suggesting.words import Lexicon

_ROUNDS = 12  # in which what is settled settles more
_LEAST = 8  # layers that must fit together
_CROWD = 24  # layers of one shape and place that more have too many readings


def fitted(
    keys: Sequence[Template], entries: Sequence[Template], known: Mapping[str, str], lexicon: Lexicon
) -> dict[str, str]:
    """Names of the checkpoint to the model's, of layers that fit together in one way only.

    Args:
        keys: The checkpoint's templates.
        entries: The model's.
        known: Entry to key, of what names say already.
        lexicon: How segments are read.
    """
    if any(all(len(template.shape) < 3 for template in side) for side in (keys, entries)):
        return {}  # no convolutions
    a, b = Tree.of(keys), Tree.of(entries)
    fit = _Fit(a, b)
    by_entry = {name: layer for layer in b.layers for name, _ in layer.tensors.values()}
    by_key = {name: layer for layer in a.layers for name, _ in layer.tensors.values()}
    for entry, key in known.items():
        x, y = by_key.get(key), by_entry.get(entry)
        if x is not None and y is not None:
            fit.settle(x, y)
        else:  # a bias went to a module that lacks its weight: so does the layer
            fit.gone.update(layer for layer in (x, y) if layer is not None)
    fit.spread()
    out = {}
    for x, y in fit.trusted(lexicon):
        for leaf, (name, shape) in x.tensors.items():
            if y.tensors.get(leaf, ("", None))[1] == shape:
                out[name] = y.tensors[leaf][0]
    return out


@dataclass(slots=True)
class _Fit:
    """Layers of the checkpoint and where they go.

    Attributes:
        gone: Layers of either side that names put where the other has none.
    """

    a: Tree
    b: Tree
    images: dict[Layer, Layer] = field(default_factory=dict)
    origins: dict[Layer, Layer] = field(default_factory=dict)
    gone: set[Layer] = field(default_factory=set)

    def settle(self, x: Layer, y: Layer) -> bool:
        """Whether two unsettled layers are a pair now: not where the maps that they follow, or are followed by, differ."""
        if x in self.images or y in self.origins or x.shape != y.shape or not self.gone.isdisjoint((x, y)):
            return False
        before, after = self.a.partner.get(x), self.b.partner.get(y)
        if (before is None) != (after is None):
            return False
        if before is not None and after is not None:
            there, back = self.images.get(before), self.origins.get(after)
            if (there is not None and there is not after) or (back is not None and back is not before):
                return False
        self.images[x], self.origins[y] = y, x
        return True

    def spread(self) -> None:
        """Settles what shapes, numbers, places and names that went together say, until they say no more."""
        for _ in range(_ROUNDS):
            moved = [self._follow(), self._classes(self._open())]
            if not any(moved) and not self._by_names() and not self._classes(self._open(anywhere=True)):
                return

    def _follow(self) -> bool:
        """A norm goes with its map, and a map with its norm."""
        moved = False
        for x, y in list(self.images.items()):
            before, after = self.a.partner.get(x), self.b.partner.get(y)
            if before is not None and after is not None:
                moved |= self.settle(before, after)
        return moved

    def _classes(self, found: Iterable[tuple[list[Layer], list[Layer]]]) -> bool:
        """Layers of one kind, one on each side, or several in the order of numbers."""
        moved = False
        for xs, ys in found:
            if len(xs) == len(ys) == 1:
                moved |= self.settle(xs[0], ys[0])
            elif len(xs) == len(ys) and self._is_placed(self.a, xs) and self._is_placed(self.b, ys):
                for x, y in zip(ordered(xs), ordered(ys), strict=False):
                    moved |= self.settle(x, y)
        return moved

    def _open(self, *, anywhere: bool = False) -> list[tuple[list[Layer], list[Layer]]]:
        """Unsettled layers of one shape on both sides, beside the same settled ones, or anywhere."""
        number = {x: hash((turn, ~turn)) for turn, x in enumerate(self.images)}
        beside = _sums(number), _sums({self.images[x]: n for x, n in number.items()})
        found: dict[Hashable, tuple[list[Layer], list[Layer]]] = defaultdict(lambda: ([], []))
        for side, (layers, settled) in enumerate(((self.a.layers, self.images), (self.b.layers, self.origins))):
            for layer in layers:
                if layer not in settled:
                    place = 0 if anywhere else beside[side].get(_around(layer.path, beside[side]), 0)
                    found[layer.shape, place][side].append(layer)
        return list(found.values())

    @staticmethod
    def _is_placed(tree: Tree, layers: Sequence[Layer]) -> bool:
        """Whether numbers put layers in one order, in a row that lacks none and that unlike items keep in place."""
        row = ordered(layers)
        if not row or any(tree.is_broken(layer.path) for layer in layers):
            return False
        first, last = row[0].path, row[-1].path
        depth = next(i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y)
        return tree.is_fixed(first[: depth + 1])

    def _by_names(self) -> bool:
        """What shapes and places leave open, by names that are proven to go together elsewhere."""
        moved = False
        proven = _Proven(self.images)
        beside = [{p for layer in settled for p in _above(layer.path)} for settled in (self.images, self.origins)]
        for xs, ys in self._open():
            if len(xs) > _CROWD or len(ys) > _CROWD:
                continue
            tails = [
                {layer: layer.path[len(_around(layer.path, beside[side])) :] for layer in layers}
                for side, layers in enumerate((xs, ys))
            ]
            for x in xs:
                meant = [y for y in ys if proven.says(tails[0][x], tails[1][y])]
                if len(meant) == 1:
                    moved |= self.settle(x, meant[0])
        return moved

    def trusted(self, lexicon: Lexicon) -> list[tuple[Layer, Layer]]:
        """Pairs in a row of unlike items, all of whose layers have partners and are spread over no other's."""
        if len(self.images) < _LEAST:
            return []
        settled = _counts(self.images), _counts(self.origins)
        both = Counter((p, q) for x, y in self.images.items() for p in _above(x.path) for q in _above(y.path))
        crossed = self._crossed(settled)
        good = {
            x
            for x, y in self.images.items()
            if (self.a.is_fixed(x.path) or self.b.is_fixed(y.path))
            and _is_whole(self.a, x.path, settled[0])
            and _is_whole(self.b, y.path, settled[1])
            and all(both[p, q] in (settled[0][p], settled[1][q]) for p in _above(x.path) for q in _above(y.path))
            and not any((p, q) in crossed for p in self.a.rows_of(x.path) for q in self.b.rows_of(y.path))
        }
        return [
            (x, self.images[x])
            for x in self._wholly(good)
            if self._is_told(x, self.images[x])
            and not apart(_words(x.path, lexicon), _words(self.images[x].path, lexicon))
        ]

    def _wholly(self, good: set[Layer]) -> list[Layer]:
        """What is left of layers without the items of rows that have others as well, on either side."""
        items = {x: (self.a.items_of(x.path), self.b.items_of(y.path)) for x, y in self.images.items()}
        while True:
            bad = [{item for x, both in items.items() if x not in good for item in both[side]} for side in (0, 1)]
            left = {x for x in good if all(bad[side].isdisjoint(items[x][side]) for side in (0, 1))}
            if len(left) == len(good):
                return [x for x in self.images if x in left]
            good = left

    def _is_told(self, x: Layer, y: Layer) -> bool:
        """Whether it is a convolution, whose widths chain, what follows one, or in the order of an `nn.Sequential`.

        Linear maps of one shape have any use, and names alone say which.
        """
        map_ = self.a.partner.get(x, x) if x.is_norm else x
        return len(map_.shape) > 2 or x.path[-1].isdecimal() or y.path[-1].isdecimal()

    def _crossed(self, settled: tuple[Counter[Path], Counter[Path]]) -> set[tuple[Row, Row]]:
        """Rows whose numbers go together in another order than ascending, or with other items left out between them."""
        numbers: dict[tuple[Row, Row], set[tuple[int, int]]] = defaultdict(set)
        for x, y in self.images.items():
            for p, turn in self.a.turns(x.path):
                for q, other in self.b.turns(y.path):
                    numbers[p, q].add((turn, other))
        return {
            (p, q)
            for (p, q), pairs in numbers.items()
            for (i, j), (k, m) in pairwise(sorted(pairs))
            if i < k and (j > m or _left_out(self.a, p, i, k, settled[0]) != _left_out(self.b, q, j, m, settled[1]))
        }


class _Proven:
    """Which ends of names went together."""

    def __init__(self, images: Mapping[Layer, Layer]) -> None:
        self._images = dict(images)
        self._known: dict[tuple[int, int], tuple[dict[Path, set[Path]], dict[Path, set[Path]]]] = {}

    def says(self, key: Path, entry: Path) -> bool:
        """Whether layers of the one name went to layers of the other, and to no others, and the other way round."""
        lengths = len(key), len(entry)
        if lengths not in self._known:
            there: dict[Path, set[Path]] = defaultdict(set)
            back: dict[Path, set[Path]] = defaultdict(set)
            for x, y in self._images.items():
                a, b = x.path[-lengths[0] :], y.path[-lengths[1] :]
                there[a].add(b)
                back[b].add(a)
            self._known[lengths] = there, back
        there, back = self._known[lengths]
        return there.get(key) == {entry} and back.get(entry) == {key}


def _above(path: Path) -> list[Path]:
    return [path[:depth] for depth in range(len(path))]


def _around(path: Path, settled: Iterable[Path] | Mapping[Path, int]) -> Path:
    """The narrowest module around a layer that has a settled one in it."""
    return next((path[:depth] for depth in range(len(path) - 1, 0, -1) if path[:depth] in settled), ())


def _sums(numbers: Mapping[Layer, int]) -> Counter[Path]:
    out: Counter[Path] = Counter()
    for layer, number in numbers.items():
        for path in _above(layer.path):
            out[path] += number
    return out


def _counts(layers: Iterable[Layer]) -> Counter[Path]:
    return Counter(path for layer in layers for path in (*_above(layer.path), layer.path))


def _left_out(tree: Tree, row: Row, first: int, last: int, settled: Counter[Path]) -> int:
    """How many items of a row between two others have unsettled layers."""
    between = (item_of(row, number) for number in tree.rows[row] if first < number < last)
    return sum(settled[item] < tree.profiles[item].total() for item in between)


def _is_whole(tree: Tree, path: Path, settled: Counter[Path]) -> bool:
    """Whether no row around a layer lacks anything, and all in each of its items that the layer stands in is settled."""
    return not tree.is_broken(path) and all(
        settled[item] == tree.profiles[item].total() for item in tree.items_of(path)
    )


def _words(path: Path, lexicon: Lexicon) -> list[str]:
    return [word for segment in path for word in lexicon.content(segment)]
