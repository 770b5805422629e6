"""The plan: what goes where, decided before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.table import lines
from warmstart.mapping.targets import Targets

if TYPE_CHECKING:
    from warmstart.report import Report

Verify = Literal["full", "sample", "off"]


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
            `coverage`, `dtype`, `overlap` or `wrappers`.
        message: What, where, and the line to type.
        names: The entries or keys concerned.
    """

    kind: str
    message: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Assignment:
    """One entry of the model and what it gets.

    Attributes:
        target: The entry, as the model spells it.
        sources: Checkpoint keys, as the file spells them; empty for an alias that another entry gives its value.
        part: Index into `Plan.parts` of the source it comes from.
        shape: Shape of the entry.
        cast: (dtype in the checkpoint, dtype in the model) where they differ, else None.
        alias_of: The tied entry that is written in its place, else None.
    """

    target: str
    sources: tuple[str, ...]
    part: int
    shape: tuple[int, ...]
    cast: tuple[torch.dtype, torch.dtype] | None = None
    alias_of: str | None = None


@dataclass(frozen=True)
class Part:
    """One source of a plan: its rules, its opened checkpoint and the prefix pair inferred for it, or None."""

    pretrained: Pretrained
    checkpoint: Checkpoint
    prefix: tuple[str, str] | None
    scope: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes where, from names, shapes and dtypes alone; every entry and every key is in exactly one bucket.

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
    applier: Callable[..., Report] = field(repr=False)

    @property
    def model_name(self) -> str:
        return type(self.model).__name__

    @property
    def mapping(self) -> dict[str, tuple[str, ...]]:
        """Entry to the checkpoint keys it gets its value from; a tied entry shows the keys of the one it is tied to."""
        sources = {a.target: a.sources for a in self.assignments}
        return {a.target: a.sources or sources[a.alias_of or ""] for a in self.assignments}

    @property
    def prefix(self) -> tuple[str, str] | None:
        """The (strip, add) pair that was inferred; of a plan with one part."""
        return self.parts[0].prefix if len(self.parts) == 1 else None

    def apply(self, *, verify: Verify = "full") -> Report:
        """Write the plan into the model it was made for, verify it, and freeze what is to be frozen.

        Args:
            verify: `"full"` compares every element with the source after writing, `"sample"` a fixed sample of each
                tensor, `"off"` nothing.

        Raises:
            MappingError: The plan has errors, or a value cannot be cast safely. The model is untouched.
            CheckpointError: The source changed since it was planned, or cannot be read.
            VerificationError: The model does not hold what was written.
        """
        return self.applier(self, verify=verify)

    def raise_errors(self) -> None:
        """Raise every error of the plan at once.

        Raises:
            MappingError: The plan has errors.
        """
        if self.errors:
            raise MappingError(self.explain(), plan=self)

    def explain(self) -> str:
        """All errors in words, each with its fix; empty if there is none."""
        if not self.errors:
            return ""
        count = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
        sources = ", ".join(part.pretrained.label for part in self.parts)
        head = f"{sources} does not fit {self.model_name}: {count}, nothing was written"
        shown: list[str] = []
        kinds = Counter(problem.kind for problem in self.errors)
        seen: Counter[str] = Counter()
        for problem in self.errors:
            seen[problem.kind] += 1
            limit = 4 if problem.kind == "collision" else 12
            if seen[problem.kind] <= limit:
                shown.append(f"{problem.kind}: {problem.message}")
            elif seen[problem.kind] == limit + 1:
                shown.append(f"{problem.kind}: ... and {kinds[problem.kind] - limit} more; plan.errors has them all")
        return "\n\n".join([head, *shown])

    def __str__(self) -> str:
        """A line on what would be loaded, the grouped table and the notes; with errors, those."""
        if self.errors:
            return self.explain()
        sources = ", ".join(part.pretrained.label for part in self.parts)
        head = f"plan: {len(self.assignments)} tensors, {self.coverage:.2%} of elements <- {sources}"
        return "\n".join([head, *(f"  {line}" for line in lines(self)), *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {
            "model": self.model_name,
            "parts": [
                {
                    "source": part.checkpoint.location,
                    "format": part.checkpoint.format,
                    "checkpoint_key": part.checkpoint.checkpoint_key,
                    "rules": part.pretrained.rules(),
                    "prefix": list(part.prefix) if part.prefix else None,
                }
                for part in self.parts
            ],
            "assignments": [
                {
                    "target": a.target,
                    "sources": list(a.sources),
                    "part": a.part,
                    "shape": list(a.shape),
                    "cast": [str(d).removeprefix("torch.") for d in a.cast] if a.cast else None,
                    "alias_of": a.alias_of,
                }
                for a in self.assignments
            ],
            "missing": list(self.missing),
            "unexpected": [list(u) if isinstance(u, tuple) else u for u in self.unexpected],
            "excluded": list(self.excluded),
            "ignored": [list(i) if isinstance(i, tuple) else i for i in self.ignored],
            "mismatched": {
                name: {"keys": list(m.keys), "checkpoint": list(m.checkpoint_shape), "model": list(m.model_shape)}
                for name, m in self.mismatched.items()
            },
            "freeze": list(self.freeze),
            "coverage": self.coverage,
            "errors": [{"kind": e.kind, "message": e.message} for e in self.errors],
            "notes": list(self.notes),
        }

    def digest(self) -> str:
        """A SHA-256 of the decisions: equal for equal mappings, whatever the paths and the order of keys."""
        plain = self.to_dict()
        decided = {k: plain[k] for k in ("assignments", "missing", "excluded", "mismatched", "freeze")}
        decided["assignments"] = sorted(decided["assignments"], key=lambda a: str(a["target"]))
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
