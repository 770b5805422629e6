"""Which models were loaded by which warm start: once for each model object that trains, whichever callback asks."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from warmstart.errors import TimingError
from warmstart.freezing import Frozen, freeze_entries
from warmstart.mapping.model.targets import Live, Targets
from warmstart.report import Report


@dataclass(frozen=True, slots=True)
class Past:
    """What is remembered of a model that was loaded; it keeps neither the model nor a source alive."""

    owners: weakref.WeakSet[nn.Module]
    count: int
    rule: Hashable  # of what was to be frozen
    frozen: tuple[str, ...]
    trained: frozenset[str]
    rows: dict[str, Tensor]
    lineage: dict[str, Any]
    begun: bool = False  # whether it has trained

    @classmethod
    def of(cls, report: Report, rule: Hashable) -> Past:
        plan, frozen = report.plan, report.frozen
        owners = weakref.WeakSet(plan.targets.entries[a.target].owner for a in plan.assignments)
        if frozen is None:
            return cls(owners, len(owners), rule, (), frozenset(), {}, report.lineage)
        rows = {name: held.mask for name, held in frozen.rows.items()}
        return cls(owners, len(owners), rule, frozen.declared, frozen.trained, rows, report.lineage)

    def inherited(self, heirs: Mapping[int, nn.Module]) -> Past:
        """The same, with other modules in the place of some."""
        owners = weakref.WeakSet(heirs.get(id(owner), owner) for owner in self.owners)
        return dataclasses.replace(self, owners=owners)

    def thaw(self, model: nn.Module) -> None:
        """Undo its freeze, so that another can take its place; that of rows takes the place of another by itself."""
        targets = Targets.of(model)
        if names := [name for name in self.frozen if name in targets.entries]:
            freeze_entries(model, names, targets, trained=self.trained).release("*")

    def frozen_as(self, frozen: Frozen | None, rule: Hashable) -> Past:
        """The same, with another freeze."""
        names, trained = (frozen.declared, frozen.trained) if frozen is not None else ((), frozenset[str]())
        return dataclasses.replace(self, rule=rule, frozen=names, trained=trained)


# A host may copy its callbacks or make new ones for every fit.
_LOADED: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Past]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, identity: Hashable, past: Past) -> None:
    _LOADED.setdefault(model, {})[identity] = past


def inherit(model: nn.Module, identity: Hashable, heirs: Mapping[int, nn.Module]) -> None:
    """A host has put other modules in the place of some that were loaded."""
    if (past := _LOADED.get(model, {}).get(identity)) is not None:
        remember(model, identity, past.inherited(heirs))


def begin(model: nn.Module, identity: Hashable) -> None:
    """A model that was loaded trains from now on: what loads it a second time goes on from there."""
    if (past := _LOADED.get(model, {}).get(identity)) is not None:
        remember(model, identity, dataclasses.replace(past, begun=True))


def known(model: nn.Module, identity: Hashable) -> Past | None:
    """What is remembered of `model`, unless it has built the loaded modules anew since.

    Raises:
        TimingError: It has built a part of them anew: neither loading again nor leaving it would be right.
    """
    past = _LOADED.get(model, {}).get(identity)
    if past is None:
        return None
    live = Live(model)
    left = sum(live.has(owner) for owner in list(past.owners))
    if left == past.count:
        return past
    if left == 0:
        del _LOADED[model][identity]
        return None
    raise TimingError(
        f"{past.count - left} of the {past.count} modules that were loaded have been replaced since, and the others kept; "
        "build the model anew as a whole, or load the new modules yourself: warmstart.load(model, ..., include=[...])"
    )
