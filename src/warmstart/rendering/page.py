"""A plan, or a report, as one HTML file that needs no network: verdict, map of the model, tables, rules, lineage."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from warmstart.lineage import lineage
from warmstart.mapping.buckets import Problem
from warmstart.mapping.grouping import printable
from warmstart.mapping.plan.plan import Plan
from warmstart.outcome import Outcome
from warmstart.rendering.files import write_whole
from warmstart.rendering.records import Entry, Unused, entries, unused
from warmstart.rendering.replaying import Replay
from warmstart.rendering.statuses import STATUSES
from warmstart.rendering.text import percent, verdict
from warmstart.version import __version__

_COMPARED = {"full": "every element", "sample": "a sample", "off": "nothing"}
_PER_KIND = 25  # problems of one kind that are spelled out
_PASTE = re.compile(r"[a-z_0-9]+=[\[{\"'r(].*[\]})\"']")


@dataclass(frozen=True, slots=True)
class Fix:
    """A problem in its parts: what is wrong, what can be done, the line to type for it, and what was said after that."""

    kind: str
    message: str
    advice: str
    code: str
    more: str


def page(plan: Plan, outcome: Outcome | None = None) -> str:
    """The page as text.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_html needs jinja2. Install it with: pip install 'warmstart[html]'", name=error.name
        ) from error
    environment = Environment(
        loader=PackageLoader("warmstart.rendering"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["printable"] = lambda value: printable(str(value), 2000)
    replays = [Replay(plan, number) for number in range(len(plan.parts))]
    records, left = entries(plan, outcome, replays), unused(plan, replays)
    style = f"{_colours()}\n{_asset('report.css')}"
    script = _asset("report.js")
    return environment.get_template("report.html").render(
        title=f"{', '.join(part.pretrained.short_label for part in plan.parts)} into {plan.model_name}",
        state=_state(plan, outcome),
        sentence=_sentence(plan, outcome),
        figures=_figures(plan, outcome, records),
        fixes=_fixes(plan.errors),
        more_fixes=sum(max(0, n - _PER_KIND) for n in Counter(p.kind for p in plan.errors).values()),
        statuses=STATUSES,
        counts=Counter(entry.status for entry in records),
        sources=[(part, replay.rules()) for part, replay in zip(plan.parts, replays, strict=True)],
        left=left,
        notes=outcome.notes if outcome else plan.notes,
        lineage=outcome.lineage if outcome else lineage(plan, __version__),
        data=_data(plan, records, left),
        style=Markup(style),
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
        version=__version__,
    )


def write_page(path: str | os.PathLike[str], plan: Plan, outcome: Outcome | None = None) -> Path:
    """The page as a file, whole or not at all."""
    return write_whole(path, page(plan, outcome))


def _asset(name: str) -> str:
    return (files("warmstart.rendering") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """As the page's content security policy takes it: nothing but this very text may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _colours() -> str:
    def declared(looks: Iterable[tuple[str, tuple[str, str]]]) -> str:
        return "".join(f"--{_slug(s)}:{fill};--{_slug(s)}-ink:{ink};" for s, (fill, ink) in looks)

    light = declared((s, look.light) for s, look in STATUSES.items())
    dark = declared((s, look.dark) for s, look in STATUSES.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _slug(status: str) -> str:
    return status.replace(" ", "-")


def _state(plan: Plan, outcome: Outcome | None) -> tuple[str, str]:
    """How it ended, as a tone and a word."""
    if plan.errors:
        return "bad", "does not fit"
    if outcome is None:
        return "plain", "planned"
    if outcome.status == "failed":
        return "bad", "failed"
    if outcome.status == "superseded-by-resume":
        return "warn", "superseded by resume"
    return ("warn", "not verified") if outcome.verified == "off" else ("good", "loaded and verified")


def _sentence(plan: Plan, outcome: Outcome | None) -> str:
    if plan.errors:
        return f"{len(plan.errors)} error{'s' * (len(plan.errors) > 1)}, nothing was written"
    if outcome is not None:
        return verdict(outcome).removeprefix("warmstart: ")
    return (
        f"{len(plan.assignments)} tensors, {percent(plan.coverage)} of elements would be loaded; nothing is written yet"
    )


def _figures(plan: Plan, outcome: Outcome | None, records: Sequence[Entry]) -> dict[str, Any]:
    loaded = len(plan.assignments)
    return {
        "loaded": loaded,
        "total": loaded + len(plan.missing) + len(plan.mismatched),
        "coverage": percent(plan.coverage),
        "verified": _COMPARED[outcome.verified] if outcome else None,
        "frozen": sum(entry.frozen for entry in records),
    }


def _fixes(problems: Sequence[Problem]) -> list[Fix]:
    seen: Counter[str] = Counter()
    out = []
    for problem in problems:
        seen[problem.kind] += 1
        if seen[problem.kind] > _PER_KIND:
            continue
        message, _, advice = problem.message.partition("  -> ")
        found = _PASTE.search(advice)
        start, end = found.span() if found else (len(advice), len(advice))
        before, code, after = advice[:start].rstrip(": \n"), advice[start:end], advice[end:].strip()
        out.append(Fix(problem.kind, message.rstrip(), before, code, after))
    return out


def _data(plan: Plan, records: Sequence[Entry], left: Sequence[Unused]) -> dict[str, Any]:
    """Column by column, and each repeated text once, so that 10,000 tensors stay small."""
    texts: dict[str, int] = {}
    shapes: dict[tuple[int, ...], int] = {}

    def text(value: str) -> int:
        return texts.setdefault(value, len(texts))

    def shape(value: tuple[int, ...]) -> int:
        return shapes.setdefault(value, len(shapes))

    order = list(STATUSES)
    model = {
        "name": [printable(e.name) for e in records],
        # 0: the key has the entry's own name.
        "keys": [0 if e.keys == (e.name,) else [printable(key) for key in e.keys] for e in records],
        "source": [text(e.source) for e in records],
        "status": [order.index(e.status) for e in records],
        "shape": [shape(e.shape) for e in records],
        "dtype": [text(e.dtype) for e in records],
        "how": [text(e.how) for e in records],
        "verified": [text(e.verified) for e in records],
        "frozen": [int(e.frozen) for e in records],
    }
    keys = {
        "name": [printable(u.key) for u in left],
        "source": [text(u.source) for u in left],
        "shape": [shape(u.shape) for u in left],
        "dtype": [text(u.dtype) for u in left],
        "why": [text(u.why) for u in left],
        "error": [int(u.error) for u in left],
    }
    return {
        "model": plan.model_name,
        "statuses": order,
        "texts": [printable(value) for value in texts],
        "shapes": [[str(s), math.prod(s)] for s in shapes],
        "several": len(plan.parts) > 1,
        "entries": model,
        "unused": keys,
    }
