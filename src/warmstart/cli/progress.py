"""A progress bar on stderr, where there is a terminal and rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from warmstart.mapping.grouping import printable


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes; the block calls what it is given with the number of bytes done since."""
    bar = None
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        except ModuleNotFoundError:
            pass
        else:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TimeRemainingColumn(),
            )
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
    if bar is None:
        yield lambda done: None
        return
    with bar:
        task = bar.add_task(printable(what), total=total)
        yield lambda done: bar.advance(task, done)
