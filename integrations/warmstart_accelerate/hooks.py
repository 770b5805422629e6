"""Hooks of a loop that has none of its own: on a module's first training forward, and around an object's methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class FirstForward:
    """A forward hook that acts once, before the module's first forward in training mode with gradients.

    A copy or a pickle of the module has it without its act: a copy is another model.

    Attributes:
        ran: Whether the module has had any forward, also one that does not train.
    """

    ran = False
    _act: Callable[[], object] | None = None
    _handle: RemovableHandle | None = None

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def put_on(self, module: nn.Module) -> None:
        """Before every hook that the module has by now: an engine's would show us what it computes with, not what it holds."""
        self.remove()
        self._handle = module.register_forward_pre_hook(self, prepend=True)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._act is None or torch.compiler.is_compiling():
            return
        self.ran = True
        if not (module.training and torch.is_grad_enabled()):
            return
        act, self._act = self._act, None
        self.remove()
        act()

    def __getstate__(self) -> None:
        return None


def after(owner: object, name: str, act: Callable[[Any], object]) -> None:
    """Let `act` follow each call of the owner's method, with what it returned."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def followed(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        act(result)
        return result

    setattr(owner, name, followed)


def before(owner: object, name: str, act: Callable[..., object]) -> None:
    """Let `act` precede each call of the owner's method, with its positional arguments."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def preceded(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return method(*args, **kwargs)

    setattr(owner, name, preceded)
