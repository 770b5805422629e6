"""The plan: what goes where, decided before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal

from torch import Tensor
from typing_extensions import TypeVar

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.mapping.adapters.rows import MapRows
from warmstart.mapping.buckets import Assignment, Buckets
from warmstart.mapping.declared import plain
from warmstart.mapping.plan.lock import to_yaml
from warmstart.mapping.plan.reversing import ReversedCheckpoint
from warmstart.mapping.plan.table import lines
from warmstart.tensors import dtype_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Verify = Literal["full", "sample", "off"]
Read = Literal["local", "broadcast"]
R = TypeVar("R", default=Any)


def together(assignments: Iterable[Assignment]) -> Iterator[Assignment]:
    """Assignments in their order, but what one conversion makes side by side: it runs once then."""
    groups: dict[int, list[Assignment]] = {}
    for number, assignment in enumerate(assignments):
        made = assignment.conversion
        groups.setdefault(-1 - number if made is None else id(made), []).append(assignment)
    for group in groups.values():
        yield from group


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Buckets, Generic[R]):
    """What goes where, from names, shapes and dtypes alone; every entry and every key is in exactly one bucket.

    Attributes:
        applier: What `apply` calls. This floor only decides; the floors above it write, and say what a report is (`R`).
        renderer: What `to_html` calls, for the same reason.
    """

    applier: Callable[..., R]
    renderer: Callable[[str | os.PathLike[str], Plan[R]], Path]

    @property
    def mapping(self) -> dict[str, tuple[str, ...]]:
        """Entry to the checkpoint keys it gets its value from, `()` for a constant; a tied entry shows its twin's keys."""
        sources = {a.target: a.sources for a in self.assignments}
        return {a.target: sources[a.alias_of] if a.alias_of is not None else a.sources for a in self.assignments}

    @cached_property
    def written(self) -> tuple[Assignment, ...]:
        """The assignments that are written, each tied tensor once, and what one conversion makes together."""
        first: dict[str, Assignment] = {}
        for assignment in together(self.assignments):
            if assignment.alias_of is None:
                first.setdefault(self.targets.entries[assignment.target].canonical, assignment)
        return tuple(first.values())

    @property
    def held_rows(self) -> dict[str, Tensor | None]:
        """Entries of which only the rows that do not come from the checkpoint train; its rows as booleans, None: all."""
        adapted = (a for a in self.assignments if a.adapter is not None)
        return {a.target: a.loaded for a in adapted if isinstance(a.adapter, MapRows) and a.adapter.freeze_old}

    @property
    def prefix(self) -> tuple[str, str] | None:
        """The (strip, add) pair that was inferred; of a plan with one part."""
        return self.parts[0].prefix if len(self.parts) == 1 else None

    def apply(self, *, verify: Verify = "full", read: Read = "local", group: ProcessGroup | None = None) -> R:
        """Write the plan into the model it was made for, verify it, and freeze what is to be frozen.

        In a run of several processes every rank of `group` calls this. They compare their plans first, and what one of
        them finds is raised on all. `plan()` meets nobody, so a rank on which it raises has to say so by ending;
        `load()`, which does both, takes such an error to the others too.

        Args:
            verify: `"full"` compares every element with the source after writing, `"sample"` a fixed sample of each
                tensor, `"off"` nothing.
            read: `"local"`: every rank reads what it holds of the model. `"broadcast"`: one rank of each node reads, and
                passes every tensor on to the others of its node.
            group: The process group whose ranks must agree; None: all ranks. Give each pipeline stage its own, since
                their models differ.

        Raises:
            MappingError: The plan has errors, a value cannot be cast safely, or ranks have other plans or models. The
                model is untouched.
            CheckpointError: The source changed since it was planned, cannot be read, or is not the same on all ranks.
            VerificationError: The model does not hold what was written.
            TimingError: A rank did not come within `WARMSTART_TIMEOUT` seconds (600, or half of the group's own timeout).
        """
        return self.applier(self, verify=verify, read=read, group=group)

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

    def reverse(self, part: int | None = None) -> Checkpoint:
        """The model as it is now in the checkpoint's own layout: the keys that were used, read lazily.

        Right after `apply` it is the checkpoint, bit for bit; after training it is what the same codebase would have saved.
        Of a model that is spread over ranks, reading a key gathers it: every rank reads the same keys in the same order.

        Args:
            part: Which source's layout, as an index into `parts`; a plan with one source needs none.

        Raises:
            MappingError: A step has no inverse (a lossy adapter, narrowing, dropped rows); the message names each. Or the
                plan has errors.
        """
        self.raise_errors()
        if part is None and len(self.parts) > 1:
            sources = ", ".join(f"{i}: {p.pretrained.label}" for i, p in enumerate(self.parts))
            raise MappingError(f"the plan has {len(self.parts)} sources; say whose layout, reverse(0): {sources}")
        if part is not None and not 0 <= part < len(self.parts):
            raise MappingError(f"reverse({part}): the plan has the parts 0 to {len(self.parts) - 1}")
        return ReversedCheckpoint(self, part or 0)

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
                    "cast": [dtype_name(d) for d in a.cast] if a.cast else None,
                    "alias_of": a.alias_of,
                    "dtype": dtype_name(a.dtype),
                    "conversion": a.conversion.label if a.conversion else None,
                    "adapter": plain(a.adapter) if a.adapter else None,
                    "fill": a.fill,
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

    def to_yaml(self) -> str:
        """The decisions as a lock file: `load(..., lock=path)` refuses a run whose plan came out different."""
        return to_yaml(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan, errors and their fixes included, as one page that needs no network.

        Raises:
            ModuleNotFoundError: jinja2 is not installed.
        """
        return self.renderer(path, self)

    def digest(self) -> str:
        """A SHA-256 of the decisions: equal for equal mappings, whatever the paths and the order of keys."""
        rows = [
            (
                *(a.target, a.sources, a.part, a.shape, str(a.cast), a.alias_of, str(a.dtype), a.fill),
                a.conversion.label if a.conversion else None,
                plain(a.adapter) if a.adapter else None,
            )
            for a in sorted(self.assignments, key=lambda a: a.target)
        ]
        decided = [rows, self.missing, self.excluded, sorted(self.mismatched.items()), self.freeze]
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
