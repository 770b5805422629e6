"""The layers of one side: where their numbers put them, and which norm follows which map."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.leaves import LEAVES
from warmstart.mapping.suggesting.templates import Path, Template, numbered
from warmstart.mapping.suggesting.words import INDEX

Row = tuple[Path, str]  # a module, and what stands before the numbers of some of its children

_ALONE = re.compile(r".*[0-9]x|(.*[^A-Za-z])?v")  # before a number that is a size or a version: `conv_3x3`, `net_v2`
_FIRST = 1  # the number from which a whole row starts at the latest
_BETWEEN = 2  # numbers between two layers of a row that hold no tensors: an activation, a pooling
_EVEN = 2  # numbers beyond which equal steps between them are the row's own
_UNLIKE = 3  # items without a map of the shape of another's from which a row fixes the place of each
_WAYS = 8  # to put norms to maps that are followed up


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A module of torch's own: a map, or a norm.

    Attributes:
        path: Where it stands, with all its numbers.
        shape: Its weight's.
        tensors: By torch's name, the name and the shape.
    """

    path: Path
    shape: Shape
    tensors: Mapping[str, tuple[str, Shape]]

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1


@dataclass(slots=True)
class Tree:
    """The layers of one side.

    Attributes:
        layers: All of them.
        at: By their paths.
        partner: Each map to the norm that follows it, where the names of this side say so, and the other way round.
        profiles: Each module to how many layers of each shape are in it.
        rows: The numbers of children that only these tell apart.
        starts: Rows in the same place of a list's items to the number from which they start at the latest.
    """

    layers: list[Layer]
    at: dict[Path, Layer]
    partner: dict[Layer, Layer] = field(default_factory=dict)
    profiles: dict[Path, Counter[Shape]] = field(default_factory=lambda: defaultdict(Counter))
    rows: dict[Row, set[int]] = field(default_factory=lambda: defaultdict(set))
    starts: dict[Row, int] = field(default_factory=lambda: defaultdict(lambda: _FIRST))
    _fixing: dict[Row, bool] = field(default_factory=dict)
    _broken: dict[Row, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, templates: Iterable[Template]) -> Tree:
        modules: dict[Path, dict[str, tuple[str, Shape]]] = defaultdict(dict)
        for template in templates:
            if template.path[-1] in LEAVES:
                for indices, name in template.names.items():
                    modules[_numbered_path(template.path[:-1], indices)][template.path[-1]] = name, template.shape
        layers = [layer for path, tensors in modules.items() if path and (layer := _layer(path, tensors))]
        tree = cls(layers, {layer.path: layer for layer in layers})
        for layer in tree.layers:
            for depth, segment in enumerate(layer.path):
                tree.profiles[layer.path[: depth + 1]][layer.shape] += 1
                stem, number = counted(segment)
                if number is not None:
                    tree.rows[layer.path[:depth], stem].add(number)
        tree.partner = dict(_partners(tree.at))
        for row, numbers in tree.rows.items():
            tree.starts[_kind(row)] = min(min(numbers), tree.starts[_kind(row)])
        return tree

    def rows_of(self, path: Path) -> Iterator[Row]:
        """The rows that a path goes through."""
        return (row for row, _ in self.turns(path))

    def turns(self, path: Path) -> Iterator[tuple[Row, int]]:
        """The rows that a path goes through, and its numbers in them."""
        for depth, segment in enumerate(path):
            stem, number = counted(segment)
            if number is not None:
                yield (path[:depth], stem), number

    def items_of(self, path: Path) -> list[Path]:
        """The items of rows that a path is or lies in."""
        return [item_of(row, number) for row, number in self.turns(path)]

    def is_broken(self, path: Path) -> bool:
        """Whether a row that a path goes through starts late or lacks some: others may be missing at its end as well."""
        return any(self._lacks(row) for row in self.rows_of(path))

    def _lacks(self, row: Row) -> bool:
        known = self._broken.get(row)
        if known is None:
            numbers = self.rows[row]
            steps = {after - before for before, after in _steps(numbers)}
            even = not row[1] and len(numbers) > _EVEN and len(steps) == 1 and max(steps) <= _BETWEEN + 1
            named = row[1] and item_of(row, min(numbers)) in self.at  # `_bn1`, where the block has no `_bn0`
            late = min(numbers) > (_FIRST if named else self.starts[_kind(row)])
            known = late or not (even or not any(self._gap(row, *two) for two in _steps(numbers)))
            self._broken[row] = known
        return known

    def _gap(self, row: Row, before: int, after: int) -> bool:
        """Whether numbers between two of a row are missing that are of no activation in an `nn.Sequential`."""
        modules = all(item_of(row, number) not in self.at for number in (before, after))
        return after - before - 1 > (0 if modules or row[1] else _BETWEEN)

    def is_fixed(self, path: Path) -> bool:
        """Whether a path is of a row whose items are so unlike each other that none can be taken for another."""
        return any(self._fixes(row) for row in self.rows_of(path))

    def _fixes(self, row: Row) -> bool:
        known = self._fixing.get(row)
        if known is None:
            seen: set[Shape] = set()
            unlike = 0
            for number in sorted(self.rows[row]):
                maps = {shape for shape in self.profiles[item_of(row, number)] if len(shape) > 1}
                if maps and not maps & seen:
                    unlike += 1
                    seen |= maps
            known = self._fixing[row] = unlike >= _UNLIKE
        return known


def _kind(row: Row) -> Row:
    return tuple(stem + INDEX if number is not None else stem for stem, number in map(counted, row[0])), row[1]


def item_of(row: Row, number: int) -> Path:
    """The path of one of a row."""
    return (*row[0], f"{row[1]}{number}")


def counted(segment: str) -> tuple[str, int | None]:
    """The stem and the number of a segment that is one of a row: not of `conv_3x3`."""
    stem, number = numbered(segment)
    return (segment, None) if _ALONE.fullmatch(stem) else (stem, number)


def ordered(layers: Iterable[Layer]) -> list[Layer]:
    """Layers in the order of their numbers; nothing where two are told apart by anything else first."""
    out = sorted(layers, key=lambda layer: [_turn(segment) for segment in layer.path])
    return out if all(_is_before(a.path, b.path) for a, b in pairwise(out)) else []


def _is_before(a: Path, b: Path) -> bool:
    for x, y in zip(a, b, strict=False):
        if x != y:
            (stem, number), (other, after) = counted(x), counted(y)
            return stem == other and number is not None and after is not None and number < after
    return False


def _turn(segment: str) -> tuple[str, int]:
    stem, number = counted(segment)
    return stem, -1 if number is None else number


def _steps(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    row = sorted(numbers)
    return pairwise(row)


def _numbered_path(path: Path, indices: Sequence[int]) -> Path:
    turn = iter(indices)
    return tuple(f"{segment[:-1]}{next(turn)}" if segment.endswith(INDEX) else segment for segment in path)


def _layer(path: Path, tensors: Mapping[str, tuple[str, Shape]]) -> Layer | None:
    shape = tensors.get("weight", ("", ()))[1]
    vectors = {shape for leaf, (_, shape) in tensors.items() if leaf != "num_batches_tracked" and leaf != "weight"}
    if len(shape) > 1 or (len(shape) == 1 and vectors == {shape}):
        return Layer(path, shape, tensors)
    return None


def _partners(at: Mapping[Path, Layer]) -> Iterator[tuple[Layer, Layer]]:
    """Maps and norms, both ways, that the names of this side put together in one way only."""
    beside: dict[Path, tuple[list[Layer], list[Layer]]] = defaultdict(lambda: ([], []))
    for layer in at.values():
        beside[layer.path[:-1]][layer.is_norm].append(layer)
    for parent, (maps, norms) in beside.items():
        own = at.get(parent)
        below = own is not None and not own.is_norm and len(norms) == 1  # `conv1.norm`
        two = {norms[0]: own} if own and below else _beside(maps, norms)
        if all(norm.shape[0] == map_.shape[0] for norm, map_ in two.items()):
            for norm, map_ in two.items():
                yield norm, map_
                yield map_, norm


def _beside(maps: Sequence[Layer], norms: Sequence[Layer]) -> dict[Layer, Layer]:
    """Norms to the maps of one module that they follow."""
    if len(maps) == len(norms) == 1:
        return {norms[0]: maps[0]}
    turns = [[counted(layer.path[-1]) for layer in side] for side in (maps, norms)]
    if not maps or any(number is None for _, number in turns[1]) or len({stem for stem, _ in turns[1]}) > 1:
        return {}
    if all(not stem for side in turns for stem, _ in side):  # `nn.Sequential`
        by_number = {number: layer for (_, number), layer in zip(turns[0], maps, strict=True)}
        following = {norm: by_number.get((number or 0) - 1) for (_, number), norm in zip(turns[1], norms, strict=True)}
        return {norm: map_ for norm, map_ in following.items() if map_ is not None}
    counts = [sorted(number for _, number in side if number is not None) for side in turns]
    if counts[0] == counts[1] and len({stem for stem, number in turns[0] if number is not None}) == 1:  # `conv1`, `bn1`
        by_number = {number: layer for (_, number), layer in zip(turns[0], maps, strict=True) if number is not None}
        return {norm: by_number[number] for (_, number), norm in zip(turns[1], norms, strict=True)}
    return _in_turn(maps, ordered(norms))


def _in_turn(maps: Sequence[Layer], norms: Sequence[Layer]) -> dict[Layer, Layer]:
    """Norms in their order to maps that are named and chain by their widths; or each to the only one of its width."""
    bare = [layer for layer in maps if "bias" not in layer.tensors]
    chains = _chains(bare if len(bare) == len(norms) else maps, norms)
    if len(chains) == 1 and all(
        after == before + 1 for before, after in _steps(counted(n.path[-1])[1] or 0 for n in norms)
    ):
        return dict(zip(norms, chains[0], strict=True))
    widths = Counter(norm.shape[0] for norm in norms), Counter(layer.shape[0] for layer in maps)
    return {
        norm: next(layer for layer in maps if layer.shape[0] == norm.shape[0])
        for norm in norms
        if widths[0][norm.shape[0]] == widths[1][norm.shape[0]] == 1
    }


def _chains(maps: Sequence[Layer], norms: Sequence[Layer]) -> list[list[Layer]]:
    """The ways to put maps before norms in turn so that each takes what the one before it gives."""
    found: list[list[Layer]] = [[]]
    for norm in norms:
        found = [
            [*chain, layer]
            for chain in found
            for layer in maps
            if layer.shape[0] == norm.shape[0]
            and layer not in chain
            and (not chain or _takes(layer, chain[-1].shape[0]))
        ]
        if len(found) > _WAYS:
            return []
    return found


def _takes(layer: Layer, width: int) -> bool:
    """Whether a map takes so many channels, be it in groups (which maps of single points have none of)."""
    grouped = layer.shape[0] == width and max(layer.shape[2:], default=1) > 1 and width % max(1, layer.shape[1]) == 0
    return layer.shape[1] == width or grouped
