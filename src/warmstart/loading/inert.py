"""Adapters that were loaded and do nothing."""

from __future__ import annotations

from warmstart.mapping.grouping import printable
from warmstart.mapping.plan.plan import Plan

_LAST = ("lora_B", "lora_embedding_B")  # zero when LoRA is made, so that it starts as the base


def inert_adapters(plan: Plan) -> list[str]:
    """Notes on the LoRA adapters that a plan loaded and that change nothing: every last factor of theirs is zero."""
    effect: dict[str, bool] = {}
    for assignment in plan.assignments:
        target = plan.targets.entries[assignment.target]
        if target.adapter is not None and target.adapter.slot in _LAST:
            name = target.adapter.adapter
            effect[name] = effect.get(name, False) or bool(target.tensor.detach().any())
    return [
        f"adapter '{printable(name)}' has no effect: every lora_B of it is zero, as if it had never been trained"
        for name, has_effect in effect.items()
        if not has_effect
    ]
