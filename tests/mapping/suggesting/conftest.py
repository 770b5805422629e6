"""Models and checkpoints of names and shapes alone, and what `suggest` says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from torch import nn

from warmstart import Checkpoint, Pretrained, TensorInfo
from warmstart.mapping.suggesting.suggesting import suggest_rules
from warmstart.mapping.suggesting.suggestion import Suggestion

Shapes = Mapping[str, tuple[int, ...]]
Suggest = Callable[..., Suggestion]


class Header(Checkpoint):
    """Names, shapes and dtypes without tensors: whoever reads one fails."""

    def __init__(self, shapes: Shapes) -> None:
        infos = {name: TensorInfo(tuple(shape), torch.float32) for name, shape in shapes.items()}
        super().__init__(location="header", format="none", infos=infos)

    def _read(self, key, index):
        raise AssertionError(f"{key} was read")


def net(shapes: Shapes) -> nn.Module:
    """A module tree on the meta device with one parameter per name."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for segment in path:
            if segment not in module._modules:
                module.add_module(segment, nn.Module())
            module = module._modules[segment]
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def layers(template: str, parts: Mapping[str, tuple[int, ...]], numbers: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """The parts of each layer: `layers("h.{}", {"a.weight": (2,)}, range(2))`."""
    return {f"{template.format(i)}.{part}": shape for i in numbers for part, shape in parts.items()}


@pytest.fixture
def suggest() -> Suggest:
    def run(keys: Shapes, entries: Shapes, *, fields: Mapping[str, object] | None = None, **options) -> Suggestion:
        checkpoint = Header(keys)
        return suggest_rules(net(entries), Pretrained(checkpoint, **(fields or {})), checkpoint, **options)

    return run
