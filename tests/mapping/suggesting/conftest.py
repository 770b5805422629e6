"""Models and checkpoints of names and shapes alone, and what `suggest` says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import named
import pytest
import torch
from named import Header, Shapes
from torch import nn

from warmstart import Pretrained
from warmstart.mapping.suggesting.suggesting import suggest_rules
from warmstart.mapping.suggesting.suggestion import Suggestion

Suggest = Callable[..., Suggestion]


def net(shapes: Shapes) -> nn.Module:
    """A module tree on the meta device with one parameter per name."""
    with torch.device("meta"):
        return named.net(shapes)


def layers(template: str, parts: Mapping[str, tuple[int, ...]], numbers: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """The parts of each layer: `layers("h.{}", {"a.weight": (2,)}, range(2))`."""
    return {f"{template.format(i)}.{part}": shape for i in numbers for part, shape in parts.items()}


@pytest.fixture
def suggest() -> Suggest:
    def run(keys: Shapes, entries: Shapes, *, fields: Mapping[str, object] | None = None, **options) -> Suggestion:
        checkpoint = Header(keys)
        return suggest_rules(net(entries), Pretrained(checkpoint, **(fields or {})), checkpoint, **options)

    return run
