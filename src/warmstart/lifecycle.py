"""What every host does in the same order: apply once, check when training starts, guard the frozen, carry lineage.

Hosts say *when*; nothing here knows a host.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from warmstart import api
from warmstart.checkpoints.places import is_gone
from warmstart.errors import CheckpointError, FrozenChangedError, MappingError, TimingError
from warmstart.freezing import Frozen, Held, freeze_entries, freeze_patterns
from warmstart.loading.verifying import raise_differences
from warmstart.mapping.grouping import listed
from warmstart.mapping.plan import Plan, Verify
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.targets import Targets
from warmstart.report import Report

OnFreezeChange = Literal["error", "allow"]


class Lifecycle:
    """One warm start over the life of a run.

    Attributes:
        parts: The sources.
        report: What was loaded into the present model; None before, and where a resume made the source superfluous.
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
        self.restored: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self.report: Report | None = None
        self.frozen: Frozen | None = None
        self._gone: CheckpointError | None = None
        self._lacking: tuple[str, ...] | None = None
        self._hook: RemovableHandle | None = None
        self._failed = False
        self._started = False
        self._done: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """The configuration alone: what a run made of it belongs to its process and its model."""
        runtime = ("report", "frozen", "_gone", "_lacking", "_hook", "_failed", "_started", "_done")
        return {name: value for name, value in self.__dict__.items() if name not in runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def applied_to(self, model: nn.Module) -> bool:
        return model in self._done

    def apply(self, model: nn.Module, beside: Sequence[Lifecycle] = ()) -> None:
        """Load and freeze, once for each model object.

        A file that is not there is tolerated for now if what to freeze is known without it: a resume may still come.

        Args:
            model: The bare model, before its optimizer and its wrapper.
            beside: Other warm starts of the same run, whose entries this one must not write.

        Raises:
            WarmStartError: As `warmstart.load`.
        """
        if self.applied_to(model):
            if self.report is not None and self.report.plan.model is model:
                self.report.status = "already-applied"
            else:  # another model was loaded in between; this one keeps what it has learnt
                self.report = self.frozen = None
            return
        done = self._done
        self._reset()
        self._done = done
        try:
            plan = api.plan(model, self.parts)
        except CheckpointError as error:
            if not any(is_gone(part.source) for part in self.parts):
                raise
            self._gone = error
            self._hook = model.register_load_state_dict_post_hook(self._note_restore)  # type: ignore[no-untyped-call]
            self._freeze_without_source(model)
        else:
            _refuse_overlap(plan, beside)
            self._failed = True  # until it is through: a host must not train on half of a load
            self.report = api.apply(plan, verify=self.verify, held=self.held)
            self._failed = False
            self.frozen = self.report.frozen
        self._done.add(model)

    def _freeze_without_source(self, model: nn.Module) -> None:
        patterns: list[str] = []
        for part in self.parts:
            if not isinstance(part.freeze, bool):
                patterns += [part.freeze] if isinstance(part.freeze, str) else list(part.freeze)
        if patterns:
            self.frozen = freeze_patterns(model, patterns, self.held)

    def _note_restore(self, module: nn.Module, incompatible: Any) -> None:
        self._lacking = tuple(incompatible.missing_keys)

    @property
    def waiting(self) -> CheckpointError | None:
        """The error of a source that is gone, while only a resume can make up for it."""
        return self._gone

    @property
    def knows_what_to_freeze(self) -> bool:
        """Whether the frozen names are known although the source is gone."""
        return self.frozen is not None or not any(part.freeze is True for part in self.parts)

    def resume(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take over the state of the run that is being resumed: freeze what it froze, or say how that differs.

        Raises:
            FrozenChangedError: The resumed run had frozen other entries, and `on_freeze_change` is `"error"`.
        """
        self.restored = dict(state)
        before = tuple(state.get("frozen", ()))
        if self._gone is not None and self.frozen is None and before:
            targets = Targets.of(model)
            known = [name for name in before if name in targets.entries]
            if len(known) == len(before):
                self.frozen = freeze_entries(model, known, targets, self.held)
        now = self.frozen.names if self.frozen else ()
        if set(now) != set(before) and self.on_freeze_change == "error":
            raise FrozenChangedError(
                f"the run that is resumed had {len(before)} frozen tensors, this one has {len(now)}; its optimizer state "
                f"belongs to its own set\n{listed(_changes(before, now))}\n"
                '  -> give freeze= as it was, or on_freeze_change="allow" if the change is meant',
                tensors=tuple(sorted(set(now) ^ set(before))),
            )

    def start(self, model: nn.Module, *, resumed: bool) -> bool:
        """The last look before training: values first, then whether a restore explains a difference.

        Args:
            model: The model as it will train.
            resumed: Whether the host restored a checkpoint into it since `apply`.

        Returns:
            Whether this was the model's first start, so that there is something new to tell.

        Raises:
            TimingError: The model was never loaded.
            CheckpointError: The source is gone and no resume made up for it.
            VerificationError: The model does not hold what was loaded, and no restore explains it.
            FrozenChangedError: A frozen tensor is trainable again or has moved.
        """
        if not self.applied_to(model) or self._failed:
            raise TimingError(
                "training starts and the pretrained weights were never loaded into this model; see to it that the "
                "callback is in place when the model is set up, or call warmstart.load(model, ...) yourself"
            )
        first = not self._started
        self._started = True
        if self._gone is not None:
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
        elif self.report is not None and (first or resumed):
            self._compare(self.report, model, resumed)
        if self.frozen is not None:
            # A host may have cast the model since; a restore has put other values there.
            self.frozen.rebase(all_values=resumed)
            self.frozen.check(sampled=True)
        return first

    def _compare(self, report: Report, model: nn.Module, resumed: bool) -> None:
        if self.verify == "off":
            report.status = "superseded-by-resume" if resumed else report.status
            return
        wrong = report.differences(model, self.verify)
        if wrong and resumed:
            report.status = "superseded-by-resume"
        elif wrong:
            report.status = "failed"
            self._failed = True
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

    def guard(self, *, full: bool) -> None:
        """Compare the frozen tensors with their digests, sampled or in full.

        Raises:
            FrozenChangedError: A frozen tensor moved.
        """
        if self.frozen is not None:
            self.frozen.check(sampled=not full)

    def state(self) -> dict[str, Any]:
        """What a descendant of this run should know, as plain JSON types."""
        lineage = self.report.lineage if self.report is not None else (self.restored or {}).get("lineage")
        status = self.report.status if self.report is not None else "superseded-by-resume"
        if status == "superseded-by-resume" and self.restored:
            lineage = self.restored.get("lineage", lineage)
        return {
            "format": 1,
            "status": status,
            "lineage": lineage,
            "frozen": list(self.frozen.names if self.frozen else ()),
        }


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
