"""Parameter groups for an optimizer: what was loaded trains slower than what is new, the first layers slowest."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from warmstart.errors import MappingError
from warmstart.layers import layers_above
from warmstart.mapping.hints import did_you_mean
from warmstart.mapping.model.names import without_wrappers, wrapped_child
from warmstart.mapping.plan.plan import Plan
from warmstart.outcome import Outcome
from warmstart.patterns import Patterns, PatternSet


def param_groups(
    model: nn.Module,
    plan_or_report: Plan[Any] | Outcome,
    /,
    *,
    lr: float,
    loaded_lr_scale: float = 0.1,
    layer_decay: float | None = None,
    weight_decay: float = 0.0,
    no_decay: Patterns | None = None,
) -> list[dict[str, Any]]:
    """Groups for `torch.optim` that hold every trainable parameter of a model exactly once, a tied one too.

    Args:
        model: The model as it will train; wrapped, cast or sharded since it was planned is fine.
        plan_or_report: What was, or will be, loaded into it.
        lr: The learning rate of what is new.
        loaded_lr_scale: Of what is loaded, as a multiple of `lr`.
        layer_decay: Another factor on what is loaded, once for each layer above it, usually 0.65 to 0.9. A layer is an
            element of a stack, as `warmstart.layers` finds it.
        weight_decay: For all but `no_decay`.
        no_decay: Patterns of entries without weight decay; None: those of fewer than two dimensions, which are the biases
            and the norms' gains.

    Returns:
        Dicts of `params`, `lr`, `weight_decay` and a unique `name`; none is empty.

    Raises:
        MappingError: A factor that cannot be meant, a pattern of `no_decay` that matches no parameter, nothing that trains,
            a model that is not the one of the plan, or one without layers to decay by.

    Example:
        >>> torch.optim.AdamW(warmstart.param_groups(model, report, lr=1e-3, layer_decay=0.75, weight_decay=0.05))
    """
    for name, value in (("lr", lr), ("loaded_lr_scale", loaded_lr_scale), ("layer_decay", layer_decay)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise MappingError(f"{name}={value!r}: a positive number")
    plan = plan_or_report.plan if isinstance(plan_or_report, Outcome) else plan_or_report
    names = _clean_names(model)
    loaded = _loaded(plan, names)
    exempt = PatternSet(no_decay, where="no_decay") if no_decay is not None else None
    above = layers_above(model, names) if layer_decay is not None else {}

    groups: dict[str, dict[str, Any]] = {}
    for spelled, parameter in model.named_parameters():
        clean = names[spelled]
        decays = parameter.dim() > 1 if exempt is None else not exempt.matches(spelled, clean)
        if not parameter.requires_grad:
            continue
        label, rate = ("loaded", lr * loaded_lr_scale) if spelled in loaded else ("new", lr)
        if layer_decay is not None and spelled in loaded:
            label, rate = f"loaded, {above[spelled]} layers above", rate * layer_decay ** above[spelled]
        label += "" if decays or not weight_decay else ", no decay"
        group = groups.setdefault(
            label, {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0, "name": label}
        )
        group["params"].append(parameter)
    if exempt is not None and (unused := exempt.without_hit()):
        raise MappingError(
            f"no_decay={unused[0].text!r} matches no parameter{did_you_mean(unused[0].text, list(names.values()))}"
        )
    if not groups:
        raise MappingError("no parameter of this model is trainable; freeze less, or leave the optimizer out")
    return list(groups.values())


def _loaded(plan: Plan[Any], names: dict[str, str]) -> set[str]:
    """The parameters that the plan gives a value: by name, as wrapping and sharding make new objects."""
    entries = plan.targets.entries
    assigned = {entries[a.target].canonical for a in plan.assignments}
    clean = {entry.clean for entry in entries.values() if entry.canonical in assigned and entry.kind == "parameter"}
    found = {spelled for spelled, name in names.items() if name in clean}
    if clean and not found:
        raise MappingError(
            f"none of the {len(clean)} parameters that the plan loads, such as '{min(clean)}', is in this model; "
            "give the model that was planned for, as a whole"
        )
    return found


def _clean_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's name as spelled, to the same without the segments of wrappers."""
    segments = {s for module in model.modules() if (s := wrapped_child(module)) is not None}
    return {name: without_wrappers(name, segments) for name, _ in model.named_parameters()}
