"""The modules of a model."""

from __future__ import annotations

from torch import nn


def every_module(model: nn.Module) -> dict[nn.Module, str]:
    """Each module once, with its first path, in the order of `named_modules()`: which has a generator for each level."""
    found = {model: ""}
    levels = [(iter(model._modules.items()), "")]  # no recursion: a chain may be deeper than Python's stack
    while levels:
        children, prefix = levels[-1]
        for leaf, child in children:
            if child is not None and child not in found:
                found[child] = path = prefix + leaf
                if child._modules:
                    levels.append((iter(child._modules.items()), f"{path}."))
                    break
        else:
            levels.pop()
    return found
