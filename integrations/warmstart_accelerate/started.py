"""One warm start of a loop: its life from the load to the end of training, as the loop's own moments tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from warmstart import Report
from warmstart.lifecycle import Lifecycle
from warmstart.loading.agreement import raised_on_all
from warmstart.mapping.plan.plan import Plan
from warmstart.outcome import Status
from warmstart_accelerate.absent import AbsentReport
from warmstart_accelerate.hooks import FirstForward
from warmstart_accelerate.offloaded import is_offloaded, onloaded
from warmstart_accelerate.timing import BEFORE_OPTIMIZER, live_optimizers, refuse_dispatched_later, shares


class LoopLifecycle(Lifecycle):
    """What accelerate's models ask for.

    Where processes share a node, one of them resolves and downloads, and the others find it there, or have it read the file
    for them. What is offloaded is looked at and written to where it is.
    """

    late_freeze = BEFORE_OPTIMIZER
    _offloaded = False  # when it was loaded

    @override
    def plan(self, model: nn.Module) -> Plan[Report]:
        if self.told.read == "broadcast":
            return super().plan(model)
        failed: Exception | None = None
        # The turn is passed on at the end of the block alone, so no error may leave it.
        with PartialState().local_main_process_first():
            try:
                plan = super().plan(model)
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
        return plan

    @override
    def apply(self, model: nn.Module, beside: Sequence[Lifecycle] = (), **found: Any) -> None:
        self._offloaded = is_offloaded(model)
        with onloaded(model):
            super().apply(model, beside, **found)

    @override
    def resume(self, model: nn.Module, state: dict[str, Any] | None) -> None:
        with onloaded(model):
            super().resume(model, state)

    @override
    def start(self, model: nn.Module, **facts: Any) -> bool:
        if is_offloaded(model) and not self._offloaded:
            refuse_dispatched_later(model)
        with onloaded(model):
            return super().start(model, **facts)


class Started:
    """One warm start.

    Attributes:
        life: What all hosts do alike.
        model: The bare model.
        key: What its part of a saved state is named.
        log: Whether it reports.
        module: What `prepare` made of the model; None before.
        report: What its caller got.
        begun: Whether the model trains, with no restore since.
    """

    def __init__(self, life: Lifecycle, model: nn.Module, key: str, log: bool) -> None:
        self.life = life
        self.model = model
        self.key = f"warm_start[{key}]"
        self.log = log
        self.module: nn.Module | None = None
        self.begun = False
        self._restored = False
        self._steps = 0
        self._counted: Optimizer | None = None
        self._first: FirstForward | None = None

    def load(self, beside: Sequence[Lifecycle], manifest: Mapping[str, Any] | None) -> None:
        """Load and freeze; the first training forward will tell.

        Raises:
            WarmStartError: As `Lifecycle.apply`.
            CheckpointError: The source is gone, and what to freeze is not known without it.
        """
        life = self.life
        life.apply(self.model, beside, optimizers=live_optimizers(self.model), manifest=manifest)
        with raised_on_all():
            if life.waiting is not None and not life.knows_what_to_freeze:
                raise life.waiting
        if life.report is None:
            status: Status = "pending" if life.waiting is not None else "already-applied"
            self.report: Report = AbsentReport(self.model, life.told.parts, life.frozen, status)
        else:
            self.report = life.report

    @property
    def idle(self) -> bool:
        """Whether the model could train and nothing was done with it: it was not prepared, and had no forward."""
        trains = self.model.training and any(p.requires_grad for p in self.model.parameters())
        return trains and self.module is None and self._first is not None and not self._first.ran

    def await_forward(self, act: FirstForward) -> None:
        """Act before the next training forward, of what the model is prepared to be or else of the model."""
        if self._first is not None:
            self._first.remove()
        self._first = act
        act.put_on(self.module if self.module is not None else self.model)

    def prepared(self, module: nn.Module) -> None:
        """`prepare` made this of the model."""
        self.module = module
        if self._first is not None:
            self._first.put_on(module)
        if self.life.frozen is not None:
            self.life.frozen.follow(resumed=False)
            if any(isinstance(m, DistributedDataParallel) for m in module.modules()):
                self.life.frozen.seal()

    def count(self, optimizers: Sequence[Optimizer]) -> None:
        """Release by the steps of the first optimizer that trains the model."""
        if self._counted is None and self.life.told.schedule.stages and optimizers:
            self._counted = optimizers[0]
            self._counted.register_step_post_hook(lambda *_: self._step())

    def _step(self) -> None:
        self._steps += 1
        self.life.advance(self._steps)

    def restore(self, state: dict[str, Any] | None) -> None:
        """`load_state` restores this model, from a state in which this warm start had left that.

        Raises:
            FrozenChangedError: As `Lifecycle.resume`.
        """
        self.life.resume(self.model, state)
        self._steps = int((state or {}).get("steps", 0))
        self._restored, self.begun = True, False

    def begin(self, optimizers: Sequence[Optimizer], bears_unused: bool, *, buffers: bool) -> bool:
        """The model trains from now on: the last look, at buffers as well if no forward has moved them yet.

        Returns:
            Whether there is something new to tell.
        """
        if self._first is not None:
            self._first.remove()
        first = self.life.start(
            self.model,
            resumed=self._restored,
            optimizers=optimizers,
            progress=self._steps,
            bears_unused=bears_unused,
            at_first_batch=True,
            buffers=buffers,
        )
        if self.life.waiting is None:  # what made up for a lost source stays known
            self.life.watch(self.model)  # a state may be loaded in the middle of training
        self.begun, self._restored = True, False
        if isinstance(self.report, AbsentReport):
            state = self.life.state()
            self.report.status = state["status"]
            self.report.lineage = state["lineage"] or {}
            self.report.frozen = self.life.frozen
        return first

    def check(self) -> None:
        """Compare the frozen tensors with their digests by sample, on this process alone.

        Raises:
            FrozenChangedError: A frozen tensor moved.
        """
        if self.begun and self.life.frozen is not None:
            with onloaded(self.model):
                self.life.frozen.check(sampled=True)

    def end(self) -> None:
        """Compare them in full, on every process.

        Raises:
            FrozenChangedError: A frozen tensor moved on one of them.
        """
        if self.begun:
            with onloaded(self.model):
                self.life.guard(full=True)

    def state(self) -> dict[str, Any]:
        return {**self.life.state(), "steps": self._steps}

    def trained_by(self, optimizers: Sequence[Optimizer], others: Sequence[nn.Module]) -> list[Optimizer]:
        """Those of the optimizers that are not another model's."""
        foreign = {id(p) for other in others if not shares(other, self.model) for p in other.parameters()}
        return [o for o in optimizers if not any(id(p) in foreign for g in o.param_groups for p in g["params"])]
