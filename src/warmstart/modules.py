"""The modules of a model, each once."""

from __future__ import annotations

from torch import nn


def every_module(model: nn.Module) -> list[nn.Module]:
    """All modules, in no particular order: `modules()` recurses through a generator for each level, this one does not."""
    found: dict[nn.Module, None] = {}
    left = [model]
    while left:
        if (module := left.pop()) not in found:
            found[module] = None
            left += [child for child in module._modules.values() if child is not None]
    return list(found)
