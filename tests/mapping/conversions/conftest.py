"""Conversions run on a dictionary of tensors, there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.converting import Converting, convert
from warmstart.mapping.keys import Key
from warmstart.tensors import same_bits


def as_keys(tensors: Mapping[str, Tensor]) -> list[Key]:
    return [Key(f"file.{name}", name, name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


class Run:
    """What conversions made of tensors; `entries` are the shapes of the model's entries, where one is needed."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        conversions: Sequence[Conversion],
        entries: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.plan: Converting = convert(as_keys(tensors), conversions)
        assert self.plan.errors == []
        self.made: dict[str, Tensor] = {}
        self.undone: dict[str, Tensor] = {}
        for derived in dict.fromkeys(key.made for key in self.plan.keys if key.made is not None):
            derived.resolve([(entries or {}).get(name) for name in derived.targets])
            read = [tensors[source.removeprefix("file.")] for source in derived.sources]
            outputs = derived.run(lambda i, read=read: read[i])
            assert [tuple(t.shape) for t in outputs] == derived.shapes
            assert [t.dtype for t in outputs] == derived.dtypes
            self.made |= dict(zip(derived.targets, outputs, strict=True))
            if derived.no_inverse is None:
                for source, tensor in zip(derived.sources, derived.undo(outputs), strict=True):
                    name = source.removeprefix("file.")
                    assert same_bits(tensor, tensors[name]), name
                    self.undone[name] = tensor


@pytest.fixture(scope="session")
def run():
    """`Run(tensors, conversions, entries)`: checks that every source comes back bit for bit, too."""
    return lambda tensors, *conversions, entries=None: Run(tensors, conversions, entries)


@pytest.fixture(scope="session")
def convert_names():
    """Names and one shape in, the plan out."""

    def planned(names, *conversions, shape=(4, 2), dtype=torch.float32):
        return convert([Key(f"file.{n}", n, n, shape, dtype) for n in names], conversions)

    return planned
