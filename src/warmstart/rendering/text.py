"""A report as plain text and as Markdown."""

from __future__ import annotations

from warmstart.mapping.grouping import grouped, printable
from warmstart.mapping.plan.table import lines, rows
from warmstart.outcome import Outcome


def verdict(outcome: Outcome) -> str:
    """One line: how much was loaded, whether it was verified, and what keeps its own initialisation."""
    plan = outcome.plan
    loaded, total = len(plan.assignments), len(plan.assignments) + len(plan.missing) + len(plan.mismatched)
    parts = [f"{loaded}/{total} tensors", f"{percent(plan.coverage)} of elements"]
    if outcome.status == "superseded-by-resume":
        parts.append("superseded by the resumed checkpoint")
    elif outcome.status == "failed":
        parts.append("FAILED, do not train")
    elif outcome.verified != "off":
        parts.append("verified" if outcome.verified == "full" else "verified by sample")
    else:
        parts.append("not verified")
    if outcome.frozen is not None:
        parts.append(f"{len(outcome.frozen)} frozen")
    own = [*plan.missing, *plan.mismatched]
    if own:
        groups = [printable(g.template) for g in grouped((name, 0) for name in own)]
        more = f", ... {len(groups) - 3} more" if len(groups) > 3 else ""
        parts.append(f"{len(own)} keep their own init ({', '.join(groups[:3])}{more})")
    source = ", ".join(printable(part.pretrained.short_label) for part in plan.parts)
    return f"warmstart: {', '.join(parts)} <- {source} [{outcome.seconds:.2f} s]"


def text(outcome: Outcome, limit: int = 40) -> str:
    """Verdict, grouped table and notes, at most `limit` lines of table."""
    out = [verdict(outcome), *(f"  {line}" for line in lines(outcome.plan, limit))]
    return "\n".join(out + [f"  note: {note}" for note in outcome.notes])


def markdown(outcome: Outcome, limit: int = 200) -> str:
    """The same for trackers that show Markdown."""
    table = rows(outcome.plan)
    out = [
        f"**{_cell(verdict(outcome))}**",
        "",
        "| status | entries | tensors | shape | source |",
        "|---|---|---|---|---|",
    ]
    for row in table[:limit]:
        cells = (row.status, _code(row.target), str(row.count), _cell(row.shape), _cell(row.source))
        out.append(f"| {' | '.join(cells)} |")
    if len(table) > limit:
        out.append(f"| ... | {len(table) - limit} more groups | | | |")
    return "\n".join([*out, "", *(f"- {_cell(note)}" for note in outcome.notes)])


def percent(share: float) -> str:
    # Never rounded up to 100 %.
    return "100 %" if share == 1 else f"{min(int(share * 10000) / 100, 99.99):.2f} %"


_ESCAPED = {c: f"\\{c}" for c in "\\`*_{}[]()#+!|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " "}


def _cell(value: str) -> str:
    return "".join(_ESCAPED.get(c, c) for c in value)


def _code(value: str) -> str:
    """Inline code: only what ends it, or the table cell, has to go."""
    return "`" + value.replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"
