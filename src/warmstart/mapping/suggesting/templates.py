"""Names as templates: the layers of a list are one template, so that one decision covers them all."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.leaves import torch_names
from warmstart.mapping.suggesting.words import INDEX, Lexicon

Path = tuple[str, ...]
Place = tuple[Path, Path]  # a path of the checkpoint and the one of the model that corresponds to it

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_STEM = re.compile(r"(.*[^0-9])(0|[1-9][0-9]{0,8})")
_ALIKE = 0.6  # share of a list's tensors that have the shape most items have at that place
_HALF = 0.5  # and more than this share of its matrices
_LIST = 4  # items from which bare layers are a list; fewer are a row of different ones (`mlp.0`, `mlp.2`)
_STEMS = 3  # items from which numbered names (`block1`, `block2`, ...) are a list


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """Names of one side that differ in the indices of lists only, and have one shape.

    Attributes:
        path: The segments, an index as `#` (`layers`, `#`, `weight`) or at the end of its segment (`block#`, `weight`); a
            tensor of a layer by torch's name for it.
        shape: The shape of all.
        leaf: The last segment as it is spelled.
        names: Indices, from left to right, to the name.
    """

    path: Path
    shape: Shape
    leaf: str
    names: dict[tuple[int, ...], str] = field(default_factory=dict)

    @property
    def spelled(self) -> Path:
        """The path as the names spell it."""
        return (*self.path[:-1], self.leaf)

    def __repr__(self) -> str:
        return f"{'.'.join(self.spelled).replace(INDEX, '#')} {self.shape} x{len(self.names)}"


def index_positions(path: Path) -> list[int]:
    """Which segments of a template's path hold an index."""
    return [i for i, segment in enumerate(path) if segment.endswith(INDEX)]


def templates(*sides: Mapping[str, Shape], lexicon: Lexicon) -> list[list[Template]]:
    """The templates of each side, in the order of their first names. Linear in the number of names and their depth.

    What is a list is decided for all sides together: a model of one layer has the list that its checkpoint has.
    """
    split = []
    for side in sides:
        others = [name for other in sides if other is not side for name in other]
        told = torch_names(side, others, lexicon)
        split.append({name: tuple(told[name].split(".")) for name in side})
    lists = _lists(split, sides)
    out = []
    for shapes, names in zip(sides, split, strict=True):
        found: dict[tuple[Path, Shape, str], Template] = {}
        for name in shapes:
            path, indices = _generalised(names[name], lists)
            leaf = name.rpartition(".")[2] if not path[-1].endswith(INDEX) else path[-1]
            template = found.get((path, shapes[name], leaf))
            if template is None:
                template = found[path, shapes[name], leaf] = Template(path, shapes[name], leaf)
            template.names[indices] = name
        out.append(list(found.values()))
    return out


def _generalised(segments: Path, lists: set[tuple[Path, str]]) -> tuple[Path, tuple[int, ...]]:
    path: list[str] = []
    indices: list[int] = []
    for depth, segment in enumerate(segments):
        stem, number = numbered(segment)
        if number is not None and (tuple(path[:depth]), stem) in lists:
            path.append(stem + INDEX)
            indices.append(number)
        else:
            path.append(segment)
    return tuple(path), tuple(indices)


@lru_cache(maxsize=1 << 16)
def numbered(segment: str) -> tuple[str, int | None]:
    """The stem and the number at the end of a segment: (`block`, 2) of `block2`, (``, 2) of `2`, (`norm`, None) of `norm`."""
    if _NUMBER.fullmatch(segment):
        return "", int(segment)
    match = _STEM.fullmatch(segment)
    return (match[1], int(match[2])) if match else (segment, None)


def _lists(split: Sequence[Mapping[str, Path]], sides: Sequence[Mapping[str, Shape]]) -> set[tuple[Path, str]]:
    """Which (parent, stem) hold the like items of a list. Decided from the root down, as parents are generalised first."""
    lists: set[tuple[Path, str]] = set()
    levels: list[list[tuple[Path, Path, Shape]]] = [
        [((), segments, shapes[name]) for name, segments in names.items()]
        for names, shapes in zip(split, sides, strict=True)
    ]
    while any(levels):
        verdicts: dict[tuple[Path, str], list[bool | None]] = defaultdict(list)
        for level in levels:
            for place, items in _numbered_items(level).items():
                verdicts[place].append(_alike(place[1], items))
        lists.update(place for place, said in verdicts.items() if True in said and False not in said)
        levels = [
            [((*parent, s), rest[1:], shape) for parent, rest, shape in level for s in _step(parent, rest, lists)]
            for level in levels
        ]
    return lists


def _numbered_items(
    level: Iterable[tuple[Path, Path, Shape]],
) -> dict[tuple[Path, str], dict[int, list[tuple[Path, Shape]]]]:
    items: dict[tuple[Path, str], dict[int, list[tuple[Path, Shape]]]] = defaultdict(lambda: defaultdict(list))
    for parent, rest, shape in level:
        stem, number = numbered(rest[0])
        if number is not None:
            items[parent, stem][number].append((rest[1:], shape))
    return items


def _step(parent: Path, rest: Path, lists: set[tuple[Path, str]]) -> Iterator[str]:
    if len(rest) > 1:
        stem, number = numbered(rest[0])
        yield stem + INDEX if number is not None and (parent, stem) in lists else rest[0]


def _alike(stem: str, children: Mapping[int, list[tuple[Path, Shape]]]) -> bool | None:
    """Whether numbered siblings are the items of one list: the same tensors of the same shapes in most of them.

    None where there are too few to tell.
    """
    bare = all(len(rest) <= 1 for tails in children.values() for rest, _ in tails)
    if len(children) < (_LIST if bare else _STEMS if stem else 1):
        return None
    if stem and max(children) - min(children) >= 2 * len(children):
        return False
    by_tail: dict[Path, Counter[Shape]] = defaultdict(Counter)
    for tails in children.values():
        for rest, shape in tails:
            tail = tuple(INDEX if _NUMBER.fullmatch(segment) else segment for segment in rest)
            by_tail[tail][shape] += 1
    return _share(by_tail.values()) >= _ALIKE and _share(_matrices(by_tail.values())) > _HALF


def _matrices(counts: Iterable[Counter[Shape]]) -> list[Counter[Shape]]:
    """Vectors are as long in layers of unlike maps: it is matrices that tell whether layers are alike."""
    return [Counter({shape: n for shape, n in found.items() if len(shape) > 1}) for found in counts]


def _share(counts: Iterable[Counter[Shape]]) -> float:
    """The share of tensors that have the shape which most items have at their place; 1 of none."""
    found = [c for c in counts if c]
    return sum(max(c.values()) for c in found) / sum(map(Counter.total, found)) if found else 1.0
