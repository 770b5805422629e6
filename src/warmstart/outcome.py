"""What became of a plan: the facts that a report tells and its pictures show."""

from __future__ import annotations

from typing import Any, Literal

from warmstart.freezing import Frozen
from warmstart.loading.writing import Written
from warmstart.mapping.plan.plan import Plan, Verify

Status = Literal["pending", "applied", "failed", "superseded-by-resume", "already-applied"]


class Outcome:
    """The facts.

    Attributes:
        plan: The plan that was carried out.
        status: `applied` after writing; a host sets `superseded-by-resume` when a resumed checkpoint took over.
        verified: How values were compared after writing: `full`, `sample` or `off`.
        bytes_read: Bytes of tensors read from the sources.
        seconds: Wall-clock seconds of preflight, writing and verification.
        lineage: Where the values come from, as plain JSON types.
        frozen: What is frozen, or None.
        notes: What a reader should know although it is no error.
    """

    def __init__(self, plan: Plan, written: Written, lineage: dict[str, Any], frozen: Frozen | None) -> None:
        self.plan = plan
        self.status: Status = "applied"
        self.verified: Verify = written.verified
        self.bytes_read = written.bytes_read
        self.seconds = written.seconds
        self.lineage = lineage
        self.frozen = frozen
        self.notes = [*plan.notes, *written.notes]
        self._digests = written.digests
