"""The tensors of layers under the names that torch gives them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from warmstart.mapping.suggesting.vocabulary import NORM_ROWS, NORM_TENSORS, TENSORS
from warmstart.mapping.suggesting.words import Lexicon

_NUMBER = re.compile(r"[0-9]+")

# The names torch's own layers give their tensors: a `bias` is never a `running_mean`.
LEAVES = frozenset(
    ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight", "in_proj_bias")
)


def torch_names(names: Iterable[str], others: Iterable[str], lexicon: Lexicon) -> dict[str, str]:
    """Each name to itself with torch's name for its tensor: `norm.gamma` to `norm.weight`.

    A spelling that the other side has as well has its own partner there. Only modules of which every tensor is known, in
    all items of a list, are layers of torch under other names: a module with a tensor of its own means its own by all of them.
    """
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        module, dot, leaf = name.rpartition(".")
        kinds[_NUMBER.sub("0", module) + dot][leaf].append(name)
    own = {name.rpartition(".")[2] for name in others}
    out: dict[str, str] = {}
    for module, leaves in kinds.items():
        told = _told(module, leaves, lexicon) if module and lexicon.vocabulary else {}
        for leaf, same in leaves.items():
            said = leaf if leaf in own else told.get(leaf, leaf)
            out.update((name, name[: len(name) - len(leaf)] + said) for name in same)
    return out


def _told(module: str, leaves: Collection[str], lexicon: Lexicon) -> Mapping[str, str]:
    """Torch's names for all tensors of a module; nothing where one is unknown, or two are the same."""
    norm = not NORM_TENSORS.keys().isdisjoint(leaves) and (
        any(row <= set(leaves) for row in NORM_ROWS) or "norm" in lexicon.segment(module.split(".")[-2])
    )
    known = {**TENSORS, **NORM_TENSORS} if norm else TENSORS
    told = {leaf: known.get(leaf, leaf) for leaf in leaves}
    return told if LEAVES.issuperset(told.values()) and len(set(told.values())) == len(told) else {}
