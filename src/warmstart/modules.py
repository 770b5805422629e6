"""The modules of a model."""

from __future__ import annotations

from torch import nn


def every_module(model: nn.Module) -> dict[nn.Module, str]:
    """Each module once, with its first path, in the order of `named_modules()`: which has a generator for each level."""
    found: dict[nn.Module, str] = {}
    left = [(model, "")]
    while left:
        module, path = left.pop()
        if module not in found:
            found[module] = path
            prefix = f"{path}." if path else ""
            children = [(child, prefix + leaf) for leaf, child in module._modules.items() if child is not None]
            left += reversed(children)
    return found
