"""Modules that are held in eval mode while their surroundings train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

STATISTICS = ("running_mean", "running_var")


class HeldInEval:
    """Stands in for a module's `train` method: whatever mode is asked for, the module stays in eval.

    An object and not a closure, so that a held module can be pickled and deep-copied. It remembers the mode that was asked
    for, which the module gets when it is released.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.asked = module.training
        module.training = False

    def __call__(self, mode: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        self.asked = mode
        self.module.training = False
        for child in self.module.children():
            child.train(mode)
        return self.module

    def release(self) -> None:
        del self.module.__dict__["train"]
        self.module.training = self.asked


def hold_instead(held: Sequence[nn.Module], wanted: Sequence[nn.Module]) -> None:
    """Let go of the modules in `held` that are not wanted, and hold those that are."""
    keep = {id(module) for module in wanted}
    for module in held:
        if id(module) not in keep and isinstance(module.__dict__.get("train"), HeldInEval):
            module.__dict__["train"].release()
    for module in wanted:
        if not isinstance(module.__dict__.get("train"), HeldInEval):
            module.__dict__["train"] = HeldInEval(module)


def subtrees_to_hold(model: nn.Module, frozen: set[tuple[int, str]]) -> list[tuple[str, list[nn.Module]]]:
    """Path of each subtree to hold, and its modules: each by itself, since a loop over modules() asks each by itself."""
    found: list[tuple[str, list[nn.Module]]] = []

    def visit(path: str, module: nn.Module) -> None:
        entries = [
            (id(owner), leaf)
            for owner in module.modules()
            for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]
            if tensor is not None and leaf not in owner._non_persistent_buffers_set
        ]
        if entries and all(entry in frozen for entry in entries):
            found.append((path, list(module.modules())))
            return
        if any((id(module), leaf) in frozen for leaf in STATISTICS):
            found.append((path, [module]))
        for leaf, child in module.named_children():
            visit(f"{path}.{leaf}" if path else leaf, child)

    visit("", model)
    return found
