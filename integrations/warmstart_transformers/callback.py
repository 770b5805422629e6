"""`WarmStartCallback`: pretrained weights into a run of transformers' `Trainer`, at the one moment that is right."""

from __future__ import annotations

import functools
import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack, override

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "warmstart_transformers needs transformers. Install it with: pip install 'warmstart[transformers]'",
        name=error.name,
    ) from error

from warmstart import CheckpointError, MappingError, Pretrained, PretrainedFields, Report, TimingError
from warmstart.api import Sources
from warmstart.freezing import Held
from warmstart.lifecycle import OnFreezeChange, Settings, UnfreezeUnit
from warmstart.loading.agreement import raised_on_all
from warmstart.mapping.plan.plan import Read, Verify
from warmstart.mapping.pretrained import as_parts
from warmstart.patterns import Patterns
from warmstart_transformers.model_card import add_ancestor
from warmstart_transformers.models import ModelLifecycle, mark_loaded, reach_past_frozen
from warmstart_transformers.sharding import is_sharding, refuse_placeholders, refuse_sharding, trains_by_deepspeed
from warmstart_transformers.trackers import log_report, save_report

Model = TypeVar("Model", bound=nn.Module)

_MANIFEST = "warmstart.json"  # in each checkpoint: what its descendants should know


class WarmStartCallback(TrainerCallback):
    """Load pretrained weights when the `Trainer` is built, freeze them, verify them, and report them.

    No later event comes before the optimizer, so building a `Trainer` loads, also one that only evaluates. A model object
    is loaded once: `train()` twice goes on from what was trained. A resumed run (`resume_from_checkpoint=`) keeps its own
    weights. When training starts, and before its first step, every value is compared with the source; at each epoch's end
    and at the end of training the frozen tensors are compared with what they were.

    Where the `Trainer` makes its model itself (`model_init=`, hyperparameter search), makes no callback event
    (`add_callback` after it was built) or gets another model later, `attach(trainer)` or `wrap_model_init(fn)` sets it
    right; without them training is refused. `attach` also compares the freeze with that of the run that is resumed before
    its optimizer state is loaded, reaches every tracker, and adds the ancestor to the model card.

    Args:
        pretrained: A path, a state dict, a module, a `Pretrained`, or a list of them. Where all that is found of a source
            lies in the model's base (`model.base_model_prefix`), `into` is that base, and the head is left alone.
        verify: `"full"` compares every element, `"sample"` a fixed sample, `"off"` nothing.
        held: `"eval"` holds modules that are frozen as a whole in eval mode, whatever the `Trainer` sets at each step;
            `"train"` leaves their mode alone.
        unfreeze: What to release when: a number of units of training, 1 at least, to patterns of frozen entries. They are
            in the optimizer from the start.
        unfreeze_unit: `"epoch"` or `"step"`.
        on_freeze_change: Whether resuming a run that had frozen other entries is an `"error"`, or to be allowed.
        lock: A lock file (`Plan.to_yaml`): a run whose plan came out different is refused.
        read: `"local"`: every rank reads what it holds of the model. `"broadcast"`: one rank of each node reads, and passes
            every tensor on to the others, which need no file.
        log: Print the report, log it to what `report_to` names and write it to `output_dir` as JSON and,
            with jinja2 installed, as a page.
        name: Tells two of these callbacks with the same `into` apart in checkpoints.
        **fields: `Pretrained`'s fields, for a single bare source.

    Attributes:
        report: What was loaded; None where a resumed run did without its source.

    Raises:
        WarmStartError: From `Trainer(...)` everything that `warmstart.load` raises; from `train()` what is found when
            training starts, or a `TimingError` naming the line to add.

    Example::

        Trainer(model, args, train_dataset=data, callbacks=[WarmStartCallback("bert.safetensors", freeze=True)]).train()
    """

    def __init__(
        self,
        pretrained: Sources,
        *,
        verify: Verify = "full",
        held: Held = "eval",
        unfreeze: Mapping[int, Patterns] | None = None,
        unfreeze_unit: UnfreezeUnit = "epoch",
        on_freeze_change: OnFreezeChange = "error",
        lock: str | os.PathLike[str] | None = None,
        read: Read = "local",
        log: bool = True,
        name: str | None = None,
        **fields: Unpack[PretrainedFields],
    ) -> None:
        parts = as_parts(pretrained, fields)
        self._life = ModelLifecycle(
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
        self._key = name if name is not None else "+".join(part.into for part in parts)
        self._log = log
        self._reset()

    def _reset(self) -> None:
        self._run: weakref.ref[TrainerControl] | None = None
        self._trainer: weakref.ref[Trainer] | None = None
        self._folder: str | None = None  # the run's
        self._resuming: str | None = None  # the checkpoint that `train` was given
        self._epoch = 0  # of this training: the state's is a fraction of `max_steps` where a dataset has no length
        self._first_step = False
        _CALLBACKS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """The configuration alone, as the lifecycle's: the run belongs to its process."""
        return {name: self.__dict__[name] for name in ("_life", "_key", "_log")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def report(self) -> Report | None:
        return self._life.report

    @property
    def pretrained(self) -> list[Pretrained]:
        return self._life.told.parts

    @property
    def state_key(self) -> str:
        """What this callback's part of a checkpoint's manifest is named."""
        return f"{type(self).__name__}[{self._key}]"

    def attach(self, trainer: Trainer) -> WarmStartCallback:
        """Follow a trainer: load into the model it has now, and into each model it makes or is given before it trains.

        Args:
            trainer: The trainer; this callback is added to it if it is not there yet.

        Returns:
            This callback.

        Raises:
            WarmStartError: As `warmstart.load`.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if self._trainer is None or self._trainer() is not trainer:
            self._follow(trainer.args, trainer.control)
            self._trainer = weakref.ref(trainer)
            if trainer.model_init is not None:
                trainer.model_init = self.wrap_model_init(trainer.model_init)
            # Between the load of a resumed model and of its optimizer there is no event; `train` itself is the moment.
            trainer.train = self._before_train(trainer, trainer.train)  # type: ignore[method-assign]
            trainer.create_model_card = self._after_model_card(trainer, trainer.create_model_card)  # type: ignore[method-assign]
        self._load(_model(trainer), trainer.optimizer)
        return self

    def wrap_model_init(self, model_init: Callable[..., Model]) -> Callable[..., Model]:
        """`model_init` for a `Trainer` that makes its own models: each of them is loaded when it is made."""
        if getattr(model_init, "__warmstart__", None) is self:
            return model_init

        @functools.wraps(model_init)  # the Trainer looks at the signature
        def loaded(*args: Any, **kwargs: Any) -> Model:
            model = model_init(*args, **kwargs)
            self._load(model)
            return model

        loaded.__warmstart__ = self  # type: ignore[attr-defined]
        return loaded

    def _before_train(self, trainer: Trainer, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def loaded(*args: Any, **kwargs: Any) -> Any:  # as given: a subclass may have a signature of its own
            given = args[0] if args else kwargs.get("resume_from_checkpoint")
            self._resuming = _newest_checkpoint(trainer.args.output_dir) if given is True else (given or None)
            try:
                if trainer.model_init is None:
                    self._load(_model(trainer), trainer.optimizer)
                return train(*args, **kwargs)
            finally:
                self._resuming = None

        return loaded

    def _after_model_card(self, trainer: Trainer, create: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(create)
        def with_ancestor(*args: Any, **kwargs: Any) -> None:
            create(*args, **kwargs)
            if trainer.is_world_process_zero() and (lineage := self._life.state()["lineage"]) is not None:
                add_ancestor(Path(str(trainer.args.output_dir), "README.md"), lineage)

        return with_ancestor

    def _follow(self, args: TrainingArguments, control: TrainerControl) -> None:
        refuse_sharding(args)
        self._run, self._folder = weakref.ref(control), args.output_dir

    def _load(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        beside = [callback for callback in self._of_this_run() if callback is not self]
        if any(callback.state_key == self.state_key for callback in beside):
            raise MappingError(
                f"two warm starts of this Trainer are {self.state_key} in its checkpoints, where one would overwrite the "
                'other; tell them apart: WarmStartCallback(..., name="adapter")'
            )
        others = [callback._life for callback in beside]
        optimizers = [optimizer] if optimizer is not None else []
        newest = self._manifest(_newest_checkpoint(self._folder))
        with raised_on_all("look for placeholders"):
            refuse_placeholders(model, self._life.plan)
        self._life.steps_on_copies = trains_by_deepspeed()
        self._life.apply(model, others, optimizers=optimizers, manifest=newest)
        if self.report is not None:
            mark_loaded(model, self.report)
        if self._resuming is not None:
            self._life.resume(model, self._manifest(self._resuming))

    def _manifest(self, folder: str | None) -> dict[str, Any] | None:
        """What this callback left in a checkpoint, or None if it left nothing; each rank calls it."""
        path = Path(folder or "", _MANIFEST)
        with raised_on_all():
            try:
                found = json.loads(path.read_text(encoding="utf-8")) if folder is not None and path.exists() else {}
                return dict(found[self.state_key]) if self.state_key in found else None
            except (ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{path} is not what a warm start writes ({error}); delete it to go on without"
                ) from error

    @override
    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        self._trainer = None  # this one may be another than was attached
        self._follow(args, control)
        self._load(model, optimizer)

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if not self._life.loaded(model):
            raise TimingError(
                f"training starts and the pretrained weights were never loaded into this {type(model).__name__}: the Trainer "
                "made it anew, was given it later, or was built without this callback\n"
                "  -> after Trainer(...), and before train(): callback.attach(trainer); or, where the Trainer makes its models "
                "itself: Trainer(model_init=callback.wrap_model_init(model_init), ...)"
            )
        resumed = state.global_step > 0
        if resumed and self._trainer is None:  # attached, it knows the checkpoint and has asked it before
            folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
            self._life.resume(model, self._manifest(folder))
        if self._life.frozen is not None:
            reach_past_frozen(model)
        self._epoch = int(state.epoch or 0)
        first = self._life.start(
            model,
            resumed=resumed,
            optimizers=[optimizer] if optimizer is not None and not trains_by_deepspeed() else [],
            progress=self._progress(state),
            bears_unused=args.world_size == 1 or is_sharding() or _finds_unused(args, model),
        )
        # Training may be interrupted, and resumed in the same process. What made up for a lost source must stay known:
        # auto_find_batch_size starts again.
        if self._life.waiting is None:
            self._life.watch(model)
        self._first_step = first
        if first and self._log:
            self._tell(args, state)

    def _tell(self, args: TrainingArguments, state: TrainerState) -> None:
        report, zero = self.report, state.is_world_process_zero
        if report is None:
            if zero:
                print("warmstart: the source is gone; the resumed checkpoint has the weights")
            return
        if zero:
            report.show()
        log_report(report, args, state, self._trainer() if self._trainer is not None else None)
        if zero:
            suffix = f"-{self._key.replace('/', '_')}" if len(self._of_this_run()) > 1 else ""
            save_report(Path(str(args.output_dir)), f"warmstart{suffix}", report)

    def _of_this_run(self) -> list[WarmStartCallback]:
        """This and the other warm starts of the same Trainer."""
        run = self._run() if self._run is not None else None
        return [c for c in _CALLBACKS if c._run is not None and c._run() is run] if run is not None else []

    def _progress(self, state: TrainerState) -> int:
        return state.global_step if self._life.told.unfreeze_unit == "step" else self._epoch

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._life.told.unfreeze_unit == "epoch":
            self._life.advance(self._progress(state))

    @override
    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._first_step and model is not None:
            self._first_step = False
            self._life.check_first_batch(model)
        if self._life.told.unfreeze_unit == "step":
            self._life.advance(self._progress(state))

    @override
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (gone := self._life.unsettled) is not None:  # else the scores would be those of random weights
            raise gone

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save:
            return
        # A trial of a hyperparameter search has a folder of its own in between.
        pattern = (
            f"*/checkpoint-{state.global_step}" if state.is_hyper_param_search else f"checkpoint-{state.global_step}"
        )
        folders = sorted(Path(str(args.output_dir)).glob(pattern), key=os.path.getmtime)
        if not folders:
            return
        path = folders[-1] / _MANIFEST
        # Another warm start of this run may have written its part; a checkpoint of an earlier run was replaced as a whole.
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(found | {self.state_key: self._life.state()}, indent=1) + "\n", encoding="utf-8")

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch += 1
        self._life.guard(full=False)

    @override
    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._life.guard(full=True)
        if model is not None:
            self._life.watch(model)  # anew: the best model may have been loaded at the end


# All of this process: the Trainer shows a callback none of its others.
_CALLBACKS: weakref.WeakSet[WarmStartCallback] = weakref.WeakSet()


def _model(trainer: Trainer) -> nn.Module:
    assert isinstance(trainer.model, nn.Module)
    return trainer.model


def _newest_checkpoint(folder: str | None) -> str | None:
    if folder is None or not os.path.isdir(folder):
        return None
    newest: str | None = get_last_checkpoint(folder)  # type: ignore[no-untyped-call]
    return newest


def _finds_unused(args: TrainingArguments, model: nn.Module) -> bool:
    """What the `Trainer` tells DistributedDataParallel."""
    if args.ddp_find_unused_parameters is not None:
        return args.ddp_find_unused_parameters
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # later releases, and earlier ones
    return not next((getattr(model, name) for name in names if hasattr(type(model), name)), False)
