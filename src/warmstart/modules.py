"""The modules of a model."""

from __future__ import annotations

from torch import nn


def every_module(model: nn.Module) -> dict[nn.Module, str]:
    """Each module once, with its first path, in the order of `named_modules()`: which has a generator for each level."""
    found = {model: ""}
    _add_below(model, "", found)
    return found


def _add_below(module: nn.Module, prefix: str, found: dict[nn.Module, str]) -> None:
    for leaf, child in module._modules.items():
        if child is not None and child not in found:
            found[child] = path = prefix + leaf
            if child._modules:
                _add_below(child, f"{path}.", found)
