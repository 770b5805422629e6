"""What a run reports that loads nothing: its source is gone, or the model was loaded before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from warmstart import Checkpoint, Pretrained, Report, api
from warmstart.checkpoints.base import Index
from warmstart.freezing import Frozen
from warmstart.loading.writing import Written
from warmstart.outcome import Status


class _Nothing(Checkpoint):
    """What there is of a source that is not there."""

    def __init__(self, label: str) -> None:
        super().__init__(location=label, format="nothing", infos={})

    @override
    def _read(self, key: str, index: Index | None) -> Tensor:
        raise KeyError(key)


class AbsentReport(Report):
    """Stands in for the report of a load that did not take place; it has what is frozen, and nothing to compare with."""

    def __init__(self, model: nn.Module, parts: Sequence[Pretrained], frozen: Frozen | None, status: Status) -> None:
        nothing = [Pretrained(_Nothing(part.short_label), into=part.into, allow_missing="?*") for part in parts]
        super().__init__(api.plan(model, nothing), Written("off"), {}, frozen)
        self.status = status
        self.notes = []
        self._sources = ", ".join(part.short_label for part in parts)

    @override
    def verdict(self) -> str:
        frozen = f", {len(self.frozen)} frozen" if self.frozen is not None else ""
        if self.status == "already-applied":
            return f"warmstart: {self._sources} was loaded into this model before{frozen}"
        rest = "has" if self.status == "superseded-by-resume" else "must have"
        return f"warmstart: {self._sources} is gone; the state that is loaded {rest} the weights{frozen}"

    @override
    def __str__(self) -> str:
        return self.verdict()

    @override
    def show(self) -> None:
        print(self.verdict())

    @override
    def to_markdown(self) -> str:
        return self.verdict()
