"""The warm starts of one accelerator, and those of its moments that they answer to."""

from __future__ import annotations

import functools
import json
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from warmstart import CheckpointError, MappingError, Report
from warmstart.loading.agreement import failing_on_all, raised_on_all
from warmstart.rendering.files import write_whole
from warmstart_accelerate.absent import AbsentReport
from warmstart_accelerate.hooks import FirstForward, after, before
from warmstart_accelerate.started import Started
from warmstart_accelerate.timing import (
    refuse_meta,
    refuse_mixed_up,
    refuse_state_before_prepare,
    refuse_swapped,
    shares,
)
from warmstart_accelerate.trackers import log_report, save_page

_MEMBER = "_warmstart_run"  # of the accelerator: what it lives with
MANIFEST = "warmstart.json"  # in each saved state: what its descendants should know


class Run:
    """Follows one accelerator: what it prepares, saves and loads, and when it ends."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._started: list[Started] = []
        self._stepping: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)
        before(accelerator, "prepare_model", self._about_to_prepare)
        after(accelerator, "prepare", self._prepared)
        after(accelerator, "prepare_model", self._prepared)
        after(accelerator, "backward", lambda _: self._learned())
        before(accelerator, "free_memory", self._free)
        before(accelerator, "end_training", self._end)

    @classmethod
    def of(cls, accelerator: Accelerator) -> Run:
        """The one run of this accelerator."""
        members = vars(accelerator)
        if _MEMBER not in members:
            members[_MEMBER] = cls(accelerator)
        found: Run = members[_MEMBER]
        return found

    def add(self, started: Started) -> Report:
        """Load one more.

        Raises:
            WarmStartError: As `warm_start`.
        """
        # `free_memory` lets go of the models that were prepared, and so do we.
        models = self.accelerator._models
        self._started = [s for s in self._started if s.module is None or any(shares(m, s.model) for m in models)]
        others = [s for s in self._started if s.model is started.model]
        for other in self._started:
            if other.life.same_as(started.life) and other.model is started.model:
                other.load([s.life for s in others if s is not other], None)
                return other.report
        _refuse_same_key(started, (s for s in self._started if s.module is not None))
        started.load([s.life for s in others], self._newest(started.key))
        self._started.append(started)
        self._await(started)
        return started.report

    def _await(self, started: Started) -> None:
        started.await_forward(FirstForward(functools.partial(self._begin, started)))

    def _about_to_prepare(self, model: nn.Module) -> None:
        if any(started.model is model for started in self._started):
            refuse_meta(model)

    def _prepared(self, result: Any) -> None:
        modules = [r for r in (result if isinstance(result, tuple | list) else (result,)) if isinstance(r, nn.Module)]
        optimizers = self._optimizers()
        for started in self._started:
            module = next((m for m in modules if shares(m, started.model)), None)
            if module is not None and module is not started.module:
                _refuse_same_key(started, (s for s in self._started if s.module is not None and s is not started))
                started.prepared(module)
            started.count(started.trained_by(optimizers, self.accelerator._models))
        for optimizer in optimizers:
            if optimizer not in self._stepping:  # of a loop that calls loss.backward() itself
                self._stepping.add(optimizer)
                optimizer.register_step_pre_hook(lambda *_: self._learned())

    def _optimizers(self) -> list[Optimizer]:
        """The optimizers themselves, inside what accelerate makes of them."""
        inner = (getattr(each, "optimizer", each) for each in self.accelerator._optimizers)
        return [o for o in inner if isinstance(o, Optimizer)]

    def _learned(self) -> None:
        """A loop may call parts of a model past its forward: what has gradients trains, and is looked at before a step."""
        for started in self._started:
            if started.begun:
                continue
            if any(p.grad is not None for p in started.model.parameters()):
                self._begin(started, buffers=False)
            elif started.idle:
                refuse_swapped(started.model, self._unloaded())

    def _unloaded(self) -> list[nn.Module]:
        """The prepared models that no warm start was for."""
        return [m for m in self.accelerator._models if not any(shares(m, s.model) for s in self._started)]

    def _begin(self, started: Started, *, buffers: bool = True) -> None:
        accelerator = self.accelerator
        with failing_on_all("start of training"):
            refuse_meta(started.model)
            refuse_mixed_up(accelerator)
        optimizers = started.trained_by(self._optimizers(), accelerator._models)
        first = started.begin(optimizers, _bears_unused(started.module), buffers=buffers)
        if first and started.log and accelerator.is_main_process:
            self._tell(started)

    def _tell(self, started: Started) -> None:
        report, accelerator = started.report, self.accelerator
        report.show()
        if isinstance(report, AbsentReport):
            return
        log_report(report, accelerator.trackers)
        if accelerator.project_dir is not None:
            suffix = f"-{started.key[11:-1].replace('/', '_')}" if len(self._started) > 1 else ""
            folder = Path(accelerator.project_dir)
            try:
                _update(folder / f"warmstart{suffix}.json", report.to_dict())
                save_page(report, folder / f"warmstart{suffix}.html")
            except OSError as error:
                warnings.warn(f"warmstart: the report could not be written: {error}", UserWarning, stacklevel=2)

    def _save(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        accelerator = self.accelerator
        for started in self._started:
            started.check()  # by each process for itself: some loops save on one process only
        each_node = accelerator.project_configuration.save_on_each_node
        if self._started and (accelerator.is_local_main_process if each_node else accelerator.is_main_process):
            prepared = [s for s in self._started if s.module is not None]
            _update(Path(folder, MANIFEST), {started.key: started.state() for started in prepared})

    def _load(self, models: list[nn.Module], folder: str) -> None:
        with raised_on_all():
            found = _read(Path(folder, MANIFEST))
        prepared = [started for started in self._started if started.module is not None]
        known = {started.key for started in prepared}
        for started in self._started:
            if started.key not in known and (started.key in found or not self.accelerator._models):
                refuse_state_before_prepare(started.model)
        for started in prepared:
            started.restore(found.get(started.key))
            self._await(started)

    def _newest(self, key: str) -> dict[str, Any] | None:
        """What this warm start left in the newest state below the project's folder."""
        project = self.accelerator.project_dir
        if project is None:
            return None
        with raised_on_all():
            paths = [p for pattern in ("", "*/", "*/*/") for p in Path(project).glob(pattern + MANIFEST)]
            for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
                if key in (found := _read(path)):
                    return dict(found[key])
        return None

    def _free(self, *_: object) -> None:
        self._started = [s for s in self._started if s.module is not None]  # the others will not train any more

    def _end(self) -> None:
        for started in self._started:
            started.end()


def _bears_unused(module: nn.Module | None) -> bool:
    wrappers: Iterable[nn.Module] = module.modules() if module is not None else ()
    return all(m.find_unused_parameters for m in wrappers if isinstance(m, DistributedDataParallel))


def _refuse_same_key(started: Started, others: Iterable[Started]) -> None:
    """Refuse a name in saved states that another has; what is never prepared is in none.

    Raises:
        MappingError: Another has it.
    """
    if any(other.key == started.key for other in others):
        raise MappingError(
            f"two warm starts of one accelerator are both {started.key} in what it saves; tell them apart: name="
        )


def _read(path: Path) -> dict[str, Any]:
    """What warm starts left in a saved state; nothing if they left none.

    Raises:
        CheckpointError: It is not what they write.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not what a warm start writes ({error}); delete it to go on without"
        ) from error


def _update(path: Path, entries: dict[str, Any]) -> None:
    """Write entries beside those that are there: a state and a report may share a folder."""
    try:
        found = _read(path)
    except CheckpointError:
        found = {}
    write_whole(path, json.dumps(found | entries, indent=1) + "\n")
