"""`WarmStart`: pretrained weights into a Lightning run, at the one moment that is right."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack, override

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "warmstart_lightning needs Lightning. Install it with: pip install 'warmstart[lightning]'", name=error.name
    ) from error

from warmstart import Pretrained, PretrainedFields, Report, TimingError
from warmstart.api import Sources
from warmstart.freezing import Frozen, Held
from warmstart.lifecycle import Lifecycle, OnFreezeChange
from warmstart.mapping.plan import Verify
from warmstart.mapping.pretrained import as_parts
from warmstart_lightning.loggers import log_lineage, log_report


class WarmStart(Callback):
    """Load pretrained weights when `fit` sets the model up, freeze them, verify them, and report them.

    Loading happens after the module's layers exist, wherever they are made (`__init__`, `setup` or `configure_model`),
    and before `configure_optimizers`; once for each model object; never for validate, test or predict alone. A resumed
    run (`ckpt_path=`) keeps its own weights. When training starts every value is compared with the source; at each
    epoch's end and at the end of training the frozen tensors are compared with what they were.

    Args:
        pretrained: A path, a state dict, a module, a `Pretrained`, or a list of them.
        verify: `"full"` compares every element, `"sample"` a fixed sample, `"off"` nothing.
        held: `"eval"` holds modules that are frozen as a whole in eval mode; `"train"` leaves their mode alone.
        on_freeze_change: Whether resuming a run that had frozen other entries is an `"error"`, or to be allowed.
        log: Print the report, log it to the trainer's loggers and write it to the run's folder as JSON.
        name: Tells two of these callbacks with the same `into` apart in checkpoints.
        **fields: `Pretrained`'s fields, for a single bare source.

    Attributes:
        report: What was loaded, from the start of training on.

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
        on_freeze_change: OnFreezeChange = "error",
        log: bool = True,
        name: str | None = None,
        **fields: Unpack[PretrainedFields],
    ) -> None:
        parts = as_parts(pretrained, fields)
        self._life = Lifecycle(parts, verify=verify, held=held, on_freeze_change=on_freeze_change)
        self._key = name if name is not None else "+".join(part.into for part in parts)
        self._logs = log  # Lightning puts its own `log` on callbacks
        self._wrapped: str | None = None
        self._checked = False
        self._first_batch = False

    @property
    def report(self) -> Report | None:
        return self._life.report

    @property
    def pretrained(self) -> list[Pretrained]:
        return self._life.parts

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(into=self._key)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._checked = self._first_batch = False
        if stage != "fit":
            return
        if self._life.applied_to(pl_module):
            self._life.apply(pl_module)
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            raise TimingError(
                f"{type(trainer.strategy).__name__} shards the model after it is set up, which WarmStart does not support "
                'yet; use Trainer(strategy="auto") or "ddp", or call warmstart.load(model, ...) before sharding'
            )
        # Our setup comes before the module's own and before configure_model, and no hook lies between those and the
        # optimizer. So the last of them that the module has is wrapped on the instance, for one call.
        last = next((name for name in ("configure_model", "setup") if is_overridden(name, pl_module)), None)
        if last is None:
            self._apply(trainer, pl_module)
            return
        original = getattr(pl_module, last)

        @functools.wraps(original)
        def once(*args: Any, **kwargs: Any) -> Any:
            self._unwrap(pl_module)
            result = original(*args, **kwargs)
            self._apply(trainer, pl_module)
            return result

        self._wrapped = last
        pl_module.__dict__[last] = once

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        others = [c._life for c in _warm_starts(trainer) if c is not self]
        # configure_model runs under the strategy's device and default dtype; what we make is ours.
        with torch.device("cpu"):
            self._life.apply(pl_module, beside=others)
        if self._logs and self._life.report is not None:
            log_lineage(trainer.loggers, self._life.report)

    def _unwrap(self, pl_module: nn.Module) -> None:
        if self._wrapped is not None:
            pl_module.__dict__.pop(self._wrapped, None)
            self._wrapped = None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and trainer.state.fn == "fit" and self._life.applied_to(pl_module):
            self._life.resume(pl_module, state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._life.restored = dict(state_dict)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._life.state()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The optimizer exists by now: what was to be frozen and is not yet never will be.
        gone = self._life.waiting
        if gone is not None and (not _resumed(trainer) or not self._life.knows_what_to_freeze):
            raise gone
        _expect_eval_mode(self._life.frozen, pl_module)

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
        first = self._life.start(pl_module, resumed=_resumed(trainer))
        self._first_batch = first
        if not self._logs:
            return
        folder = None if _leaves_no_trace(trainer) else trainer.log_dir  # broadcasts: all ranks ask
        if first and self.report is not None:
            self._tell(trainer, self.report, folder)
        elif first:
            rank_zero_info("warmstart: the source is gone; the resumed checkpoint has the weights")

    @rank_zero_only
    def _tell(self, trainer: Trainer, report: Report, folder: str | None) -> None:
        rank_zero_info(str(report))
        log_report(trainer.loggers, report, step=trainer.global_step)
        if folder is not None:
            suffix = f"-{self._key.replace('/', '_')}" if len(_warm_starts(trainer)) > 1 else ""
            report.to_json(Path(folder) / f"warmstart{suffix}.json")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._first_batch:
            self._first_batch = False
            self._life.check_first_batch(pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._life.guard(full=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._life.guard(full=True)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unwrap(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap(pl_module)


def _warm_starts(trainer: Trainer) -> list[WarmStart]:
    # `trainer.callbacks` is an attribute that Lightning sets without declaring it.
    return [c for c in getattr(trainer, "callbacks", []) if isinstance(c, WarmStart)]


def _expect_eval_mode(frozen: Frozen | None, module: nn.Module) -> None:
    """Lightning warns of modules in eval mode; where they are exactly those held for the frozen, there is no surprise."""
    held = {id(m) for _, root in (frozen.held_modules if frozen else ()) for m in root.modules()}
    in_eval = [m for m in module.modules() if not m.training]
    if in_eval and all(id(m) in held for m in in_eval):
        warnings.filterwarnings("ignore", rf"Found {len(in_eval)} module\(s\) in eval mode", UserWarning)


def _leaves_no_trace(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False)) or trainer.barebones


def _resumed(trainer: Trainer) -> bool:
    """Whether this fit restored a checkpoint; the tuner's own temporary ones are none."""
    path = trainer.ckpt_path
    return path is not None and not Path(str(path)).name.startswith((".lr_find_", ".scale_batch_size_"))
