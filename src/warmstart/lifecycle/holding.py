"""What a run keeps frozen, and until when."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from warmstart.errors import TimingError
from warmstart.freezing import Frozen, Held, freeze_entries
from warmstart.lifecycle.manifest import Freeze, changes, mask
from warmstart.lifecycle.reentrance import ReentrantWatch
from warmstart.lifecycle.schedule import Schedule, optional
from warmstart.mapping.grouping import listed
from warmstart.mapping.model.targets import Targets

OnFreezeChange = Literal["error", "allow"]


class Holding:
    """The freeze of one model over a run.

    Attributes:
        frozen: What is frozen, or None.
        staged: The entries that the schedule releases in the course of the run.
    """

    def __init__(self, schedule: Schedule, held: Held, on_change: OnFreezeChange) -> None:
        self.frozen: Frozen | None = None
        self.staged: tuple[str, ...] = ()
        self._schedule, self._held, self._on_change = schedule, held, on_change
        self._released: tuple[str, ...] = ()
        self._progress = -1
        self._watch: ReentrantWatch | None = None

    def take(self, frozen: Frozen | None) -> None:
        """Hold what was frozen just now. What the schedule will release goes into the optimizer and the wrapper first."""
        self.frozen = frozen
        self.stage()

    def take_as_before(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Freeze what a run's state names, if the model has it all."""
        before, targets = Freeze.read(state), Targets.of(model)
        rows = {n: mask(targets.entries[n], spans) for n, spans in before.rows.items() if n in targets.entries}
        if (before.frozen or rows) and all(name in targets.entries for name in before.frozen):
            trained = self.frozen.trained if self.frozen is not None else None
            self.take(freeze_entries(model, before.frozen, targets, self._held, trained=trained, rows=rows))

    def take_up(
        self, model: nn.Module, names: tuple[str, ...], trained: frozenset[str] | None, rows: dict[str, Tensor]
    ) -> None:
        """Freeze anew what was frozen in a model before."""
        if names or rows:
            self.take(freeze_entries(model, names, Targets.of(model), self._held, trained=trained, rows=rows))

    def stage(self) -> None:
        """Let what the schedule will release train until `start`."""
        if self.frozen is not None and self._schedule.stages:
            deferred = self.frozen.defer(optional(self._schedule.patterns))
            self.staged = tuple(sorted({*self.staged, *deferred}))

    @property
    def later(self) -> list[str]:
        """The parameters that are frozen now and train when the schedule releases them."""
        if self.frozen is None:
            return []
        return [name for name in self.staged if name in self.frozen.trained.intersection(self.frozen.names)]

    def change_since(self, state: Mapping[str, Any] | None) -> str | None:
        """How what was frozen in a run's state differs from now, in words; None if it does not, or may."""
        before, now = (state or {}).get("frozen"), self._now.frozen
        if before is None or set(before) == set(now) or self._on_change == "allow":
            return None
        return (
            f"the newest checkpoint of this run had {len(before)} frozen tensors, this run has {len(now)}; if that is "
            f"what is resumed, its optimizer state does not fit\n{listed(changes(before, now))}\n"
            "  -> give freeze= as it was"
        )

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a run's state.

        Raises:
            FrozenChangedError: It had another freeze, and that is an error.
        """
        if self._on_change == "error":
            self._now.refuse_other(Freeze.read(state))
        self._released = tuple(state.get("released", ()))

    def start(self, *, resumed: bool, progress: int, bears_unused: bool) -> None:
        """Freeze what training is to find frozen, and release what the run has released already.

        Raises:
            TimingError: The wrapper that averages gradients would wait for those of what is released later.
            FrozenChangedError: A frozen tensor is trainable again or has moved.
        """
        if self.frozen is None:
            return
        self.frozen.follow(resumed=resumed)
        self.frozen.enforce()
        # Not before: of those that are not staged the optimizer was made without, and its state was restored so.
        self.release_restored(self._released)
        self._release_due(progress)
        if (later := self.later) and not bears_unused:
            raise TimingError(
                f"{len(later)} parameters get no gradient until they are released, which DistributedDataParallel must be told "
                f"of\n{listed((name, '') for name in later)}\n  -> set find_unused_parameters=True"
            )
        # A host may have cast the model since; a restore has put other values there.
        self.frozen.rebase(all_values=resumed)
        self.frozen.check(sampled=True)
        self._watch_anew()

    def release_restored(self, which: Sequence[str]) -> tuple[str, ...]:
        """Release those of `which` that the resumed run had released."""
        if self.frozen is None:
            return ()
        names = set(self._released).intersection(which, self.frozen.names)
        return self.frozen.release([glob.escape(name) for name in sorted(names)]) if names else ()

    def advance(self, progress: int) -> tuple[str, ...]:
        """Release what the schedule releases after `progress` units of training.

        Returns:
            The entries that train from now on.
        """
        released = self._release_due(progress)
        if released:
            self._watch_anew()
        return released

    def _release_due(self, progress: int) -> tuple[str, ...]:
        due = self._schedule.due(self._progress, progress)
        self._progress = progress
        return self.frozen.release(optional(due)) if self.frozen is not None and due else ()

    def _watch_anew(self) -> None:
        self.end()
        if self.frozen:
            self._watch = ReentrantWatch(self.frozen.model)

    def end(self) -> None:
        """Training is over: leave nothing in the model that looks at its batches."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def check(self, *, sampled: bool) -> None:
        """Compare the frozen tensors with their digests.

        Raises:
            FrozenChangedError: A frozen tensor moved.
        """
        if self.frozen is not None:
            self.frozen.check(sampled=sampled)

    def state(self) -> dict[str, Any]:
        """As plain JSON types."""
        frozen = set(self.frozen.names) if self.frozen is not None else set()
        now = self._now
        return {"released": [name for name in now.frozen if name not in frozen], **now.to_dict()}

    @property
    def _now(self) -> Freeze:
        return Freeze.of(self.frozen, self.staged)
