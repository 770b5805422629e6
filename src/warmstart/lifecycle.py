"""What every host does in the same order: apply once, check when training starts, guard the frozen, carry lineage.

Hosts say *when*; nothing here knows a host.
"""

from __future__ import annotations

import glob
import os
import warnings
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from warmstart import api
from warmstart.checkpoints.places import is_gone
from warmstart.errors import CheckpointError, FrozenChangedError, MappingError, TimingError
from warmstart.freezing import Frozen, Held, freeze_entries, freeze_patterns
from warmstart.loading.agreement import raised_on_all, raised_unless_alike
from warmstart.loading.verifying import raise_differences, structure
from warmstart.mapping.grouping import listed
from warmstart.mapping.hints import did_you_mean
from warmstart.mapping.lock import frozen_names
from warmstart.mapping.names import strip
from warmstart.mapping.plan import Plan, Verify
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.targets import Live, Target, Targets
from warmstart.patterns import Patterns, PatternSet, as_patterns
from warmstart.report import Report

OnFreezeChange = Literal["error", "allow"]
UnfreezeUnit = Literal["epoch", "step"]


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


class _RestoreWatch:
    """A model's load-state-dict hook: which of its entries a restore had values for, over all of its files.

    It knows neither the model nor the lifecycle, so that a copy of the model carries nothing along.
    """

    def __init__(self, warning: str | None) -> None:
        self.warning = warning
        self.matched: set[str] = set()
        self.seen = False

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        self.seen = True
        self.matched |= module.state_dict(keep_vars=True).keys() - set(incompatible.missing_keys)
        if self.warning is not None:
            warning, self.warning = self.warning, None
            warnings.warn(warning, UserWarning, stacklevel=2)

    def lacking(self, model: nn.Module) -> list[str]:
        """The model's entries that got no value, neither by name nor through a tie."""
        entries = model.state_dict(keep_vars=True)
        filled = {id(value) for name, value in entries.items() if name in self.matched}
        return [name for name, value in entries.items() if isinstance(value, Tensor) and id(value) not in filled]


class Lifecycle:
    """One warm start over the life of a run.

    Attributes:
        parts: The sources.
        unfreeze: What to release when, as unit number to patterns.
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
        unfreeze: Mapping[int, Patterns] | None = None,
        unfreeze_unit: UnfreezeUnit = "epoch",
        lock: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value, known in (
            ("verify", verify, ("full", "sample", "off")),
            ("held", held, ("eval", "train")),
            ("on_freeze_change", on_freeze_change, ("error", "allow")),
            ("unfreeze_unit", unfreeze_unit, ("epoch", "step")),
        ):
            if value not in known:
                raise MappingError(f"{name}={value!r}: one of {', '.join(map(repr, known))}")
        self.parts = list(parts)
        self.verify: Verify = verify
        self.held: Held = held
        self.on_freeze_change = on_freeze_change
        self.unfreeze = _schedule(unfreeze or {})
        self.unfreeze_unit: UnfreezeUnit = unfreeze_unit
        self.lock = lock
        self.restored: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self.report: Report | None = None
        self.frozen: Frozen | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._past: _Past | None = None
        self._gone: CheckpointError | None = None
        self._watch = _RestoreWatch(None)
        self._hook: RemovableHandle | None = None
        self._trained = False
        self._staged: tuple[str, ...] = ()
        self._released: tuple[str, ...] = ()
        self._progress = -1

    def __getstate__(self) -> dict[str, Any]:
        """The configuration alone: what a run made of it belongs to its process and its model."""
        kept = ("parts", "verify", "held", "on_freeze_change", "unfreeze", "unfreeze_unit", "lock", "restored")
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

    def plan(self, model: nn.Module) -> Plan[Report]:
        """What goes where in this model; a host that knows more of its models than their names adds to the rules here."""
        return api.plan(model, self.parts, lock=self.lock)

    def loaded(self, model: nn.Module) -> bool:
        """Whether this model is the one that was applied to last."""
        return self._model is not None and self._model() is model

    def apply(
        self,
        model: nn.Module,
        beside: Sequence[Lifecycle] = (),
        *,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        """Load and freeze, once for each model object.

        A file that is not there is tolerated for now if what to freeze is known without it: a resume may still come.

        Args:
            model: The bare model, before its optimizer and its wrapper.
            beside: Other warm starts of the same run, whose entries this one must not write. Those that have not been
                applied yet are planned first, so that an error in one of them leaves the model untouched.
            optimizers: Those that exist already.
            manifest: What `state()` gave for this run's newest checkpoint, which may be the one that will be resumed.

        Raises:
            WarmStartError: As `warmstart.load`.
            TimingError: An optimizer holds a parameter already that is to be frozen.
        """
        self._unwatch()
        with raised_on_all("set up"):
            self._apply(model, beside, optimizers, manifest or {})
        self.watch(model, manifest)

    def _apply(
        self,
        model: nn.Module,
        beside: Sequence[Lifecycle],
        optimizers: Sequence[torch.optim.Optimizer],
        manifest: Mapping[str, Any],
    ) -> None:
        past = self._known(model)
        if past is not None:
            self._take_up(model, past)
            if self.report is not None:
                _refuse_overlap(self.report.plan, beside)
            return
        self._reset()
        plan: Plan[Report] | None = None
        try:
            plan = self.plan(model)
        except CheckpointError as error:
            if not any(is_gone(part.source) for part in self.parts):
                raise
            self._gone = error
        raised_unless_alike(self._gone, "set up: its source")
        if plan is None:
            self._freeze_without_source(model)
            if self.frozen is None:
                self._freeze_as_before(model, manifest)
        else:
            plan.raise_errors()
            for other in beside:
                other._rehearse(model)
            _refuse_overlap(plan, beside)
            _refuse_late_freeze(plan, set(plan.freeze) - self._later(plan), optimizers)
            self.report = api.apply(plan, verify=self.verify, held=self.held)
            self.frozen = self.report.frozen
            _LOADED.setdefault(model, {})[self._identity()] = _Past.of(self.report)
        self._model = weakref.ref(model)
        self._stage()

    def _later(self, plan: Plan[Report]) -> set[str]:
        """The frozen entries that the schedule will release.

        Raises:
            MappingError: A pattern of it matches nothing that this load freezes.
        """
        scheduled = PatternSet([p for patterns in self.unfreeze.values() for p in patterns], where="unfreeze")
        frozen = [*plan.freeze, *plan.held_rows]
        later = {name for name in frozen if scheduled.matches(name, plan.targets.entries[name].clean)}
        if unused := scheduled.without_hit():
            raise MappingError(
                f"unfreeze={unused[0].text!r} matches nothing that freeze= freezes{did_you_mean(unused[0].text, frozen)}; "
                "freeze it first: freeze=True, or freeze= with a pattern of it"
            )
        return later

    def _stage(self) -> None:
        """What the schedule will release goes into the optimizer and the wrapper first, and is frozen at the start."""
        patterns = [p for patterns in self.unfreeze.values() for p in patterns]
        if self.frozen is not None and patterns:
            deferred = self.frozen.defer([f"?{p.removeprefix('?')}" for p in patterns])
            self._staged = tuple(sorted({*self._staged, *deferred}))

    def watch(self, model: nn.Module, manifest: Mapping[str, Any] | None = None) -> None:
        """Notice, until training starts, what a load of the whole model's state dict matches; `apply` does this too."""
        self._unwatch()
        before, now = (manifest or {}).get("frozen"), self.frozen.declared if self.frozen is not None else ()
        warning = None
        if before is not None and set(before) != set(now) and self.on_freeze_change == "error":
            warning = (
                f"the newest checkpoint of this run had {len(before)} frozen tensors, this run has {len(now)}; if that is "
                f"what is resumed, its optimizer state does not fit\n{listed(_changes(before, now))}\n"
                "  -> give freeze= as it was"
            )
        self._watch = _RestoreWatch(warning)
        self._hook = model.register_load_state_dict_post_hook(self._watch)  # type: ignore[no-untyped-call]

    def _unwatch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _take_up(self, model: nn.Module, past: _Past) -> None:
        """Go on with a model that was loaded before."""
        if self.report is not None and self.report.plan.model is model:
            if self._trained:
                self.report.status = "already-applied"
                self._stage()
            return
        self._reset()
        self._model, self._past, self._trained = weakref.ref(model), past, True
        if past.frozen or past.rows:
            targets = Targets.of(model)
            self.frozen = freeze_entries(model, past.frozen, targets, self.held, trained=past.trained, rows=past.rows)
            self._stage()

    def _rehearse(self, model: nn.Module) -> None:
        if self._known(model) is None and not any(is_gone(part.source) for part in self.parts):
            self.plan(model).raise_errors()

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

    def _freeze_as_before(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Freeze what a run's state names, if the model has it all."""
        targets = Targets.of(model)
        before, spans = state.get("frozen", ()), state.get("rows", {})
        rows = {n: _mask(targets.entries[n], spans[n]) for n in spans if n in targets.entries}
        if (before or rows) and all(name in targets.entries for name in before):
            trained = self.frozen.trained if self.frozen is not None else None
            self.frozen = freeze_entries(model, before, targets, self.held, trained=trained, rows=rows)

    @property
    def waiting(self) -> CheckpointError | None:
        """The error of a source that is gone, while only a resume can make up for it."""
        return self._gone

    @property
    def knows_what_to_freeze(self) -> bool:
        """Whether the frozen names are known although the source is gone."""
        return self.frozen is not None or self.lock is not None or not any(part.freeze is True for part in self.parts)

    def resume(self, model: nn.Module, state: dict[str, Any] | None) -> None:
        """Take over the state of the run that is being resumed: freeze what it froze, or say how that differs.

        Args:
            model: The model that was applied to.
            state: As `state()` gave it; None if the run left none.

        Raises:
            FrozenChangedError: The resumed run had frozen other entries, and `on_freeze_change` is `"error"`.
        """
        if not self.loaded(model):
            return
        with raised_on_all("resume"):
            if state is not None:
                self._resume(model, state)

    def _resume(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.restored = dict(state)
        self._watch.warning = None
        before = tuple(state.get("frozen", ()))
        rows_before: dict[str, list[list[int]]] = dict(state.get("rows", {}))
        if self._gone is not None and (self.frozen is None or rows_before):
            self._freeze_as_before(model, state)
            self._stage()
        now = self.frozen.declared if self.frozen is not None else ()
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
        staged_before = tuple(state.get("staged", ()))
        if set(staged_before) != set(self._staged) and self.on_freeze_change == "error":
            changed = sorted(set(staged_before) ^ set(self._staged))
            raise FrozenChangedError(
                f"the run that is resumed was to release {len(staged_before)} frozen tensors, this one {len(self._staged)}; "
                f"its optimizer holds its own\n{listed((name, '') for name in changed)}\n"
                '  -> give unfreeze= the patterns it had, or on_freeze_change="allow" if the change is meant',
                tensors=tuple(changed),
            )
        self._released = tuple(state.get("released", ()))

    def rearm(self) -> None:
        """A trial run of the host's own (a learning rate finder) is over and has put the weights back: check once more."""
        if self.report is not None and self.report.status == "applied":
            self._trained = False

    def start(
        self,
        model: nn.Module,
        *,
        resumed: bool,
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        progress: int = 0,
        bears_unused: bool = True,
    ) -> bool:
        """The last look before training: values first, then whether a restore explains a difference.

        Args:
            model: The model as it will train.
            resumed: Whether the host restored a checkpoint into it since `apply`.
            optimizers: The optimizers that will train it, if they hold the model's own parameters.
            progress: How many units (`unfreeze_unit`) the run has behind it.
            bears_unused: Whether the wrapper that averages gradients bears parameters that get none for now.

        Returns:
            Whether the model has not trained since it was loaded, so that there is something new to tell.

        Raises:
            TimingError: The model was never loaded, its optimizer does not train it, or its wrapper would hang on what is
                released later.
            CheckpointError: The source is gone and no resume made up for it, or the resumed checkpoint matched nothing.
            VerificationError: The model does not hold what was loaded, and no restore explains it.
            FrozenChangedError: A frozen tensor is trainable again or has moved.
        """
        with raised_on_all("start of training"):
            self._start(model, resumed, optimizers)
            self._start_frozen(resumed, progress, bears_unused)
        return not self._trained

    def _start(self, model: nn.Module, resumed: bool, optimizers: Sequence[torch.optim.Optimizer] | None) -> None:
        self._unwatch()
        failed = self.report is not None and self.report.status == "failed"
        if not self.loaded(model) or failed:
            raise TimingError(
                "training starts and the pretrained weights were never loaded into this model; see to it that the "
                "callback is in place when the model is set up, or call warmstart.load(model, ...) yourself"
            )
        if resumed and self._watch.seen and not self._watch.matched:
            raise CheckpointError(
                f"the checkpoint that is resumed matches none of the {len(model.state_dict())} entries of "
                f"{type(model).__name__}: its weights were passed over and training would go on without them\n"
                "  -> resume from a checkpoint of this model"
            )
        if self._gone is not None:
            self._settle_gone(model, resumed)
        elif self.report is not None:
            if resumed or not self._trained:
                self._compare(self.report, model, resumed)
            else:
                raise_differences(structure(self.report.plan, model), "when training starts again")
            _audit(self.report.plan, model, optimizers)

    def _start_frozen(self, resumed: bool, progress: int, bears_unused: bool) -> None:
        if self.frozen is None:
            return
        self.frozen.enforce()
        # Not before: the optimizer was made without them, and its state was restored so.
        if names := [glob.escape(name) for name in self._released if name in self.frozen.names]:
            self.frozen.release(names)
        self.advance(progress)
        later = [name for name in self._staged if name in self.frozen.trained.intersection(self.frozen.names)]
        if later and not bears_unused:
            raise TimingError(
                f"{len(later)} parameters get no gradient until they are released, which DistributedDataParallel must be told "
                f"of\n{listed((name, '') for name in later)}\n  -> set find_unused_parameters=True"
            )
        # A host may have cast the model since; a restore has put other values there.
        self.frozen.rebase(all_values=resumed)
        self.frozen.check(sampled=True)

    def advance(self, progress: int) -> tuple[str, ...]:
        """Release what the schedule releases after `progress` units of training.

        Returns:
            The entries that train from now on.
        """
        due = [p for at, patterns in self.unfreeze.items() if self._progress < at <= progress for p in patterns]
        self._progress = progress
        if self.frozen is None or not due:
            return ()
        return self.frozen.release([f"?{pattern.removeprefix('?')}" for pattern in due])

    def _settle_gone(self, model: nn.Module, resumed: bool) -> None:
        assert self._gone is not None
        if not resumed or not self._watch.seen:
            raise self._gone
        scopes = [part.into for part in self.parts]
        if lacking := [n for n in self._watch.lacking(model) if any(strip(n, into) is not None for into in scopes)]:
            raise CheckpointError(
                f"{self._gone}\nThe checkpoint that is resumed cannot stand in for it: it lacks {len(lacking)} of "
                f"the model's entries\n{listed((name, '') for name in lacking)}"
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
        with raised_on_all("first training batch"):
            if self.report is not None and self.report.status == "applied":
                wrong = self.report.differences(model, self.verify, buffers=False)
                if wrong:
                    self.report.status = "failed"
                    raise_differences(wrong, "before the first training batch")
            if self.frozen is not None:
                self.frozen.check(sampled=True)
        self._trained = True

    def guard(self, *, full: bool) -> None:
        """Compare the frozen tensors with their digests, sampled or in full.

        Raises:
            FrozenChangedError: A frozen tensor moved.
        """
        with raised_on_all("check of what is frozen"):
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
        declared = self.frozen.declared if self.frozen is not None else ()
        frozen = set(self.frozen.names) if self.frozen is not None else set()
        released = [name for name in declared if name not in frozen]
        return {
            "format": 1,
            "status": status,
            "lineage": lineage,
            "frozen": list(declared),
            "staged": list(self._staged),
            "released": released,
            "rows": _spans(self.frozen),
        }


def _schedule(unfreeze: Mapping[int, Patterns]) -> dict[int, list[str]]:
    """The schedule in order, as plain types; YAML and JSON may spell the numbers as strings.

    Raises:
        MappingError: A number that is none, or less than 1.
    """
    out: dict[int, list[str]] = {}
    for at, patterns in unfreeze.items():
        if not str(at).isdecimal() or int(at) < 1:
            raise MappingError(
                f'unfreeze={{{at!r}: ...}}: when to release is a whole number from 1 on: {{1: "encoder"}}'
            )
        out[int(at)] = [pattern.text for pattern in as_patterns(patterns, where="unfreeze")]
    return dict(sorted(out.items()))


def _spans(frozen: Frozen | None) -> dict[str, list[list[int]]]:
    """The held rows of each entry as [dimension] and [first, past the last] pairs: plain JSON types, few for many rows."""
    out: dict[str, list[list[int]]] = {}
    for name, held in frozen.rows.items() if frozen is not None else ():
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


def _refuse_late_freeze(plan: Plan[Report], names: set[str], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    tensors = {name: plan.targets.entries[name].tensor for name in sorted(names)}
    late = [name for name, tensor in tensors.items() if id(tensor) in held and tensor.requires_grad]
    if late:
        raise TimingError(
            f"{len(late)} parameters that are to be frozen are in an optimizer already\n"
            f"{listed((name, '') for name in late)}\n"
            "  -> leave these out of it, or let the optimizer be made after the load"
        )


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
