"""What a run's checkpoint says of its freeze, and how it is compared with another run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warmstart.errors import FrozenChangedError
from warmstart.freezing import Frozen
from warmstart.mapping.grouping import listed
from warmstart.mapping.model.targets import Target

Spans = dict[str, list[list[int]]]


@dataclass(frozen=True, slots=True)
class Freeze:
    """The part of a manifest that has to be the same when a run is resumed.

    Attributes:
        frozen: The entries that were frozen at first, those released since included.
        staged: Those that the schedule was to release.
        rows: The held rows of each entry, as [dimension] and [first, past the last] pairs: few for many rows.
    """

    frozen: tuple[str, ...]
    staged: tuple[str, ...]
    rows: Spans

    @classmethod
    def of(cls, frozen: Frozen | None, staged: Sequence[str]) -> Freeze:
        return cls(frozen.declared if frozen is not None else (), tuple(staged), _spans(frozen))

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Freeze:
        return cls(tuple(state.get("frozen", ())), tuple(state.get("staged", ())), dict(state.get("rows", {})))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"frozen": list(self.frozen), "staged": list(self.staged), "rows": self.rows}

    def refuse_other(self, before: Freeze) -> None:
        """Refuse to go on from a run with another freeze.

        Raises:
            FrozenChangedError: `before` froze, held or was to release something else.
        """
        if self.rows != before.rows:
            rows = sorted(n for n in {*self.rows, *before.rows} if self.rows.get(n) != before.rows.get(n))
            raise FrozenChangedError(
                f"the run that is resumed held other rows of {', '.join(rows)} than this one; give the same adapt= as "
                'then, or on_freeze_change="allow" if the change is meant',
                tensors=tuple(rows),
            )
        if set(self.frozen) != set(before.frozen):
            raise FrozenChangedError(
                f"the run that is resumed had {len(before.frozen)} frozen tensors, this one has {len(self.frozen)}; its "
                f"optimizer state belongs to its own set\n{listed(changes(before.frozen, self.frozen))}\n"
                '  -> give freeze= as it was, or on_freeze_change="allow" if the change is meant',
                tensors=tuple(sorted(set(self.frozen) ^ set(before.frozen))),
            )
        if set(self.staged) != set(before.staged):
            names = sorted(set(self.staged) ^ set(before.staged))
            raise FrozenChangedError(
                f"the run that is resumed was to release {len(before.staged)} frozen tensors, this one {len(self.staged)}; "
                f"its optimizer holds its own\n{listed((name, '') for name in names)}\n"
                '  -> give unfreeze= the patterns it had, or on_freeze_change="allow" if the change is meant',
                tensors=tuple(names),
            )


def changes(before: Sequence[str], now: Sequence[str]) -> list[tuple[str, str]]:
    thawed = [(name, "was frozen, trains now") for name in before if name not in set(now)]
    return thawed + [(name, "trained, is frozen now") for name in now if name not in set(before)]


def mask(target: Target, spans: list[list[int]]) -> Tensor:
    """The held rows of an entry as booleans that broadcast to it."""
    (dim,), *rows = spans
    held = torch.zeros(target.shape[dim], dtype=torch.bool)
    for first, last in rows:
        held[first:last] = True
    return held.reshape([-1 if d == dim else 1 for d in range(len(target.shape))])


def _spans(frozen: Frozen | None) -> Spans:
    out: Spans = {}
    for name, held in frozen.rows.items() if frozen is not None else ():
        spans: list[list[int]] = []
        for row in held.mask.reshape(-1).nonzero().reshape(-1).tolist():  # of all ranks together
            if spans and spans[-1][1] == row:
                spans[-1][1] = row + 1
            else:
                spans.append([row, row + 1])
        out[name] = [[held.dim], *spans]
    return out
