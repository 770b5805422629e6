"""Modules that are one because each side has but one of that name, with the same tensors in the same items of its list."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.siblings import corresponding
from warmstart.mapping.suggesting.side import Bag, Side, bag, item_around
from warmstart.mapping.suggesting.templates import Path, Place, Template, index_positions

_LEAST = 3  # tensors of unlike shapes by which a module is known again


@dataclass(frozen=True, slots=True)
class _Mark:
    """A module of a name that its side has once, in some items of a list.

    Attributes:
        path: Where it stands.
        around: The list that it stands in the items of.
        items: The indices of these.
        tensors: The shapes of what is in it, each with its indices.
    """

    path: Path
    around: Path
    items: frozenset[tuple[int, ...]]
    tensors: Counter[tuple[Shape, frozenset[tuple[int, ...]]]]


def landmarks(keys: Side, entries: Side, pairs: Iterable[tuple[Template, Template]]) -> tuple[Place, ...]:
    """Where modules of one name correspond, whatever stands between them and their list.

    The same name in the same few layers, scattered among others, is no chance: where a kind of layer starts or ends, all that
    is in it does, so that a run of them says nothing. Nor does a name that stands between other words on each side.
    """
    here, there = _marks(keys), _marks(entries)
    found = [(here[name], there[name]) for name in here.keys() & there.keys()]
    found = [(x, y) for x, y in found if x.items == y.items and x.tensors == y.tensors and _between(x, y, keys)]
    if not found:
        return ()
    lists = {place for key, entry in pairs for place in corresponding(key, entry, keys, entries)}
    return tuple(sorted((x.path, y.path) for x, y in found if (x.around, y.around) in lists))


def _between(x: _Mark, y: _Mark, side: Side) -> bool:
    """Whether at most one of two modules has words between it and its list that the other lacks."""
    a, b = (Counter(bag(mark.path[len(mark.around) :], side.lexicon)) for mark in (x, y))
    return a <= b or b <= a


def _marks(side: Side) -> Mapping[Bag, _Mark]:
    out = {}
    for path in _named_once(side):
        name, around = side.lexicon.content(path[-1]), item_around(path)
        inside = side.saying[name[0]]
        lists = len(index_positions(around))
        items = frozenset(indices[:lists] for template in inside for indices in template.names)
        if around and len({template.shape for template in inside}) >= _LEAST and _is_scattered(items):
            tensors = Counter((template.shape, frozenset(template.names)) for template in inside)
            out[name] = _Mark(path, around, items, tensors)
    return out


def _named_once(side: Side) -> list[Path]:
    """The modules whose name no other tensor of the side says."""
    by_name: dict[Bag, list[Path]] = defaultdict(list)
    for path in side.paths - side.names:
        if path and not index_positions(path[-1:]):
            by_name[side.lexicon.content(path[-1])].append(path)
    return [
        path
        for name, (path, *others) in by_name.items()
        if name and not others and all(t.path[: len(path)] == path for word in name for t in side.saying[word])
    ]


def _is_scattered(items: frozenset[tuple[int, ...]]) -> bool:
    """Whether items of a list are no run: others, without the module, lie between them."""
    last = sorted(indices[-1] for indices in items)
    return bool(last) and last[-1] - last[0] >= len(set(last))
