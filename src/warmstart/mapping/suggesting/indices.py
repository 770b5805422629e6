"""Which item of one list is which of another: the same number, or all of them shifted alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.templates import Path, Template, index_positions

# Module to each segment right below it, to the rest of the path and the shape of every tensor there.
Children = dict[Path, dict[str, set[tuple[Path, Shape]]]]


@dataclass(slots=True)
class ListSets:
    """The indices that occur in the lists of one side.

    Attributes:
        together: Path of a list to the indices of all its tensors.
        children: What stands right below each module, of lists and of what is no list.
        apart: Path of a list to the path of each tensor in it to that tensor's indices.
    """

    together: dict[Path, set[int]] = field(default_factory=lambda: defaultdict(set))
    apart: dict[Path, dict[Path, set[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    children: Children = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))

    @classmethod
    def of(cls, templates: Iterable[Template]) -> ListSets:
        sets = cls()
        for template in templates:
            for depth, segment in enumerate(template.path):
                sets.children[template.path[:depth]][segment].add((template.path[depth + 1 :], template.shape))
            for turn, position in enumerate(index_positions(template.path)):
                found = {indices[turn] for indices in template.names}
                sets.together[template.path[: position + 1]] |= found
                sets.apart[template.path[: position + 1]][template.path] |= found
        return sets


def spread(lost: Iterable[str], shorter: Children, short: Path, longer: Children, long: Path) -> bool:
    """Whether items that a list has lost may stand beside it under names: `0, 1, 2` as `proj_in`, `layers.0`, `proj_out`.

    Args:
        lost: The segments of the items that one side has more.
        shorter: What stands below each module of the other side.
        short: The list there.
        longer: The same of the side that has more.
        long: The list there.
    """
    tensors = {tensor for segment in lost for tensor in longer[long[:-1]].get(segment, ())}
    return any(
        segment not in longer[long[:-up]] and not tensors.isdisjoint(below)
        for up in (1, 2)
        if len(short) >= up and len(long) >= up
        for segment, below in shorter[short[:-up]].items()
    )


def shift(keys: ListSets, key: Path, key_at: int, entries: ListSets, entry: Path, entry_at: int) -> int | None:
    """What to add to an index of a checkpoint's tensor to get the model's; None where the indices do not tell.

    Lists of the same indices, and lists that both start at 0, keep their numbers; of a tensor that is alone in its list the
    indices of the list's other tensors say nothing. Others are shifted alike only where both are
    without gaps, equally long, and bounded alike in at least two tensors each: the ends of a single tensor's list may
    just be missing.

    Args:
        keys: The lists of the checkpoint.
        key: The path of the checkpoint's tensor.
        key_at: The position of the index in it.
        entries: The lists of the model.
        entry: The path of the model's tensor.
        entry_at: The position of the index in it.
    """
    key_list, entry_list = key[: key_at + 1], entry[: entry_at + 1]
    own = keys.apart[key_list][key], entries.apart[entry_list][entry]
    alone = min(len(keys.apart[key_list]), len(entries.apart[entry_list])) == 1
    if alone and own[0] != own[1] and not min(own[0]) == min(own[1]) == 0:
        return None
    a, b = keys.together[key_list], entries.together[entry_list]
    if (a - b and spread(key_list[-1:], entries.children, entry_list, keys.children, key_list)) or (
        b - a and spread(entry_list[-1:], keys.children, key_list, entries.children, entry_list)
    ):
        return None
    if a == b or (min(a) == min(b) == 0):
        return 0
    if len(a) == len(b) and all(max(s) - min(s) + 1 == len(s) for s in (a, b)):
        bounded = [
            sum(len(s) == len(a) for s in sets.values()) for sets in (keys.apart[key_list], entries.apart[entry_list])
        ]
        if min(bounded) >= 2:
            return min(b) - min(a)
    return None
