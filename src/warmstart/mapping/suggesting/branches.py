"""The map by which a branch of a block goes back into the width of the model: shapes prove it, whatever it is called."""

from __future__ import annotations

from warmstart.mapping.suggesting.items import Item
from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.templates import Path, index_positions
from warmstart.mapping.suggesting.vocabulary import BRANCHES, FILLERS, WAYS_BACK


def way_back(item: Item, side: Side) -> str | None:
    """Which branch an item is the way back of, attention or MLP; None if its name or its shape does not say so.

    A map of shape (out, in) is one if norms around the branch have its `out` and none has its `in`, and no other tensor of
    the branch has its shape. So xFormers' `w3`, of (w1, w2, w3) as (gate, up, down), is one, and llama's `w3` is not.
    """
    lists = index_positions(item.path[:-1])
    matrices = [shape for _, shape in item.tensors if len(shape) > 1]
    if not lists or len(matrices) != 1 or _name(item, side) not in WAYS_BACK:
        return None
    branch = _branch(item.path[lists[-1] + 1 :], side)
    (shape,) = matrices
    beside = [child for tensors in side.children[item.path[:-1]].values() for _, child in tensors]
    widths = _widths(item, lists, side)
    return branch if shape[-2] in widths and shape[-1] not in widths and beside.count(shape) == 1 else None


def _name(item: Item, side: Side) -> frozenset[str]:
    """The words of a map's own name: `w2_weight` is the weight of `w2`."""
    words = frozenset(side.lexicon.content(item.path[-1])) - FILLERS.keys()
    return words - {"weight"} or words


def _branch(path: Path, side: Side) -> str | None:
    said = {BRANCHES[word] for segment in path for word in side.lexicon.content(segment) if word in BRANCHES}
    return said.pop() if len(said) == 1 else None


def _widths(item: Item, lists: list[int], side: Side) -> set[int]:
    """How long the norms are that stand around a branch, in the same items of lists."""
    block, branch = item.path[: lists[-1] + 1], item.path[:-1]
    there = {indices[: len(lists)] for t in item.tensors.values() for indices in t.names}
    return {
        template.shape[0]
        for template in side.saying.get("norm", ())
        if len(template.shape) == 1
        and template.path[: len(block)] == block
        and template.path[: len(branch)] != branch
        and any(indices[: len(lists)] in there for indices in template.names)
    }
