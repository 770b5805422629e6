"""A report on the terminal, in the run's folder, and in whatever loggers a trainer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from warmstart import Report
from warmstart.rendering.console import coloured
from warmstart.rendering.figure import pixels


def tell(report: Report) -> None:
    """In colour on a terminal; elsewhere through Lightning's own log, as plain text."""
    if coloured():
        report.show()
    else:
        rank_zero_info(str(report))


def save_report(folder: Path, stem: str, report: Report) -> None:
    """The report as JSON, and where jinja2 is installed as a page; a folder that takes no file costs a warning."""
    try:
        report.to_json(folder / f"{stem}.json")
        if find_spec("jinja2") is not None:
            report.to_html(folder / f"{stem}.html")
    except OSError as error:
        rank_zero_warn(f"warmstart: the report could not be written to {folder}: {error}")


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
    """Scalars to every logger, the table and, with matplotlib installed, the picture to those that take text and images."""
    writers = (_TEXT, _FIGURE) if find_spec("matplotlib") is not None else (_TEXT,)
    for logger in _real(loggers):
        _attempt(logger, logger.log_metrics, report.metrics(), step)
        for by_name in writers:
            if (write := by_name.get(type(logger).__name__)) is not None:
                _attempt(logger, write, logger, report, step)


def log_drift(loggers: Sequence[Logger], drift: Mapping[str, float], step: int) -> None:
    """How far each module has moved from its pretrained values; every `Logger` writes on one rank only."""
    for logger in _real(loggers) if drift else ():
        _attempt(
            logger, logger.log_metrics, {f"warmstart/drift/{path or 'model'}": d for path, d in drift.items()}, step
        )


_Writer = Callable[[Any, Report, int], object]

# By class name, so that no tracker is imported to ask whether it is in use.
_TEXT: dict[str, _Writer] = {
    "TensorBoardLogger": lambda to, report, step: to.experiment.add_text(
        "warmstart/report", report.to_markdown(), step
    ),
    "MLFlowLogger": lambda to, report, step: to.experiment.log_text(
        to.run_id, report.to_markdown(), "warmstart/report.md"
    ),
    "WandbLogger": lambda to, report, step: to.log_text(
        key="warmstart/report", columns=["report"], data=[[report.to_markdown()]]
    ),
    "CometLogger": lambda to, report, step: to.experiment.log_text(report.to_markdown(), step=step),
}
_FIGURE: dict[str, _Writer] = {
    "TensorBoardLogger": lambda to, report, step: to.experiment.add_figure("warmstart/coverage", report.figure(), step),
    "MLFlowLogger": lambda to, report, step: to.experiment.log_figure(
        to.run_id, report.figure(), "warmstart/coverage.png"
    ),
    "WandbLogger": lambda to, report, step: to.log_image(
        key="warmstart/coverage_map", images=[pixels(report.figure())]
    ),
    "CometLogger": lambda to, report, step: to.experiment.log_figure("warmstart/coverage", report.figure(), step=step),
}


def _real(loggers: Sequence[Logger]) -> list[Logger]:
    return [logger for logger in loggers if not isinstance(logger, DummyLogger)]


def _attempt(logger: Logger, write: Callable[..., object], *args: object) -> None:
    """A tracker that fails costs its entry, not the run."""
    try:
        write(*args)
    except Exception as error:
        rank_zero_warn(f"warmstart: {type(logger).__name__} did not take the report: {error}")
