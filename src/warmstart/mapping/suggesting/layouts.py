"""Whether a map is stored as (out, in), as torch's `Linear` is, or as (in, out): one way in has the shape of the way back."""

from __future__ import annotations

from collections import Counter

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.items import Item
from warmstart.mapping.suggesting.side import Side, item_around
from warmstart.mapping.suggesting.templates import Path
from warmstart.mapping.suggesting.vocabulary import FUSED

# Maps of an attention that take the width of the model; of two in a row `q_a`, not `q_b`.
_INWARD = (FUSED[0], *FUSED[1])


def stored_outward(item: Item, shape: Shape, side: Side) -> bool:
    """Whether a map is known to be (out, in): its bias says so, or the maps into the attention beside it."""
    if len(shape) != 2:
        return False
    if biases := biases_of(item.path, side):
        return biases == {shape[:1]}
    inward = {
        t.shape
        for word in _INWARD
        for t in side.beside(item_around(item.path[:-1]), word, item)
        if {said for segment in t.path[-2:] for said in side.lexicon.content(segment)} <= {word, "a", "weight"}
    }
    return {two[0] in shape for two in inward if len(two) == 2 and (two[0] in shape) != (two[1] in shape)} == {False}


def either_layout(item: Item, side: Side) -> bool:
    """Whether a map may be stored either way: transposed, the maps beside it are the same, and nothing tells."""
    shapes = [shape for _, shape in item.tensors if len(shape) == 2 and shape != shape[::-1]]
    if len(shapes) != 1:
        return False
    maps = Counter(
        shape for tensors in side.children[item.path[:-1]].values() for _, shape in tensors if len(shape) == 2
    )
    return maps == Counter(shape[::-1] for shape in maps.elements()) and not stored_outward(item, shapes[0], side)


def biases_of(layer: Path, side: Side) -> set[Shape]:
    """The shapes of a layer's bias, in the items of the lists around it."""
    return {shape for _, shape in side.children[layer].get("bias", ())}
