"""A report in whatever trackers an accelerator has, through their own methods."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from warmstart import Report
from warmstart.mapping.plan.table import rows
from warmstart.rendering.figure import pixels


def log_report(report: Report, trackers: Sequence[GeneralTracker]) -> None:
    """Scalars to every tracker; table, lineage and picture to those that take them. The main process calls it."""
    for tracker in trackers:
        for write in (_scalars, *_WRITERS.get(tracker.name, ())):
            try:
                write(tracker, report)
            except Exception as error:  # a tracker that fails costs its entry, not the run
                warnings.warn(f"warmstart: {tracker.name} did not take the report: {error}", UserWarning, stacklevel=2)


def save_page(report: Report, path: Path) -> None:
    """The report as a page, where jinja2 is installed."""
    if find_spec("jinja2") is not None:
        report.to_html(path)


def summary(report: Report) -> dict[str, Any]:
    """The lineage in short: for a run's configuration."""
    sources: Sequence[dict[str, Any]] = report.lineage.get("sources", ())
    return {
        "warmstart/source": ", ".join(source["location"] for source in sources),
        "warmstart/header_sha256": ", ".join(source["header_sha256"] for source in sources),
        "warmstart/plan_sha256": report.lineage.get("plan_sha256"),
        "warmstart/coverage": report.coverage,
    }


def _scalars(tracker: Any, report: Report) -> None:
    tracker.log(report.metrics())


_COLUMNS = ["status", "entries", "tensors", "shape", "source"]


def _table(report: Report) -> list[list[Any]]:
    return [[row.status, row.target, row.count, row.shape, row.source] for row in rows(report.plan)]


def _bullets(report: Report) -> str:
    return "\n".join(f"- {name.removeprefix('warmstart/')}: `{value}`" for name, value in summary(report).items())


def _text(tracker: Any, report: Report) -> None:
    tracker.log({"warmstart/report": report.to_markdown(), "warmstart/lineage": _bullets(report)})


def _configuration(tracker: Any, report: Report) -> None:
    tracker.store_init_configuration(summary(report))


def _log_table(tracker: Any, report: Report) -> None:
    tracker.log_table("warmstart/report", columns=_COLUMNS, data=_table(report))


def _picture(tracker: Any, report: Report, **options: Any) -> None:
    if find_spec("matplotlib") is not None:
        picture = pixels(report.figure())[None]
        tracker.log_images({"warmstart/coverage_map": picture}, **options)  # in W&B a scalar's name is taken


def _artifacts(tracker: Any, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report.to_json(Path(folder, "report.json"))
        Path(folder, "report.md").write_text(report.to_markdown(), encoding="utf-8")
        tracker.log_artifacts(folder, "warmstart")
    if find_spec("matplotlib") is not None:
        tracker.log_figure(report.figure(), "warmstart/coverage.png")


def _comet(tracker: Any, report: Report) -> None:
    tracker.tracker.log_text(report.to_markdown())


# What is not here gets the scalars: the configuration of some is replaced as a whole by what is stored in it.
# TensorBoard's `store_init_configuration` would make a run of its own beside the run.
_WRITERS: dict[str, Sequence[Callable[[Any, Report], None]]] = {
    "tensorboard": (_text, lambda tracker, report: _picture(tracker, report, dataformats="NHWC")),
    "wandb": (_configuration, _log_table, _picture),
    "mlflow": (_configuration, _artifacts),
    "comet_ml": (_configuration, _comet),
    "clearml": (_configuration, _log_table),
}
