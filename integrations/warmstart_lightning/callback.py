"""`WarmStart`: pretrained weights into a Lightning run, at the one moment that is right."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack, override

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "warmstart_lightning needs Lightning. Install it with: pip install 'warmstart[lightning]'", name=error.name
    ) from error

from warmstart import MappingError, Pretrained, PretrainedFields, Report
from warmstart.api import Sources
from warmstart.freezing import Frozen, Held
from warmstart.lifecycle import Lifecycle, OnFreezeChange, Settings, UnfreezeUnit
from warmstart.mapping.plan.plan import Read, Verify
from warmstart.mapping.pretrained import as_parts
from warmstart.patterns import Patterns
from warmstart_lightning.loggers import log_drift, log_lineage, log_report, save_report, tell
from warmstart_lightning.neighbours import averaged_notes, refuse_at_setup, refuse_frozen
from warmstart_lightning.once import Once
from warmstart_lightning.strategies import Moment, moment, own_optimizers

_STAGES = ("fit", "validate", "test", "predict")
_EVERY_BATCH = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end",
)  # fmt: skip


class WarmStart(Callback):
    """Load pretrained weights when `fit` sets the model up, freeze them, verify them, and report them.

    Loading happens after the module's layers exist, wherever they are made (`__init__`, `setup` or `configure_model`),
    and before `configure_optimizers`; once for each model object (a second fit goes on from its trained weights, under the
    freeze that it is given, and layers that `setup` made anew are loaded anew); for validate, test or predict alone only
    where `stages` asks. A resumed run (`ckpt_path=`) keeps its own weights. When training starts every value is compared
    with the source; at each epoch's end and at the end of training the frozen tensors are compared with what they were, and
    how far the loaded layers that train have moved is logged.

    Args:
        pretrained: A path, a state dict, a module, a `Pretrained`, or a list of them.
        verify: `"full"` compares every element, `"sample"` a fixed sample, `"off"` nothing.
        held: `"eval"` holds modules that are frozen as a whole in eval mode; `"train"` leaves their mode alone.
        unfreeze: What to release when: a number of units of training, 1 at least, to patterns of frozen entries. They are in
            the optimizer from the start; under DDP they need `find_unused_parameters=True`.
        unfreeze_unit: `"epoch"`, or `"step"` of the optimizer.
        stages: The trainer's methods that load: `"fit"`, and to score the pretrained weights before training also
            `"validate"`, `"test"` or `"predict"`.
        on_freeze_change: Whether resuming a run that had frozen other entries is an `"error"`, or to be allowed.
        lock: A lock file (`Plan.to_yaml`): a run whose plan came out different is refused.
        read: `"local"`: every rank reads what it holds of the model. `"broadcast"`: one rank of each node reads, and passes
            every tensor on to the others, which need no file.
        log: Print the report, log it to the trainer's loggers and write it to the run's folder, as JSON and as a page.
        name: Tells two of these callbacks with the same `into` apart in checkpoints; Lightning asks for it with "more than
            one stateful callback".
        **fields: `Pretrained`'s fields, for a single bare source.

    Attributes:
        report: What was loaded, from the start of training on.
        drift: Path of each module that was loaded and trains, to its relative L2 distance from its pretrained values at the
            last epoch's end, by a sample.

    Raises:
        WarmStartError: From `fit`: everything that `warmstart.load` raises, and what is found when training starts.

    Example::

        Trainer(callbacks=[WarmStart("bert.safetensors", into="encoder", freeze=True)]).fit(module, data)
    """

    def __init__(
        self,
        pretrained: Sources,
        *,
        verify: Verify = "full",
        held: Held = "eval",
        unfreeze: Mapping[int, Patterns] | None = None,
        unfreeze_unit: UnfreezeUnit = "epoch",
        stages: Sequence[str] = ("fit",),
        on_freeze_change: OnFreezeChange = "error",
        lock: str | os.PathLike[str] | None = None,
        read: Read = "local",
        log: bool = True,
        name: str | None = None,
        **fields: Unpack[PretrainedFields],
    ) -> None:
        parts = as_parts(pretrained, fields)
        self._life = Lifecycle(
            Settings(
                parts,
                verify=verify,
                held=held,
                unfreeze=unfreeze,
                unfreeze_unit=unfreeze_unit,
                on_freeze_change=on_freeze_change,
                lock=lock,
                read=read,
            )
        )
        self._stages = (stages,) if isinstance(stages, str) else tuple(stages)
        if "fit" not in self._stages or not set(self._stages) <= set(_STAGES):
            raise MappingError(f'stages={stages!r}: "fit", and any of "validate", "test" and "predict"')
        self._key = name if name is not None else "+".join(part.into for part in parts)
        # Made once: Lightning asks for it around every hook of every batch.
        self._state_key = self._generate_state_key(into=self._key)
        self._logs = log  # `log` is Lightning's
        self.drift: dict[str, float] = {}
        self._moment: Moment = "set up"
        self._once: Once | None = None
        self._checked = False
        self._restored = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a run: what is about to be done, and the module's `log` that Lightning puts on callbacks."""
        of_a_run = (*_EVERY_BATCH, "log", "log_dict")
        return {name: value for name, value in self.__dict__.items() if name not in of_a_run} | {"_once": None}

    @property
    def report(self) -> Report | None:
        return self._life.report

    @property
    def pretrained(self) -> list[Pretrained]:
        return self._life.told.parts

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"this Trainer is of {type(trainer).__module__.partition('.')[0]}, and WarmStart is a callback of "
                "lightning.pytorch; write: from lightning.pytorch import Trainer, LightningModule"
            )
        self._checked = self._restored = False
        self._wake()
        if stage not in self._stages:
            return
        self._moment = moment(trainer, self._stages)
        self._life.steps_on_copies = isinstance(trainer.strategy, DeepSpeedStrategy)
        # Our setup comes before the module's own and before configure_model, and no hook lies between those and the
        # optimizer. So the last of them that the module has is wrapped on the instance, for one call.
        last = next((name for name in ("configure_model", "setup") if is_overridden(name, pl_module)), None)
        if stage == "fit":
            refuse_at_setup(trainer, pl_module, self, freezes=self._life.told.freezes)
        self._end_wrap()
        if last is None:
            self._set_up(trainer, pl_module)
        else:
            self._once = Once(last, pl_module, lambda: self._set_up(trainer, pl_module))

    def _end_wrap(self) -> None:
        if self._once is not None:
            self._once.remove()
            self._once = None

    def _set_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._moment == "on_fit_start":
            with torch.device("cpu"):
                self._life.announce(pl_module, self._others(trainer))
        else:
            self._apply(trainer, pl_module)
        if trainer.state.fn == "fit" and not any(p.requires_grad for p in pl_module.parameters()):
            # What comes next is torch's "optimizer got an empty parameter list".
            rank_zero_warn(
                f"warmstart: no parameter of {type(pl_module).__name__} trains; freeze less, or unfreeze= some later"
            )

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # configure_model runs under the strategy's device and default dtype; what we make is ours.
        with torch.device("cpu"):
            # Those of an earlier fit are still there as long as this one has none.
            optimizers = trainer.optimizers if self._moment == "on_fit_start" else ()
            self._life.apply(pl_module, self._others(trainer), optimizers=optimizers)
        if self._logs and self._life.report is not None:
            log_lineage(trainer.loggers, self._life.report)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if _of_a_tuner(trainer.ckpt_path):
            return
        self._restored = True
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and trainer.state.fn == "fit":
            self._life.resume(pl_module, state)
            if self._moment == "on_fit_start" and self._life.release_restored():
                # The strategy has read the optimizer's state by now, without that of what was frozen at the time.
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()
                assert trainer.ckpt_path is not None
                trainer.strategy.load_checkpoint(trainer.ckpt_path)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._life.state()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._moment == "on_fit_start":
            self._apply(trainer, pl_module)
        self._life.follow_converted(pl_module)  # sync_batchnorm=True
        # The optimizer exists by now: what was to be frozen and is not yet never will be.
        gone = self._life.waiting
        restored = not trainer.strategy.restore_checkpoint_after_setup
        if gone is not None and restored and (not self._resumed(trainer) or not self._life.knows_what_to_freeze):
            raise gone
        _expect_eval_mode(self._life.frozen, pl_module)
        self._life.enforce()
        refuse_frozen(trainer, self._life.frozen)
        # A learning rate finder stands before us and has had a trial run of its own by now.
        self._checked = False
        self._wake()
        self._life.rearm()

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checked:
            return
        self._checked = True
        if self._moment == "on_fit_start" and self._resumed(trainer) and pl_module.strict_loading:
            # A checkpoint of one file is read into the shards module by module, with an error for what it lacks.
            self._life.restored_whole(pl_module)
        first = self._life.start(
            pl_module,
            resumed=self._resumed(trainer),
            optimizers=own_optimizers(trainer),
            progress=self._progress(trainer),
            bears_unused=getattr(trainer.strategy.model, "find_unused_parameters", True),
        )
        if first:  # its own hook, which comes after all callbacks' and right before its step
            self._once = Once("on_train_batch_start", pl_module, lambda: self._life.check_first_batch(pl_module))
        if not self._logs:
            return
        if first:
            self._life.measure_drift(pl_module)
        # `log_dir` broadcasts: all ranks ask. Of a logger without a folder of its own there is none.
        folder = None if _leaves_no_trace(trainer) else trainer.log_dir or trainer.default_root_dir
        if first and self.report is not None:
            self._tell(trainer, self.report, folder)
        elif first:
            rank_zero_info("warmstart: the source is gone; the resumed checkpoint has the weights")
        elif self.report is None:
            rank_zero_info("warmstart: an earlier run has loaded this model; it goes on from what it was trained to")

    def _resumed(self, trainer: Trainer) -> bool:
        """Whether this fit restored a checkpoint, whose path a tuner that ran since has replaced by one of its own."""
        path = trainer.ckpt_path
        return self._restored if _of_a_tuner(path) else path is not None

    def _progress(self, trainer: Trainer) -> int:
        return trainer.global_step if self._life.told.unfreeze_unit == "step" else trainer.current_epoch

    def _others(self, trainer: Trainer) -> list[Lifecycle]:
        return [c._life for c in _warm_starts(trainer) if c is not self]

    @rank_zero_only
    def _tell(self, trainer: Trainer, report: Report, folder: str | None) -> None:
        tell(report)
        log_report(trainer.loggers, report, step=trainer.global_step)
        if folder is None or "://" in folder:  # a run folder in an object store: the loggers have the report
            return
        suffix = f"-{self._key.replace('/', '_')}" if len(_warm_starts(trainer)) > 1 else ""
        save_report(Path(folder), f"warmstart{suffix}", report)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = trainer.state.fn
        if stage is not None and stage != "fit" and stage.value in self._stages:
            self._life.look(pl_module, resumed=self._resumed(trainer))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._life.told.unfreeze_unit == "epoch":
            self._life.advance(self._progress(trainer))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start(trainer, pl_module)  # for one that was put into a trainer that trains already, to be told so
        if self._life.told.unfreeze_unit == "step":
            self._life.advance(self._progress(trainer))
        elif self in _warm_starts(trainer):
            self._rest()

    def _rest(self) -> None:
        """Have no more hooks of a batch: Lightning enters its profiler for each that can be called, 20 us a batch in all."""
        for name in _EVERY_BATCH:
            if getattr(type(self), name) is getattr(WarmStart, name):
                self.__dict__[name] = None

    def _wake(self) -> None:
        for name in _EVERY_BATCH:
            self.__dict__.pop(name, None)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._life.guard(full=False)
        if self._logs:
            self.drift = self._life.drift(pl_module)
            log_drift(trainer.loggers, self.drift, step=trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wake()
        self._life.guard(full=True)
        notes = averaged_notes(trainer, self._life.frozen)
        for note in notes:
            rank_zero_info(f"warmstart: {note}")
        if self.report is not None:
            self.report.notes += notes

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_wrap()
        self._wake()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_wrap()
        self._life.follow_converted(pl_module)  # the strategy has put them back


def _warm_starts(trainer: Trainer) -> list[WarmStart]:
    # `trainer.callbacks` is an attribute that Lightning sets without declaring it.
    return [c for c in getattr(trainer, "callbacks", []) if isinstance(c, WarmStart)]


def _expect_eval_mode(frozen: Frozen | None, module: nn.Module) -> None:
    """Lightning warns of modules in eval mode; where they are exactly those held for the frozen, there is no surprise."""
    held = {id(m) for m in (frozen.held_modules if frozen else ())}
    in_eval = [m for m in module.modules() if not m.training]
    if in_eval and all(id(m) in held for m in in_eval):
        warnings.filterwarnings("ignore", rf"Found {len(in_eval)} module\(s\) in eval mode", UserWarning)


def _leaves_no_trace(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False)) or trainer.barebones


def _of_a_tuner(path: object) -> bool:
    """Whether this is a tuner's own temporary checkpoint, with which it takes a trial run back."""
    return path is not None and Path(str(path)).name.startswith((".lr_find_", ".scale_batch_size_"))
