"""The map by which a branch of a block goes back into the width of the model: shapes prove it, whatever it is called."""

from __future__ import annotations

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.items import Item
from warmstart.mapping.suggesting.layouts import biases_of, stored_outward
from warmstart.mapping.suggesting.side import Side, item_around
from warmstart.mapping.suggesting.vocabulary import BRANCHES, FILLERS, WAYS_BACK, WAYS_BACK_BY_SHAPE


def way_back(item: Item, side: Side) -> str | None:
    """Which branch an item is the way back of, attention or MLP; None if its name or its shape does not say so.

    A map of shape (out, in) is one if norms around the branch have its `out` and none has its `in`, and no other tensor of
    the branch has its shape. So xFormers' `w3`, of (w1, w2, w3) as (gate, up, down), is one, and llama's `w3` is not.
    Where the name leaves open whether it is the way in, stored as (in, out), something beside it must tell the layout.
    """
    block, branch = item_around(item.path[:-1]), item.path[:-1]
    matrices = [shape for _, shape in item.tensors if len(shape) > 1]
    name = _name(item, side)
    if not block or len(matrices) != 1 or name not in WAYS_BACK | WAYS_BACK_BY_SHAPE:
        return None
    (shape,) = matrices
    beside = [other for tensors in side.children[branch].values() for _, other in tensors]
    norms = (norm for norm in side.beside(block, "norm", item) if norm.path[: len(branch)] != branch)
    widths = {norm.shape[0] for norm in norms if len(norm.shape) == 1}
    if shape[-2] not in widths or shape[-1] in widths or beside.count(shape) > 1:
        return None
    if biases_of(item.path, side) - {shape[-2:-1]}:
        return None
    if not (name in WAYS_BACK or _is_gated(shape, beside) or stored_outward(item, shape, side)):
        return None
    said = branches_of(item, side)
    return said.pop() if len(said) == 1 else None


def branches_of(item: Item, side: Side) -> set[str]:
    """The branches of its block that the name of an item says."""
    block = item_around(item.path[:-1])
    words = (word for segment in item.path[len(block) :] for word in side.lexicon.content(segment))
    return {BRANCHES[word] for word in words if word in BRANCHES}


def _is_gated(shape: Shape, beside: list[Shape]) -> bool:
    """Whether two maps go the other way: a gated MLP has two ways in and one back, however they are stored."""
    return beside.count((*shape[:-2], shape[-1], shape[-2])) > 1


def _name(item: Item, side: Side) -> frozenset[str]:
    """The words of a map's own name: `w2_weight` is the weight of `w2`."""
    words = frozenset(side.lexicon.content(item.path[-1])) - FILLERS.keys()
    return words - {"weight"} or words
