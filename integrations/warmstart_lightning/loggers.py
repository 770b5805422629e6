"""A report in whatever loggers a trainer has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn

from warmstart import Report


def log_lineage(loggers: Sequence[Logger], report: Report) -> None:
    """Where the weights come from, among the run's hyperparameters."""
    sources = report.lineage["sources"]
    summary = {
        "source": [source["location"] for source in sources],
        "header_sha256": [source["header_sha256"] for source in sources],
        "plan_sha256": report.lineage["plan_sha256"],
        "coverage": report.coverage,
    }
    for logger in _real(loggers):
        # TensorBoard's would add a metric of its own, hp_metric = -1, to a run that asked for none.
        extra: tuple[dict[str, float], ...] = ({},) if type(logger).__name__ == "TensorBoardLogger" else ()
        _attempt(logger, logger.log_hyperparams, {"warmstart": summary}, *extra)


def log_report(loggers: Sequence[Logger], report: Report, step: int) -> None:
    """Scalars to every logger, the table as text to those that take text."""
    for logger in _real(loggers):
        _attempt(logger, logger.log_metrics, report.metrics(), step)
        write_text = _TEXT.get(type(logger).__name__)
        if write_text is not None:
            _attempt(logger, write_text, logger, report.to_markdown(), step)


def _tensorboard(logger: Any, text: str, step: int) -> None:
    logger.experiment.add_text("warmstart/report", text, step)


def _mlflow(logger: Any, text: str, step: int) -> None:
    logger.experiment.log_text(logger.run_id, text, "warmstart/report.md")


def _wandb(logger: Any, text: str, step: int) -> None:
    logger.log_text(key="warmstart/report", columns=["report"], data=[[text]])


def _comet(logger: Any, text: str, step: int) -> None:
    logger.experiment.log_text(text, step=step)


# By class name, so that no tracker is imported to ask whether it is in use.
_TEXT: dict[str, Callable[[Any, str, int], None]] = {
    "TensorBoardLogger": _tensorboard,
    "MLFlowLogger": _mlflow,
    "WandbLogger": _wandb,
    "CometLogger": _comet,
}


def _real(loggers: Sequence[Logger]) -> list[Logger]:
    return [logger for logger in loggers if not isinstance(logger, DummyLogger)]


def _attempt(logger: Logger, write: Callable[..., object], *args: object) -> None:
    """A tracker that fails costs its entry, not the run."""
    try:
        write(*args)
    except Exception as error:
        rank_zero_warn(f"warmstart: {type(logger).__name__} did not take the report: {error}")
