"""How deep a parameter lies: the layers of a model, counted from its modules alone.

A stack is an outermost `ModuleList` or `Sequential` of which at least two elements, and at least half of those with parameters,
are of one class; its elements are layers. Stacks side by side in one module are one tower, counted one after another
(a ResNet's stages); stacks of different modules are towers of their own (the two sides of a CLIP, an encoder and a decoder).
What stands in a tower before its first layer lies below it, what stands between two belongs to the one before, and what
comes after the last lies above all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from warmstart.errors import MappingError
from warmstart.mapping.model.names import join


@dataclass(frozen=True, slots=True)
class _Tower:
    """Attributes: path of the module that holds its stacks; name to layer, from 1 on; places of its first and last name."""

    path: str
    layers: dict[str, int]
    count: int
    first: int
    last: int


def layers_above(model: nn.Module, names: Collection[str]) -> dict[str, int]:
    """For each parameter, in the model's order, the number of layers above it; 0 above the last layer.

    Raises:
        MappingError: The model has no stack of layers.
    """
    order = {name: place for place, name in enumerate(names)}
    towers = list(_towers(model, order))
    if not towers:
        raise MappingError(
            "layer_decay needs layers to count, and this model has no ModuleList or Sequential of modules of one class; leave "
            "it out, or build the groups yourself"
        )
    out: dict[str, int] = {}
    for name, place in order.items():
        tower = _nearest(name, place, towers)
        if name in tower.layers:
            layer = tower.layers[name]
        elif place < tower.first:
            layer = 0
        elif place > tower.last:
            layer = tower.count + 1
        else:
            layer = max(found for other, found in tower.layers.items() if order[other] < place)
        out[name] = tower.count + 1 - layer
    return out


def _towers(model: nn.Module, order: dict[str, int]) -> Iterator[_Tower]:
    by_parent: dict[str, list[str]] = {}
    for path, stack in _stacks("", model):
        layers = [join(path, leaf) for leaf, layer in stack.named_children() if _has_parameters(layer)]
        by_parent.setdefault(path.rpartition(".")[0], []).extend(layers)
    for parent, elements in by_parent.items():
        number = {element: n for n, element in enumerate(elements, 1)}
        found = {name: number[e] for name in order if (e := _above(name, number)) is not None}
        places = [order[name] for name in found]
        yield _Tower(parent, found, len(elements), min(places), max(places))


def _stacks(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        kinds = Counter(type(m) for m in module.children() if _has_parameters(m))
        most = max(kinds.values(), default=0)
        if most > 1 and 2 * most >= kinds.total():
            yield path, module
            return
    for leaf, child in module.named_children():
        yield from _stacks(join(path, leaf), child)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _above(name: str, paths: Collection[str]) -> str | None:
    """The one of `paths` that `name` lies below."""
    while name := name.rpartition(".")[0]:
        if name in paths:
            return name
    return None


def _nearest(name: str, place: int, towers: list[_Tower]) -> _Tower:
    """The tower that shares the most of its path with a name; of equals the first that is yet to come, or the last."""

    def shared(tower: _Tower) -> int:
        path, other = name.split("."), tower.path.split(".") if tower.path else []
        same = [a == b for a, b in zip(path, other, strict=False)]
        return same.index(False) if False in same else len(same)

    most = max(map(shared, towers))
    best = [tower for tower in towers if shared(tower) == most]
    return next((tower for tower in best if name in tower.layers or place < tower.first), best[-1])
