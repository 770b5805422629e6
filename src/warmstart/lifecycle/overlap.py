"""Two warm starts of one run must not write the same entries."""

from __future__ import annotations

from collections.abc import Sequence

from warmstart.errors import MappingError
from warmstart.mapping.grouping import listed
from warmstart.mapping.plan.plan import Plan
from warmstart.report import Report


def refuse_overlap(plan: Plan, beside: Sequence[Report | None]) -> None:
    """Refuse a plan that writes what another warm start wrote into the same model.

    Raises:
        MappingError: It does; both are named.
    """
    mine = {id(plan.targets.entries[a.target].tensor): a.target for a in plan.assignments}
    for report in beside:
        if report is None or report.plan.model is not plan.model:
            continue
        theirs = report.plan
        both = [
            mine[id(t.tensor)] for a in theirs.assignments if id((t := theirs.targets.entries[a.target]).tensor) in mine
        ]
        if both:
            raise MappingError(
                f"two warm starts write {len(both)} of the same entries: {theirs.parts[0].pretrained.label} and "
                f"{plan.parts[0].pretrained.label}\n{listed((name, '') for name in both)}\n"
                "  -> give each its own part of the model with into=, include= or exclude=",
                plan=plan,
            )
