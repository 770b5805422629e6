"""Which item of one list is which of another: the same number, or all of them shifted alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from warmstart.mapping.suggesting.templates import Path, Template, index_positions


@dataclass(slots=True)
class ListSets:
    """The indices that occur in each list of one side: of all its tensors together, and of each template."""

    together: dict[Path, set[int]] = field(default_factory=lambda: defaultdict(set))
    apart: dict[Path, list[frozenset[int]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, templates: Iterable[Template]) -> ListSets:
        sets = cls()
        for template in templates:
            for turn, position in enumerate(index_positions(template.path)):
                found = frozenset(indices[turn] for indices in template.names)
                sets.together[template.path[: position + 1]] |= found
                sets.apart[template.path[: position + 1]].append(found)
        return sets


def shift(keys: ListSets, key_list: Path, entries: ListSets, entry_list: Path) -> int | None:
    """What to add to an index of the checkpoint's list to get the model's; None where the indices do not tell.

    Lists of the same indices, and lists that both start at 0, keep their numbers. Others are shifted alike only where both
    are without gaps, equally long, and bounded alike in at least two tensors each: the ends of a single tensor's list may
    just be missing.
    """
    a, b = keys.together[key_list], entries.together[entry_list]
    if a == b or (min(a) == min(b) == 0):
        return 0
    if len(a) == len(b) and all(max(s) - min(s) + 1 == len(s) for s in (a, b)):
        bounded = [sum(len(s) == len(a) for s in sets) for sets in (keys.apart[key_list], entries.apart[entry_list])]
        if min(bounded) >= 2:
            return min(b) - min(a)
    return None
