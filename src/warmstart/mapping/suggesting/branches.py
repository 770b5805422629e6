"""The map by which a branch of a block goes back into the width of the model: shapes prove it, whatever it is called."""

from __future__ import annotations

from warmstart.mapping.suggesting.items import Item
from warmstart.mapping.suggesting.side import Side, item_around
from warmstart.mapping.suggesting.vocabulary import BRANCHES, FILLERS, WAYS_BACK


def way_back(item: Item, side: Side) -> str | None:
    """Which branch an item is the way back of, attention or MLP; None if its name or its shape does not say so.

    A map of shape (out, in) is one if norms around the branch have its `out` and none has its `in`, and no other tensor of
    the branch has its shape. So xFormers' `w3`, of (w1, w2, w3) as (gate, up, down), is one, and llama's `w3` is not.
    """
    block, branch = item_around(item.path[:-1]), item.path[:-1]
    matrices = [shape for _, shape in item.tensors if len(shape) > 1]
    if not block or len(matrices) != 1 or _name(item, side) not in WAYS_BACK:
        return None
    (shape,) = matrices
    beside = [other for tensors in side.children[branch].values() for _, other in tensors]
    norms = (norm for norm in side.beside(block, "norm", item) if norm.path[: len(branch)] != branch)
    widths = {norm.shape[0] for norm in norms if len(norm.shape) == 1}
    if shape[-2] not in widths or shape[-1] in widths or beside.count(shape) > 1:
        return None
    said = {
        BRANCHES[word]
        for segment in item.path[len(block) :]
        for word in side.lexicon.content(segment)
        if word in BRANCHES
    }
    return said.pop() if len(said) == 1 else None


def _name(item: Item, side: Side) -> frozenset[str]:
    """The words of a map's own name: `w2_weight` is the weight of `w2`."""
    words = frozenset(side.lexicon.content(item.path[-1])) - FILLERS.keys()
    return words - {"weight"} or words
