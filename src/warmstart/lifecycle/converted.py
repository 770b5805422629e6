"""Modules that a host puts in the place of others, around the same parameters: a BatchNorm, by one that ranks share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from warmstart.mapping.model.targets import Target


def heirs(model: nn.Module, targets: Iterable[Target]) -> dict[int, nn.Module]:
    """What stands in the place of each owner that is no longer in the model, by the owner's id."""
    modules = dict(model.named_modules(remove_duplicate=False))
    present = {id(module) for module in modules.values()}
    found: dict[int, nn.Module] = {}
    for target in targets:
        heir = modules.get(target.name.rpartition(".")[0])
        if id(target.owner) not in present and heir is not None and _inherits(heir, target.owner):
            found[id(target.owner)] = heir
    return found


def _inherits(heir: nn.Module, owner: nn.Module) -> bool:
    """Whether it holds the very parameters, and buffers of the same names: a move to a device makes new ones of those."""
    parameters = heir._parameters
    return (
        parameters.keys() == owner._parameters.keys()
        and all(parameters[leaf] is parameter for leaf, parameter in owner._parameters.items())
        and heir._buffers.keys() == owner._buffers.keys()
    )
