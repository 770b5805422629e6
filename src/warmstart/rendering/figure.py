"""One picture of a plan: what became of each module, for trackers that show images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from warmstart.mapping.grouping import printable
from warmstart.mapping.plan.plan import Plan
from warmstart.outcome import Outcome
from warmstart.rendering.records import Entry, entries
from warmstart.rendering.replaying import Replay
from warmstart.rendering.statuses import STATUSES, Status
from warmstart.rendering.text import percent

_ROWS = 22
_WIDTH = 44  # characters of a module's name; the page and the text have it whole


@dataclass(slots=True)
class _Module:
    path: str
    elements: Counter[Status] = field(default_factory=Counter)
    children: dict[str, _Module] = field(default_factory=dict)
    tensors: int = 0
    frozen: int = 0

    @property
    def size(self) -> int:
        return sum(self.elements.values())

    def add(self, entry: Entry) -> None:
        self.elements[entry.status] += entry.numel
        self.tensors += 1
        self.frozen += entry.frozen


def figure(plan: Plan, outcome: Outcome | None = None) -> Any:
    """Each module's elements by what became of them, as a `matplotlib.figure.Figure` that no backend shows by itself.

    The largest modules are split into theirs until about 20 rows are there, in the model's order.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figure() needs matplotlib. Install it with: pip install 'warmstart[plot]'", name=error.name
        ) from error
    records = entries(plan, outcome, [Replay(plan, number) for number in range(len(plan.parts))])
    rows = _split(_tree(records))
    drawn = Figure(figsize=(9.6, 1.7 + 0.3 * len(rows)), dpi=110, layout="constrained")
    axes = drawn.subplots()
    present = [status for status in STATUSES if any(row.elements[status] for row in rows)]
    for status in present:
        left = [sum(_share(row, s) for s in present[: present.index(status)]) for row in rows]
        axes.barh(
            range(len(rows)),
            [_share(row, status) for row in rows],
            left=left,
            height=0.78,
            color=STATUSES[status].light[0],
            edgecolor=(0, 0, 0, 0.4),  # of the hatch
            linewidth=0,
            hatch=STATUSES[status].hatch,
            label=status,
        )
    for at, row in enumerate(rows):
        frozen = (
            ", frozen" if row.frozen == row.tensors else f", {row.frozen} of {row.tensors} frozen" if row.frozen else ""
        )
        axes.text(1.01, at, f"{_short(row.size)}{frozen}", va="center", fontsize=8, color="#515b68", parse_math=False)
    axes.set_yticks(
        range(len(rows)), [_label(row.path) for row in rows], fontsize=8, family="monospace", parse_math=False
    )
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels(["0", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
    axes.set_xlabel("share of each module's elements", fontsize=8, color="#515b68")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    sources = ", ".join(part.pretrained.short_label for part in plan.parts)
    title = (
        f"{_label(sources)} into {_label(plan.model_name)}\n{percent(plan.coverage)} of the elements in scope loaded"
    )
    drawn.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", parse_math=False)
    if present:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(STATUSES), frameon=False, fontsize=8, borderaxespad=0.2,
            handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
    return drawn


def pixels(drawn: Any) -> np.ndarray:
    """A `matplotlib.figure.Figure` as an array of shape (height, width, 3), uint8, for trackers that take no figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _tree(records: Iterable[Entry]) -> _Module:
    root = _Module("")
    for entry in records:
        at = root
        at.add(entry)
        path = ""
        for segment in entry.name.split("."):
            path = f"{path}.{segment}" if path else segment
            at = at.children.setdefault(segment, _Module(path))
            at.add(entry)
    return root


def _split(root: _Module) -> list[_Module]:
    rows = list(root.children.values()) or [root]
    # A single tensor is no module: it is a row only where it stands beside modules.
    while inner := [row for row in rows if any(child.children for child in row.children.values())]:
        widest = max(inner, key=lambda row: row.size)
        alike = [row for row in inner if _numbered(row.path) == _numbered(widest.path)]  # layers are split all or none
        if len(rows) - len(alike) + sum(len(row.children) for row in alike) > _ROWS:
            break
        chosen = set(map(id, alike))
        rows = [each for row in rows for each in (row.children.values() if id(row) in chosen else [row])]
    if len(rows) > _ROWS:
        rest = sorted(rows, key=lambda row: row.size)[: len(rows) - _ROWS + 1]
        merged = _Module(f"... {len(rest):,} more")
        for row in rest:
            merged.elements += row.elements
            merged.tensors += row.tensors
            merged.frozen += row.frozen
        left_out = set(map(id, rest))
        rows = [*(row for row in rows if id(row) not in left_out), merged]
    return rows


def _numbered(path: str) -> str:
    """`layer.#` for `layer.3`; the path itself where it does not end in a number."""
    head, _, last = path.rpartition(".")
    return f"{head}.#" if last.isdecimal() else path


def _share(row: _Module, status: Status) -> float:
    return row.elements[status] / row.size if row.size else 0.0


def _label(text: str) -> str:
    """The end of a name says most. What matplotlib's own fonts may lack is escaped."""
    shown = printable(text).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= _WIDTH else f"...{shown[3 - _WIDTH :]}"


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
