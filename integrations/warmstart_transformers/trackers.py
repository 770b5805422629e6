"""A report in the run's folder, and in whatever trackers `report_to` made active."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments

from warmstart import Report
from warmstart.rendering.figure import pixels


def save_report(folder: Path, stem: str, report: Report) -> None:
    """The report as JSON, and where jinja2 is installed as a page; a folder that takes no file costs a warning."""
    try:
        report.to_json(folder / f"{stem}.json")
        if find_spec("jinja2") is not None:
            report.to_html(folder / f"{stem}.html")
    except OSError as error:
        warnings.warn(f"warmstart: the report could not be written to {folder}: {error}", UserWarning, stacklevel=2)


def log_report(report: Report, args: TrainingArguments, state: TrainerState, trainer: Trainer | None) -> None:
    """Scalars to every tracker; table, lineage and, with matplotlib, the picture to those that take them; each rank calls it.

    Without a trainer there is no way to its trackers but their own: TensorBoard gets a run of its own beside the run's,
    MLflow and W&B have one that is active. With one, the scalars go where its own go, whatever the tracker.
    """
    scalars = report.metrics()
    if trainer is not None and args.report_to:
        trainer.log(dict(scalars))  # it adds to what it is given
        scalars = {}
    if not state.is_world_process_zero:
        return
    for name, write in _TRACKERS.items():
        if name in (args.report_to or ()):
            try:
                write(report, scalars, args, state, trainer)
            except Exception as error:  # a tracker that fails costs its entry, not the run
                warnings.warn(f"warmstart: {name} did not take the report: {error}", UserWarning, stacklevel=2)


def _draws() -> bool:
    return find_spec("matplotlib") is not None


def summary(report: Report) -> dict[str, Any]:
    """The lineage in short: for a run's configuration."""
    sources: Sequence[dict[str, Any]] = report.lineage["sources"]
    return {
        "source": ", ".join(source["location"] for source in sources),
        "header_sha256": ", ".join(source["header_sha256"] for source in sources),
        "plan_sha256": report.lineage["plan_sha256"],
        "coverage": report.coverage,
    }


def _tensorboard(
    report: Report, scalars: dict[str, float], args: TrainingArguments, state: TrainerState, trainer: Trainer | None
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    callbacks = trainer.callback_handler.callbacks if trainer is not None else []
    theirs = next((w for c in callbacks if (w := getattr(c, "tb_writer", None)) is not None), None)
    folder = os.getenv("TENSORBOARD_LOGGING_DIR") or os.path.join(str(args.output_dir), "runs")
    writer = theirs or SummaryWriter(os.path.join(folder, "warmstart"))
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, state.global_step)
    writer.add_text("warmstart/report", report.to_markdown(), state.global_step)
    writer.add_text("warmstart/lineage", "\n".join(f"- {k}: `{v}`" for k, v in summary(report).items()))
    if _draws():
        writer.add_figure("warmstart/coverage", report.figure(), state.global_step)
    writer.flush() if theirs else writer.close()


def _mlflow(
    report: Report, scalars: dict[str, float], args: TrainingArguments, state: TrainerState, trainer: Trainer | None
) -> None:
    mlflow: Any = sys.modules.get("mlflow")
    if mlflow is None or mlflow.active_run() is None:
        return
    # transformers logs by another thread, and MLflow refuses to read a run of which a file is half written.
    if hasattr(mlflow, "flush_async_logging"):
        mlflow.flush_async_logging()
    mlflow.log_metrics(scalars, step=state.global_step)
    mlflow.log_params({f"warmstart.{name}": str(value)[:250] for name, value in summary(report).items()})
    mlflow.log_text(report.to_markdown(), "warmstart/report.md")
    mlflow.log_dict(report.lineage, "warmstart/lineage.json")
    if _draws():
        mlflow.log_figure(report.figure(), "warmstart/coverage.png")


def _wandb(
    report: Report, scalars: dict[str, float], args: TrainingArguments, state: TrainerState, trainer: Trainer | None
) -> None:
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    wandb.run.config.update({"warmstart": summary(report)}, allow_val_change=True)
    table = wandb.Table(columns=["report"], data=[[report.to_markdown()]])
    picture = {"warmstart/coverage_map": wandb.Image(pixels(report.figure()))} if _draws() else {}
    wandb.run.log({**scalars, **picture, "warmstart/report": table, "train/global_step": state.global_step})


# The three have a run that is found without the trainer; what else `report_to` knows gets the scalars through it.
_TRACKERS: dict[str, Callable[[Report, dict[str, float], TrainingArguments, TrainerState, Trainer | None], None]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
