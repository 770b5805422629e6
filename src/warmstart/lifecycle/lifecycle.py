"""One warm start over the life of a run."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from warmstart import api
from warmstart.checkpoints.places import is_gone
from warmstart.drift import Drift
from warmstart.errors import CheckpointError, TimingError
from warmstart.freezing import Frozen, entries_matching, freeze_entries
from warmstart.lifecycle.auditing import audit, refuse_beside_copies, refuse_late_freeze
from warmstart.lifecycle.converted import heirs
from warmstart.lifecycle.holding import Holding
from warmstart.lifecycle.overlap import refuse_overlap
from warmstart.lifecycle.past import Past, begin, inherit, known, remember
from warmstart.lifecycle.resuming import Resuming
from warmstart.lifecycle.settings import Settings
from warmstart.loading.agreement import all_here, raised_on_all, raised_unless_alike
from warmstart.loading.verifying import raise_differences, structure
from warmstart.mapping.model.names import strip
from warmstart.mapping.model.targets import Targets
from warmstart.mapping.plan.lock import frozen_names
from warmstart.mapping.plan.plan import Plan
from warmstart.mapping.pretrained import Pretrained
from warmstart.report import Report


class Lifecycle:
    """One warm start over the life of a run.

    Attributes:
        told: Its sources, and what is to be done with them.
        report: What was loaded into the present model; None before, and where this run did not load it.
        restored: The state of the run that was resumed, as `state()` gave it; None otherwise.
        late_freeze: What to do about an optimizer that holds what is to be frozen, in the host's words.
        steps_on_copies: Whether the model will train in an engine that takes its steps on copies of its own (DeepSpeed).
    """

    late_freeze = "leave these out of it, or let the optimizer be made after the load"
    steps_on_copies = False

    def __init__(self, told: Settings) -> None:
        self.told = told
        self.restored: dict[str, Any] | None = None
        self._early: frozenset[str] = frozenset()
        self._reset()

    def _reset(self) -> None:
        self.report: Report | None = None
        self._freeze = Holding(self.told.schedule, self.told.held, self.told.on_freeze_change)
        self._model: weakref.ref[nn.Module] | None = None
        self._past: Past | None = None
        self._gone: CheckpointError | None = None
        self._resuming = Resuming()
        self._trained = False
        self._drift: Drift | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The configuration alone: what a run made of it belongs to its process and its model."""
        return {"told": self.told, "restored": self.restored}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._early = frozenset()
        self._reset()

    def same_as(self, other: Lifecycle) -> bool:
        """Whether both load the same sources by the same rules, and freeze the same."""
        return self.told.identity == other.told.identity and self.told.freeze == other.told.freeze

    def _known(self, model: nn.Module) -> Past | None:
        """What this model was loaded with, by this warm start or by another that writes the same."""
        return known(model, self.told.identity)

    def _goes_on(self, model: nn.Module, past: Past) -> bool:
        """Whether a model that was loaded is to be left as it is: it has trained since, or `start` will compare its values."""
        own = self.report is not None and self.report.plan.model is model and self.report.status != "failed"
        return own or past.begun

    def _begin(self, model: nn.Module) -> None:
        self._trained = True
        begin(model, self.told.identity)

    @property
    def frozen(self) -> Frozen | None:
        """What is frozen in the present model."""
        return self._freeze.frozen

    def plan(self, model: nn.Module) -> Plan[Report]:
        """What goes where in this model; a host that knows more of its models than their names adds to the rules here."""
        return self.plan_of(model, self.told.parts)

    def plan_of(self, model: nn.Module, parts: Sequence[Pretrained]) -> Plan[Report]:
        """The plan of these sources, opened as `read` says: then every rank calls it."""
        return api.plan_together(model, parts, lock=self.told.lock, read=self.told.read)

    def loaded(self, model: nn.Module) -> bool:
        """Whether this model is the one that was applied to last."""
        return self._model is not None and self._model() is model

    def announce(self, model: nn.Module, beside: Sequence[Lifecycle] = ()) -> None:
        """Plan, and freeze, a model whose memory is made later than its optimizer; `apply` follows then.

        Raises:
            WarmStartError: As `apply`.
            CheckpointError: The source is gone, and what to freeze is not known without it.
        """
        with raised_on_all("set up"):
            past = self._known(model)
            if past is not None and self._goes_on(model, past):
                self._take_up(model, past, beside, ())
            else:
                self._announce(model, beside, past)

    def _announce(self, model: nn.Module, beside: Sequence[Lifecycle], past: Past | None) -> None:
        self._reset()
        plan = self._plan_if_there(model)
        if plan is None:
            targets, names = Targets.of(model), set(self._frozen_names(model))
            if not names and not self.knows_what_to_freeze:
                raise CheckpointError(
                    f"{self._gone}\nThe optimizer of a sharded model is made before a resumed checkpoint is read, so what "
                    'to freeze must be known without the source: freeze=["encoder"], or lock='
                )
        else:
            plan.raise_errors()
            for other in beside:
                other._rehearse(model)
            targets, names = plan.targets, set(plan.freeze) - self.told.schedule.later(plan)
        if past is not None:
            past.thaw(model)
        frozen = [t for name in names if (t := targets.entries[name]).kind == "parameter" and t.tensor.requires_grad]
        for target in frozen:
            target.tensor.requires_grad_(False)
        self._early = frozenset(target.name for target in frozen)

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
        self._resuming.unwatch()
        with raised_on_all("set up"):
            all_here("set up")  # a host's own way to plan may have collectives in it
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
        if past is not None and self._goes_on(model, past):
            self._take_up(model, past, beside, optimizers)
            if self.report is not None:
                refuse_overlap(self.report.plan, [other.report for other in beside])
            return
        self._reset()
        plan = self._plan_if_there(model)
        if self.steps_on_copies:
            refuse_beside_copies(plan, releases=bool(self.told.schedule.stages))
        if plan is None:
            if names := self._frozen_names(model):
                self._freeze.take(freeze_entries(model, names, Targets.of(model), self.told.held))
            if self.frozen is None:
                self._freeze.take_as_before(model, manifest)
        else:
            plan.raise_errors()
            for other in beside:
                other._rehearse(model)
            refuse_overlap(plan, [other.report for other in beside])
            refuse_late_freeze(plan, set(plan.freeze) - self.told.schedule.later(plan), optimizers, self.late_freeze)
            if past is not None:  # of a try that never came to train
                past.thaw(model)
            self.report = api.apply(
                plan, verify=self.told.verify, held=self.told.held, read=self.told.read, shared=True
            )
            self._freeze.take(self.report.frozen)
        if self.frozen is not None:
            self.frozen.trained |= self._early
        if self.report is not None:
            remember(model, self.told.identity, Past.of(self.report, self.told.freeze))
        self._model = weakref.ref(model)

    def _plan_if_there(self, model: nn.Module) -> Plan[Report] | None:
        """The plan; None where a source is gone, on all ranks."""
        plan: Plan[Report] | None = None
        try:
            plan = self.plan(model)
        except CheckpointError as error:
            if not any(is_gone(part.source) for part in self.told.parts):
                raise
            self._gone = error
        raised_unless_alike(self._gone, "set up: its source", hint=api.OTHER_MODE[self.told.read])
        return plan

    def watch(self, model: nn.Module, manifest: Mapping[str, Any] | None = None) -> None:
        """Notice, until training starts, what a load of the whole model's state dict matches; `apply` does this too."""
        self._resuming.watch(model, self._freeze.change_since(manifest), self._to_load(model))

    def _to_load(self, model: nn.Module) -> frozenset[str]:
        """The parameters that this warm start loads, as far as it is known."""
        if self.told.verify == "off":
            return frozenset()
        if self.report is not None:
            entries = self.report.plan.targets.entries
            return frozenset(a.target for a in self.report.plan.assignments if entries[a.target].kind == "parameter")
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)] if self._gone is not None else []
        return frozenset(name for name in names if any(strip(name, part.into) is not None for part in self.told.parts))

    def _take_up(
        self, model: nn.Module, past: Past, beside: Sequence[Lifecycle], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Go on with a model that was loaded before."""
        if self.report is not None and self.report.plan.model is model and past.rule == self.told.freeze:
            if self._trained:
                self.report.status = "already-applied"
                self._freeze.stage()
            return
        self._reset()
        if past.rule == self.told.freeze:
            self._freeze.take_up(model, past.frozen, past.trained, past.rows)
        else:
            self._freeze_anew(model, past, beside, optimizers)
        self._model, self._past, self._trained = weakref.ref(model), past, True

    def _freeze_anew(
        self, model: nn.Module, past: Past, beside: Sequence[Lifecycle], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Go on with a model that has trained under another freeze, and freeze what this one is told to."""
        names: tuple[str, ...] = ()
        if (plan := self._plan_if_there(model)) is not None:
            plan.raise_errors()
            refuse_overlap(plan, [other.report for other in beside])
            names = plan.freeze
            refuse_late_freeze(plan, set(names) - self.told.schedule.later(plan), optimizers, self.late_freeze)
        elif self.told.freezes:
            assert self._gone is not None
            raise self._gone
        self._gone = None
        past.thaw(model)
        self._freeze.take_up(model, names, None, past.rows)
        remember(model, self.told.identity, past.frozen_as(self.frozen, self.told.freeze))

    def _rehearse(self, model: nn.Module) -> None:
        past = self._known(model)
        if (past is None or not self._goes_on(model, past)) and (plan := self._plan_if_there(model)) is not None:
            plan.raise_errors()

    def _frozen_names(self, model: nn.Module) -> list[str]:
        """What to freeze, as far as it is known without the source."""
        if self.told.lock is not None:
            targets = Targets.of(model)
            return [name for name in frozen_names(self.told.lock) if name in targets.entries]
        patterns = self.told.frozen_patterns
        return entries_matching(model, patterns) if patterns else []

    @property
    def waiting(self) -> CheckpointError | None:
        """The error of a source that is gone, while only a resume can make up for it."""
        return self._gone

    @property
    def unsettled(self) -> CheckpointError | None:
        """The same, as long as no restore was seen."""
        return None if self._resuming.seen or self._trained else self._gone

    @property
    def knows_what_to_freeze(self) -> bool:
        """Whether the frozen names are known although the source is gone."""
        return self.frozen is not None or self.told.lock is not None or not self.told.freezes_what_loads

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
        self._resuming.was_told()
        if self._gone is not None and (self.frozen is None or state.get("rows")):
            self._freeze.take_as_before(model, state)
        self._freeze.resume(state)

    def release_restored(self) -> tuple[str, ...]:
        """Release, before `start`, what the resumed run's schedule had released: for an optimizer whose state is read by it.

        Returns:
            The entries that train from now on.
        """
        return self._freeze.release_restored(self._freeze.staged)

    def restored_whole(self, model: nn.Module) -> None:
        """A host has restored every entry, part by part, where no load of the whole model's state dict was to be seen."""
        self._resuming.saw_all_of(model)

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
        at_first_batch: bool = False,
        buffers: bool = True,
    ) -> bool:
        """The last look before training: values first, then whether a restore explains a difference.

        Args:
            model: The model as it will train.
            resumed: Whether the host restored a checkpoint into it since `apply`.
            optimizers: The optimizers that will train it, if they hold the model's own parameters.
            progress: How many units (`unfreeze_unit`) the run has behind it.
            bears_unused: Whether the wrapper that averages gradients bears parameters that get none for now.
            at_first_batch: Whether the first batch comes next, so that `check_first_batch` would see nothing new.
            buffers: Whether no forward has moved the buffers yet, so that they are compared as well.

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
            self._start(model, resumed, optimizers, buffers)
        with raised_on_all("freeze"):  # on its own: it gathers shards, for which each rank is needed
            self._freeze.start(resumed=resumed, progress=progress, bears_unused=bears_unused)
        first = not self._trained
        if first and at_first_batch:
            self._begin(model)
        return first

    def _start(
        self,
        model: nn.Module,
        resumed: bool,
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        buffers: bool = True,
    ) -> None:
        self._resuming.unwatch()
        failed = self.report is not None and self.report.status == "failed"
        if not self.loaded(model) or failed:
            raise TimingError(
                "training starts and the pretrained weights were never loaded into this model; see to it that the "
                "callback is in place when the model is set up, or call warmstart.load(model, ...) yourself"
            )
        if resumed:
            self._resuming.refuse_passed_over(model)
        if self._gone is not None:
            if not resumed:
                raise self._gone
            scopes = [part.into for part in self.told.parts]
            self._resuming.refuse_instead_of(self._gone, model, scopes, self.knows_what_to_freeze)
            self._resuming.take(model, keep=not self.steps_on_copies)
        elif self.report is not None:
            if resumed or not self._trained:
                self._compare(self.report, model, resumed, buffers)
            else:
                raise_differences(structure(self.report.plan, model), "when training starts again")
            notes = audit(self.report.plan, model, optimizers, self._freeze.later)
            self.report.notes += [note for note in notes if note not in self.report.notes]
            self.report.plan.targets.follow(model)

    def look(self, model: nn.Module, *, resumed: bool) -> None:
        """Compare the values for a stage that does not train.

        Raises:
            WarmStartError: As `start`.
        """
        with raised_on_all("look before a stage"):
            self._start(model, resumed)

    def follow_converted(self, model: nn.Module) -> None:
        """Go on with modules that the host has put in the place of others, around the same parameters."""
        entries = self.report.plan.targets.entries if self.report is not None and self.loaded(model) else {}
        frozen = self.frozen.targets if self.frozen is not None and self.frozen.model is model else ()
        if found := heirs(model, [*entries.values(), *frozen]):
            inherit(model, self.told.identity, found)
            for name, target in entries.items():
                if id(target.owner) in found:
                    entries[name] = dataclasses.replace(target, owner=found[id(target.owner)])
            if self.frozen is not None:
                self.frozen.inherit(found)

    def enforce(self) -> None:
        """Freeze what the schedule releases later; the optimizer and the wrapper are there by now."""
        if self.frozen is not None:
            self.frozen.enforce()

    def measure_drift(self, model: nn.Module) -> None:
        """Remember, after `start`, what the loaded layers start from."""
        if self.report is not None and self._drift is None:
            self._drift = Drift.of(self.report, model)

    def drift(self, model: nn.Module) -> dict[str, float]:
        """Path of each module that was loaded and trains, to its relative distance from its pretrained values."""
        return self._drift.measure(model) if self._drift is not None else {}

    def advance(self, progress: int) -> tuple[str, ...]:
        """Release what the schedule releases after `progress` units of training.

        Returns:
            The entries that train from now on.
        """
        return self._freeze.advance(progress)

    def _compare(self, report: Report, model: nn.Module, resumed: bool, buffers: bool) -> None:
        if self.told.verify == "off":
            report.status = "superseded-by-resume" if resumed else report.status
            return
        try:
            wrong = report.differences(model, self.told.verify, buffers=buffers)
        except CheckpointError:
            if not resumed:
                raise
            report.status = "superseded-by-resume"  # whatever the file was, the run has its own weights
            return
        if wrong and resumed:
            report.status = "failed"
            self._resuming.take(model, keep=not self.steps_on_copies)
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
                wrong = self.report.differences(model, self.told.verify, buffers=False)
                if wrong:
                    self.report.status = "failed"
                    raise_differences(wrong, "before the first training batch")
            else:
                self._resuming.refuse_other(model)
            self._freeze.check(sampled=True)
        self._begin(model)

    def guard(self, *, full: bool) -> None:
        """Compare the frozen tensors with their digests, sampled or, at the end of training, in full.

        Raises:
            FrozenChangedError: A frozen tensor moved.
        """
        with raised_on_all("check of what is frozen"):
            self._freeze.check(sampled=not full)
        if full:
            self._freeze.end()

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
        return {"format": 1, "status": status, "lineage": lineage, **self._freeze.state()}
