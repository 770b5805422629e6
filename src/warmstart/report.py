"""The report: the plan, and what became of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from warmstart.loading.verifying import Difference, differences, raise_differences
from warmstart.mapping.buckets import Assignment, Mismatch
from warmstart.mapping.plan.plan import Verify
from warmstart.outcome import Outcome
from warmstart.rendering import text as rendering
from warmstart.rendering.files import write_whole


class Report(Outcome):
    """What was loaded from where, how it was verified, and what is frozen. `print(report)` starts with the verdict."""

    # The plan's own answers, so that a report can be asked whatever a plan can.
    @property
    def assignments(self) -> tuple[Assignment, ...]:
        return self.plan.assignments

    @property
    def mapping(self) -> dict[str, tuple[str, ...]]:
        return self.plan.mapping

    @property
    def missing(self) -> tuple[str, ...]:
        return self.plan.missing

    @property
    def unexpected(self) -> tuple[Any, ...]:
        return self.plan.unexpected

    @property
    def excluded(self) -> tuple[str, ...]:
        return self.plan.excluded

    @property
    def ignored(self) -> tuple[Any, ...]:
        return self.plan.ignored

    @property
    def mismatched(self) -> Mapping[str, Mismatch]:
        return self.plan.mismatched

    @property
    def coverage(self) -> float:
        return self.plan.coverage

    @property
    def prefix(self) -> tuple[str, str] | None:
        return self.plan.prefix

    def differences(self, model: nn.Module, verify: Verify = "full", *, buffers: bool = True) -> list[Difference]:
        """The entries of `model` that do not hold their planned value now; parameters alone without `buffers`.

        Raises:
            CheckpointError: A source cannot be read any more.
        """
        return differences(self.plan, model, self._digests, verify, buffers)

    def check(self, model: nn.Module, *, verify: Verify = "full", when: str = "now") -> None:
        """Compare the model with the plan by reading the source once more.

        Raises:
            VerificationError: An entry holds another value, is gone, or lost its tie.
            CheckpointError: A source cannot be read any more.
        """
        raise_differences(self.differences(model, verify), when)

    def metrics(self) -> dict[str, float]:
        """Flat scalars for a logger, all under `warmstart/`."""
        plan = self.plan
        return {
            "warmstart/coverage": plan.coverage,
            "warmstart/loaded_tensors": float(len(plan.assignments)),
            "warmstart/own_init_tensors": float(len(plan.missing) + len(plan.mismatched)),
            "warmstart/unused_keys": float(len(plan.unexpected)),
            "warmstart/frozen_tensors": float(len(self.frozen) if self.frozen else 0),
            "warmstart/superseded": float(self.status == "superseded-by-resume"),
            "warmstart/bytes_read": float(self.bytes_read),
            "warmstart/seconds": self.seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plan and outcome as plain JSON types."""
        return {
            "verdict": rendering.verdict(self),
            "status": self.status,
            "verified": self.verified,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "frozen": list(self.frozen.names) if self.frozen else [],
            "lineage": self.lineage,
            "plan": self.plan.to_dict() | {"notes": list(self.notes)},
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_dict()` to a file, whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page that needs no network: verdict, map of the model, tables, rules and lineage.

        Raises:
            ModuleNotFoundError: jinja2 is not installed.
        """
        from warmstart.rendering.page import write_page

        return write_page(path, self.plan, self)

    def figure(self) -> Any:
        """Coverage per module as one picture, a `matplotlib.figure.Figure`, for trackers that show images.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from warmstart.rendering.figure import figure

        return figure(self.plan, self)

    def show(self) -> None:
        """Print the report: in colour where rich is installed and standard output is a terminal, else as plain text."""
        from warmstart.rendering.console import show

        show(self)

    def to_markdown(self) -> str:
        """Verdict, grouped table and notes, for trackers that show Markdown."""
        return rendering.markdown(self)

    def verdict(self) -> str:
        """The one line that says it all."""
        return rendering.verdict(self)

    def __str__(self) -> str:
        return rendering.text(self)

    def __repr__(self) -> str:
        return f"<Report {self.status}: {self.verdict()}>"
