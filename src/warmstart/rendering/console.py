"""A report on a terminal: the plain text in colour, with a bar of the model's elements, where rich is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TextIO

from warmstart.mapping.plan.table import lines, rows
from warmstart.outcome import Outcome
from warmstart.rendering.records import elements, entries
from warmstart.rendering.replaying import Replay
from warmstart.rendering.statuses import STATUSES, Status
from warmstart.rendering.text import text, verdict

_BAR = 60
_LIMIT = 38  # rows: with the verdict and the bar, 40 lines


def coloured(file: TextIO | None = None) -> bool:
    """Whether `show` writes in colour: rich is installed, and the file (standard output) is a terminal."""
    return find_spec("rich") is not None and (file or sys.stdout).isatty()


def show(outcome: Outcome, file: TextIO | None = None) -> None:
    """Print a report: in colour where that can be, else as plain text. No name is cut; the terminal wraps it."""
    if not coloured(file):
        print(text(outcome), file=file)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False)

    def line(text: Text) -> None:
        console.print(text, soft_wrap=True)

    plan = outcome.plan
    good = outcome.status in ("applied", "already-applied") and outcome.verified != "off"
    line(Text(verdict(outcome), style="bold green" if good else "bold yellow"))
    shares = elements(entries(plan, outcome, [Replay(plan, number) for number in range(len(plan.parts))]))
    bar = Text("  ")
    for status, width in _widths(shares).items():
        bar.append(("=" if console.options.ascii_only else "━") * width, style=STATUSES[status].terminal)
    line(bar)
    table = rows(plan)
    for number, words in enumerate(lines(plan, _LIMIT)):
        shown = Text(f"  {words}")
        if number < len(table) and words.startswith(table[number].status):
            word = table[number].status
            look = next((look for name, look in STATUSES.items() if word.startswith(name)), None)
            shown.stylize(look.terminal if look else "dim", 2, 2 + len(word))
        line(shown)
    for note in outcome.notes:
        line(Text(f"  note: {note}", style="dim"))


def _widths(shares: dict[Status, int]) -> dict[Status, int]:
    """Characters of the bar for each status that has elements: at least one, and `_BAR` in all."""
    present = {status: count for status, count in shares.items() if count}
    total = sum(present.values())
    widths = {status: max(1, round(count / total * _BAR)) for status, count in present.items()}
    if widths:
        widest = max(widths, key=lambda status: widths[status])
        widths[widest] += _BAR - sum(widths.values())
    return widths
