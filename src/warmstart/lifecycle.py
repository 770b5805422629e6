"""What every host does in the same order: apply once, check when training starts, guard the frozen, carry lineage.

Hosts say *when*; nothing here knows a host.
"""

from __future__ import annotations

import glob
import os
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from warmstart import api
from warmstart.checkpoints.places import is_gone
from warmstart.errors import CheckpointError, FrozenChangedError, MappingError, TimingError
from warmstart.freezing import Frozen, Held, freeze_entries, freeze_patterns
from warmstart.loading.verifying import raise_differences, structure
from warmstart.mapping.grouping import listed
from warmstart.mapping.lock import frozen_names
from warmstart.mapping.names import strip
from warmstart.mapping.plan import Plan, Verify
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.targets import Live, Target, Targets
from warmstart.report import Report

OnFreezeChange = Literal["error", "allow"]


@dataclass(frozen=True, slots=True)
class _Past:
    """What is remembered of a model that was loaded; it keeps neither the model nor a source alive."""

    owners: weakref.WeakSet[nn.Module]
    count: int
    frozen: tuple[str, ...]
    trained: frozenset[str]
    rows: dict[str, Tensor]
    lineage: dict[str, Any]

    @classmethod
    def of(cls, report: Report) -> _Past:
        plan, frozen = report.plan, report.frozen
        owners = weakref.WeakSet(plan.targets.entries[a.target].owner for a in plan.assignments)
        if frozen is None:
            return cls(owners, len(owners), (), frozenset(), {}, report.lineage)
        rows = {name: held.mask for name, held in frozen.rows.items()}
        return cls(owners, len(owners), frozen.declared, frozen.trained, rows, report.lineage)


# Once for each model object, whichever callback asks: a host may copy its callbacks or make new ones for every fit.
_LOADED: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Past]] = weakref.WeakKeyDictionary()


class Lifecycle:
    """One warm start over the life of a run.

    Attributes:
        parts: The sources.
        report: What was loaded into the present model; None before, and where this run did not load it.
        restored: The state of the run that was resumed, as `state()` gave it; None otherwise.
        frozen: What is frozen in the present model, or None.
    """

    def __init__(
        self,
        parts: Sequence[Pretrained],
        *,
        verify: Verify = "full",
        held: Held = "eval",
        on_freeze_change: OnFreezeChange = "error",
        lock: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value, known in (
            ("verify", verify, ("full", "sample", "off")),
            ("held", held, ("eval", "train")),
            ("on_freeze_change", on_freeze_change, ("error", "allow")),
        ):
            if value not in known:
                raise MappingError(f"{name}={value!r}: one of {', '.join(map(repr, known))}")
        self.parts = list(parts)
        self.verify: Verify = verify
        self.held: Held = held
        self.on_freeze_change = on_freeze_change
        self.lock = lock
        self.restored: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self.report: Report | None = None
        self.frozen: Frozen | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._past: _Past | None = None
        self._gone: CheckpointError | None = None
        self._lacking: tuple[str, ...] | None = None
        self._hook: RemovableHandle | None = None
        self._trained = False
        self._released: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """The configuration alone: what a run made of it belongs to its process and its model."""
        kept = ("parts", "verify", "held", "on_freeze_change", "lock", "restored")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _identity(self) -> Hashable:
        """What makes two warm starts the same one: their sources and rules."""
        sources = [os.fspath(p.source) if isinstance(p.source, str | os.PathLike) else id(p.source) for p in self.parts]
        return tuple((source, repr(sorted(p.rules().items()))) for source, p in zip(sources, self.parts, strict=True))

    def _known(self, model: nn.Module) -> _Past | None:
        """What is remembered of `model`, unless it has built the loaded modules anew since.

        Raises:
            TimingError: It has built a part of them anew: neither loading again nor leaving it would be right.
        """
        past = _LOADED.get(model, {}).get(self._identity())
        if past is None:
            return None
        live = Live(model)
        left = sum(live.has(owner) for owner in list(past.owners))
        if left == past.count:
            return past
        if left == 0:
            del _LOADED[model][self._identity()]
            return None
        raise TimingError(
            f"{past.count - left} of the {past.count} modules that were loaded have been replaced since, and the others kept; "
            "build the model anew as a whole, or load the new modules yourself: warmstart.load(model, ..., include=[...])"
        )

    def apply(self, model: nn.Module, beside: Sequence[Lifecycle] = ()) -> None:
        """Load and freeze, once for each model object.

        A file that is not there is tolerated for now if what to freeze is known without it: a resume may still come.

        Args:
            model: The bare model, before its optimizer and its wrapper.
            beside: Other warm starts of the same run, whose entries this one must not write. Those that have not been
                applied yet are planned first, so that an error in one of them leaves the model untouched.

        Raises:
            WarmStartError: As `warmstart.load`.
        """
        past = self._known(model)
        if past is not None:
            self._take_up(model, past)
            return
        self._reset()
        try:
            plan = api.plan(model, self.parts, lock=self.lock)
        except CheckpointError as error:
            if not any(is_gone(part.source) for part in self.parts):
                raise
            self._gone = error
            self._hook = model.register_load_state_dict_post_hook(self._note_restore)  # type: ignore[no-untyped-call]
            self._freeze_without_source(model)
        else:
            plan.raise_errors()
            for other in beside:
                other._rehearse(model)
            _refuse_overlap(plan, beside)
            self.report = api.apply(plan, verify=self.verify, held=self.held)
            self.frozen = self.report.frozen
            _LOADED.setdefault(model, {})[self._identity()] = _Past.of(self.report)
        self._model = weakref.ref(model)

    def _take_up(self, model: nn.Module, past: _Past) -> None:
        """Go on with a model that was loaded before."""
        if self.report is not None and self.report.plan.model is model:
            if self._trained:
                self.report.status = "already-applied"
            return
        self._reset()
        self._model, self._past, self._trained = weakref.ref(model), past, True
        if past.frozen or past.rows:
            targets = Targets.of(model)
            self.frozen = freeze_entries(model, past.frozen, targets, self.held, trained=past.trained, rows=past.rows)

    def _rehearse(self, model: nn.Module) -> None:
        if self._known(model) is None and not any(is_gone(part.source) for part in self.parts):
            api.plan(model, self.parts, lock=self.lock).raise_errors()

    def _freeze_without_source(self, model: nn.Module) -> None:
        patterns: list[str] = []
        for part in self.parts:
            if not isinstance(part.freeze, bool):
                patterns += [part.freeze] if isinstance(part.freeze, str) else list(part.freeze)
        if self.lock is not None:
            targets = Targets.of(model)
            if names := [name for name in frozen_names(self.lock) if name in targets.entries]:
                self.frozen = freeze_entries(model, names, targets, self.held)
        elif patterns:
            self.frozen = freeze_patterns(model, patterns, self.held)

    def _note_restore(self, module: nn.Module, incompatible: Any) -> None:
        lacking = incompatible.missing_keys
        self._lacking = tuple(n for n in lacking if any(strip(n, part.into) is not None for part in self.parts))

    @property
    def waiting(self) -> CheckpointError | None:
        """The error of a source that is gone, while only a resume can make up for it."""
        return self._gone

    @property
    def knows_what_to_freeze(self) -> bool:
        """Whether the frozen names are known although the source is gone."""
        return self.frozen is not None or self.lock is not None or not any(part.freeze is True for part in self.parts)

    def resume(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take over the state of the run that is being resumed: freeze what it froze, or say how that differs.

        Raises:
            FrozenChangedError: The resumed run had frozen other entries, and `on_freeze_change` is `"error"`.
        """
        if self._model is None or self._model() is not model:
            return
        self.restored = dict(state)
        before = tuple(state.get("frozen", ()))
        rows_before: dict[str, list[list[int]]] = dict(state.get("rows", {}))
        if self._gone is not None and (before or rows_before):
            targets = Targets.of(model)
            rows = {n: _mask(targets.entries[n], spans) for n, spans in rows_before.items() if n in targets.entries}
            if (self.frozen is None or rows) and all(name in targets.entries for name in before):
                trained = self.frozen.trained if self.frozen else None
                self.frozen = freeze_entries(model, before, targets, self.held, trained=trained, rows=rows)
        now = self.frozen.declared if self.frozen else ()
        rows_now = _spans(self.frozen)
        if rows_now != rows_before and self.on_freeze_change == "error":
            changed = sorted(n for n in {*rows_now, *rows_before} if rows_now.get(n) != rows_before.get(n))
            raise FrozenChangedError(
                f"the run that is resumed held other rows of {', '.join(changed)} than this one; give the same adapt= as "
                'then, or on_freeze_change="allow" if the change is meant',
                tensors=tuple(changed),
            )
        if set(now) != set(before) and self.on_freeze_change == "error":
            raise FrozenChangedError(
                f"the run that is resumed had {len(before)} frozen tensors, this one has {len(now)}; its optimizer state "
                f"belongs to its own set\n{listed(_changes(before, now))}\n"
                '  -> give freeze= as it was, or on_freeze_change="allow" if the change is meant',
                tensors=tuple(sorted(set(now) ^ set(before))),
            )
        self._released = tuple(state.get("released", ()))

    def rearm(self) -> None:
        """A trial run of the host's own (a learning rate finder) is over and has put the weights back: check once more."""
        if self.report is not None and self.report.status == "applied":
            self._trained = False

    def start(
        self, model: nn.Module, *, resumed: bool, optimizers: Sequence[torch.optim.Optimizer] | None = None
    ) -> bool:
        """The last look before training: values first, then whether a restore explains a difference.

        Args:
            model: The model as it will train.
            resumed: Whether the host restored a checkpoint into it since `apply`.
            optimizers: The optimizers that will train it, if they hold the model's own parameters.

        Returns:
            Whether the model has not trained since it was loaded, so that there is something new to tell.

        Raises:
            TimingError: The model was never loaded, or its optimizer does not train it.
            CheckpointError: The source is gone and no resume made up for it.
            VerificationError: The model does not hold what was loaded, and no restore explains it.
            FrozenChangedError: A frozen tensor is trainable again or has moved.
        """
        failed = self.report is not None and self.report.status == "failed"
        if self._model is None or self._model() is not model or failed:
            raise TimingError(
                "training starts and the pretrained weights were never loaded into this model; see to it that the "
                "callback is in place when the model is set up, or call warmstart.load(model, ...) yourself"
            )
        if self._gone is not None:
            self._settle_gone(resumed)
        elif self.report is not None:
            if resumed or not self._trained:
                self._compare(self.report, model, resumed)
            else:
                raise_differences(structure(self.report.plan, model), "when training starts again")
            _audit(self.report.plan, model, optimizers)
        if self.frozen is not None:
            # Not before: the optimizer was made without them, and its state was restored so.
            if names := [glob.escape(name) for name in self._released if name in self.frozen.names]:
                self.frozen.release(names)
            # A host may have cast the model since; a restore has put other values there.
            self.frozen.rebase(all_values=resumed)
            self.frozen.check(sampled=True)
        return not self._trained

    def _settle_gone(self, resumed: bool) -> None:
        assert self._gone is not None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not resumed or self._lacking is None:
            raise self._gone
        if self._lacking:
            raise CheckpointError(
                f"{self._gone}\nThe checkpoint that is resumed cannot stand in for it: it lacks {len(self._lacking)} of "
                f"the model's entries\n{listed((name, '') for name in self._lacking)}"
            )
        if not self.knows_what_to_freeze:
            raise CheckpointError(
                f"{self._gone}\nA resumed run can do without it only if it is known what to freeze: name it, "
                'freeze=["encoder"], or resume from a checkpoint that holds this callback\'s state'
            )

    def _compare(self, report: Report, model: nn.Module, resumed: bool) -> None:
        if self.verify == "off":
            report.status = "superseded-by-resume" if resumed else report.status
            return
        try:
            wrong = report.differences(model, self.verify)
        except CheckpointError:
            if not resumed:
                raise
            report.status = "superseded-by-resume"  # whatever the file was, the run has its own weights
            return
        if wrong and resumed:
            report.status = "superseded-by-resume"
        elif wrong:
            report.status = "failed"
            raise_differences(wrong, "when training starts")

    def check_first_batch(self, model: nn.Module) -> None:
        """Once more before the first training batch, so that no hook in between goes unseen: parameters and the frozen.

        Raises:
            VerificationError: A loaded parameter was written to since training started.
            FrozenChangedError: A frozen tensor moved.
        """
        if self.report is not None and self.report.status == "applied":
            wrong = self.report.differences(model, self.verify, buffers=False)
            if wrong:
                self.report.status = "failed"
                raise_differences(wrong, "before the first training batch")
        self.guard(full=False)
        self._trained = True

    def guard(self, *, full: bool) -> None:
        """Compare the frozen tensors with their digests, sampled or in full.

        Raises:
            FrozenChangedError: A frozen tensor moved.
        """
        if self.frozen is not None:
            self.frozen.check(sampled=not full)

    def state(self) -> dict[str, Any]:
        """What a descendant of this run should know, as plain JSON types."""
        lineage: dict[str, Any] | None = None
        status = "pending"
        if self.report is not None:
            lineage, status = self.report.lineage, self.report.status
        elif self._past is not None:
            lineage, status = self._past.lineage, "already-applied"
        elif self._gone is not None and self.restored is not None:
            status = "superseded-by-resume"
        if status == "superseded-by-resume" and self.restored is not None:
            lineage = self.restored.get("lineage", lineage)
        declared = self.frozen.declared if self.frozen else ()
        frozen = set(self.frozen.names) if self.frozen else set()
        released = [name for name in declared if name not in frozen]
        return {
            "format": 1,
            "status": status,
            "lineage": lineage,
            "frozen": list(declared),
            "released": released,
            "rows": _spans(self.frozen),
        }


def _spans(frozen: Frozen | None) -> dict[str, list[list[int]]]:
    """The held rows of each entry as [dimension] and [first, past the last] pairs: plain JSON types, few for many rows."""
    out: dict[str, list[list[int]]] = {}
    for name, held in frozen.rows.items() if frozen else ():
        spans: list[list[int]] = []
        for row in held.index.tolist():
            if spans and spans[-1][1] == row:
                spans[-1][1] = row + 1
            else:
                spans.append([row, row + 1])
        out[name] = [[held.dim], *spans]
    return out


def _mask(target: Target, spans: list[list[int]]) -> Tensor:
    (dim,), *rows = spans
    mask = torch.zeros(target.shape[dim], dtype=torch.bool)
    for first, last in rows:
        mask[first:last] = True
    return mask.reshape([-1 if d == dim else 1 for d in range(len(target.shape))])


def _audit(plan: Plan, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] | None) -> None:
    """By identity: no optimizer may hold a loaded parameter that the model replaced, or none of what the model trains."""
    if not optimizers:
        return
    live = {id(p) for p in model.parameters()}
    loaded = {
        id(t.tensor): a.target for a in plan.assignments if (t := plan.targets.entries[a.target]).kind == "parameter"
    }
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        orphans = sorted(loaded[i] for i in held if i in loaded and i not in live)
        if orphans:
            raise TimingError(
                f"the optimizer holds {len(orphans)} loaded parameters that the model has replaced since; they would train "
                f"and the model would not\n{listed((name, '') for name in orphans)}\n"
                "  -> replace parameters before configure_optimizers, or write to them in place"
            )
        if held and trainable and not held & trainable:
            raise TimingError(
                f"{type(optimizer).__name__} holds none of the model's {len(trainable)} trainable parameters; build it from "
                "the model that trains: torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)"
            )


def _refuse_overlap(plan: Plan, beside: Sequence[Lifecycle]) -> None:
    mine = {id(plan.targets.entries[a.target].tensor): a.target for a in plan.assignments}
    for other in beside:
        if other.report is None or other.report.plan.model is not plan.model:
            continue
        theirs = other.report.plan
        both = [
            mine[id(t.tensor)] for a in theirs.assignments if id((t := theirs.targets.entries[a.target]).tensor) in mine
        ]
        if both:
            raise MappingError(
                f"two warm starts write {len(both)} of the same entries: {theirs.parts[0].pretrained.label} and "
                f"{plan.parts[0].pretrained.label}\n{listed((name, '') for name in both)}\n"
                "  -> give each its own part of the model with into=, include= or exclude=",
                plan=plan,
            )


def _changes(before: Sequence[str], now: Sequence[str]) -> list[tuple[str, str]]:
    thawed = [(name, "was frozen, trains now") for name in before if name not in set(now)]
    return thawed + [(name, "trained, is frozen now") for name in now if name not in set(before)]
