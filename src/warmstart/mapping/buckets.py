"""What planning decides, as data: assignments, and a bucket for every name that has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.derivations import Derivation, Shape
from warmstart.mapping.model.targets import Targets
from warmstart.mapping.pretrained import Pretrained


class Mismatch(NamedTuple):
    """An entry whose key has another shape."""

    keys: tuple[str, ...]
    checkpoint_shape: tuple[int, ...]
    model_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps a plan from being applied.

    Attributes:
        kind: `missing`, `unexpected`, `mismatched`, `collision`, `unused`, `ambiguous`, `nothing matched`, `into`,
            `coverage`, `dtype`, `overlap`, `incomplete` or `conversion` (a conversion that does not work out), `adapter`,
            `fill`, `load hook` or `lock`.
        message: What, where, and the line to type.
        names: The entries or keys concerned.
    """

    kind: str
    message: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message


class Assignment(NamedTuple):
    """One entry of the model and what it gets.

    Attributes:
        target: The entry, as the model spells it.
        sources: Checkpoint keys, as the file spells them; empty for a constant and for an alias of another entry.
        part: Index into `Plan.parts` of the source it comes from.
        shape: Shape of the entry.
        dtype: The dtype it gets.
        source_shape: Shape of what the checkpoint, or the conversion, gives.
        cast: (dtype in the checkpoint, dtype in the model) where they differ, else None.
        alias_of: The tied entry that is written in its place, else None.
        conversion: What makes its value from its keys, else None.
        output: Index of its value among the conversion's outputs.
        adapter: What brings the value into the entry's shape, else None.
        fill: The constant it gets, else None.
        reshapes: Whether the entry takes `shape` when it is written (a lazy one, an observer's).
    """

    target: str
    sources: tuple[str, ...]
    part: int
    shape: Shape
    dtype: torch.dtype
    source_shape: Shape
    cast: tuple[torch.dtype, torch.dtype] | None = None
    alias_of: str | None = None
    conversion: Derivation | None = None
    output: int = 0
    adapter: Adapter | None = None
    fill: float | None = None
    reshapes: bool = False

    @property
    def loaded(self) -> Tensor | None:
        """Which elements come from the checkpoint: booleans that broadcast to `shape`; None where all of them do."""
        return None if self.adapter is None else self.adapter.loaded(self.source_shape, self.shape)

    @property
    def keeps(self) -> bool:
        """Whether elements of the entry stay what they were before the load."""
        return self.adapter is not None and self.adapter.keeps(self.source_shape, self.shape)


@dataclass(frozen=True)
class Part:
    """One source of a plan: its rules, its opened checkpoint and the prefix pair inferred for it, or None."""

    pretrained: Pretrained
    checkpoint: Checkpoint
    prefix: tuple[str, str] | None
    scope: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Buckets:
    """Where planning put every entry and every key: each in exactly one place.

    Attributes:
        parts: One per source.
        assignments: What each loaded entry gets, in the model's order.
        missing: Entries in scope that no key fits, excused or not.
        unexpected: Keys that fit nothing, excused or not. With several parts: (part index, key).
        excluded: Entries outside every scope.
        ignored: Keys left out on purpose: not selected, or the name of something outside the scope.
        mismatched: Entries whose key has another shape, excused or not.
        freeze: Entries to freeze, decided here so that they are known without reading a tensor.
        coverage: Share (0..1) of the elements in scope that get loaded; tied entries count once.
        errors: Everything that keeps the plan from being applied.
        notes: What a reader should know although it is no error.
    """

    parts: tuple[Part, ...]
    assignments: tuple[Assignment, ...]
    missing: tuple[str, ...]
    unexpected: tuple[Any, ...]
    excluded: tuple[str, ...]
    ignored: tuple[Any, ...]
    mismatched: Mapping[str, Mismatch]
    freeze: tuple[str, ...]
    coverage: float
    errors: tuple[Problem, ...]
    notes: tuple[str, ...]
    model: nn.Module = field(repr=False)
    targets: Targets = field(repr=False)

    @property
    def model_name(self) -> str:
        return type(self.model).__name__
