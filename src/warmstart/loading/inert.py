"""Adapters that were loaded and do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmstart.loading.meeting import Ranks
from warmstart.mapping.grouping import printable
from warmstart.mapping.plan.plan import Plan
from warmstart.shards import local_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LAST = ("lora_B", "lora_embedding_B")  # zero when LoRA is made, so that it starts as the base


def inert_adapters(plan: Plan, group: ProcessGroup | None = None) -> list[str]:
    """Notes on the LoRA adapters that a plan loaded and that change nothing: every last factor of theirs is zero.

    The ranks of `group` that hold shards of them find it out together.
    """
    effect: dict[str, bool] = {}
    for assignment in plan.assignments:
        target = plan.targets.entries[assignment.target]
        if target.adapter is not None and target.adapter.slot in _LAST:
            name = target.adapter.adapter
            effect[name] = effect.get(name, False) or bool(local_of(target.tensor).detach().any())
    if effect and (ranks := Ranks.of(group)) is not None:
        effect = ranks.meet("load", effect, _anywhere)
    return [
        f"adapter '{printable(name)}' has no effect: every lora_B of it is zero, as if it had never been trained"
        for name, has_effect in effect.items()
        if not has_effect
    ]


def _anywhere(words: list[dict[str, bool]]) -> dict[str, bool]:
    return {name: any(word[name] for word in words) for name in words[0]}
