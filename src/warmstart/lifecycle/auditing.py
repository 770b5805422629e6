"""What optimizers hold, by identity: never by name or value."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from warmstart.errors import TimingError
from warmstart.mapping.grouping import listed
from warmstart.mapping.plan.plan import Plan


def refuse_late_freeze(plan: Plan, names: set[str], optimizers: Sequence[torch.optim.Optimizer], fix: str) -> None:
    """Refuse to freeze what trains already, with the `fix` to type.

    Raises:
        TimingError: An optimizer holds one of the entries.
    """
    held = {i for optimizer in optimizers for i in _held(optimizer)}
    tensors = {name: plan.targets.entries[name].tensor for name in sorted(names)}
    late = [name for name, tensor in tensors.items() if id(tensor) in held and tensor.requires_grad]
    if late:
        raise TimingError(
            f"{len(late)} parameters that are to be frozen are in an optimizer already\n"
            f"{listed((name, '') for name in late)}\n  -> {fix}"
        )


def refuse_beside_copies(plan: Plan | None, *, releases: bool) -> None:
    """Refuse what cannot be seen to where an engine takes its steps on copies of its own.

    Raises:
        TimingError: Entries are to be released in the course of the run, or rows to be held.
    """
    if releases:
        raise TimingError(
            "unfreeze= releases parameters after the DeepSpeed engine was made, which lays out gradients for what trains then\n"
            "  -> freeze for the whole run, or train with FSDP of version 2 or DistributedDataParallel"
        )
    if plan is not None and plan.held_rows:
        raise TimingError(
            "freeze_old=True puts rows back after each step, and DeepSpeed takes its steps on copies of its own\n"
            f"{listed((name, '') for name in plan.held_rows)}\n"
            "  -> MapRows(..., freeze_old=False), or train with FSDP of version 2 or DistributedDataParallel"
        )


def audit(
    plan: Plan, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] | None, later: Collection[str] = ()
) -> list[str]:
    """No optimizer may hold a loaded parameter that the model replaced, or none of what the model trains, now or `later`.

    Returns:
        Notes of what no optimizer holds and could train, and of what one holds and is frozen.

    Raises:
        TimingError: One does.
    """
    if not optimizers:
        return []
    live = {id(p) for p in model.parameters()}
    loaded = {
        id(t.tensor): a.target for a in plan.assignments if (t := plan.targets.entries[a.target]).kind == "parameter"
    }
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    released = {id(plan.targets.entries[name].tensor) for name in later}
    for optimizer in optimizers:
        held = _held(optimizer)
        orphans = sorted(loaded[i] for i in held if i in loaded and i not in live)
        if orphans:
            raise TimingError(
                f"the optimizer holds {len(orphans)} loaded parameters that the model has replaced since; they would train "
                f"and the model would not\n{listed((name, '') for name in orphans)}\n"
                "  -> replace parameters before configure_optimizers, or write to them in place"
            )
        if held and trainable and not held & (trainable | released):
            raise TimingError(
                f"{type(optimizer).__name__} holds none of the model's {len(trainable)} trainable parameters; build it from "
                "the model that trains: torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)"
            )
    held = {i for optimizer in optimizers for i in _held(optimizer)} - released
    named = [(name, p.requires_grad, id(p) in held) for name, p in model.named_parameters() if id(p) not in released]
    left = [name for name, trains, has in named if trains and not has]
    idle = [name for name, trains, has in named if has and not trains]
    notes = []
    if left:
        notes.append(f"{_some(left)}: trainable, but in no group of an optimizer")
    if idle:
        notes.append(f"{_some(idle)}: frozen, and in a group of an optimizer, which leaves them as they are")
    return notes


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} parameters, such as {names[0]}" if len(names) > 1 else names[0]


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
