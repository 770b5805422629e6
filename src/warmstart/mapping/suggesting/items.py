"""What is paired where names alone leave it open: a module's own tensors, or one tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.leaves import LEAVES
from warmstart.mapping.suggesting.templates import Path, Template


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


def items_of(templates: Iterable[Template]) -> list[Item]:
    items: dict[Path, Item] = {}
    for template in templates:
        leaf = template.path[-1] if template.path[-1] in LEAVES and len(template.path) > 1 else ""
        path = template.path[:-1] if leaf else template.path
        items.setdefault(path, Item(path)).tensors[leaf, template.shape] = template
    return list(items.values())


def fit(x: Item, y: Item) -> bool:
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
