"""A module's method, acted after once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Once:
    """Stands in for a module's method for one call, and acts after it.

    Several can be stacked, and are removed in any order: one that is not on top is passed through until it is. A copy of the
    module, or its pickle, gets the method itself.
    """

    def __init__(self, name: str, module: nn.Module, act: Callable[[], None]) -> None:
        self.name, self.module, self.act = name, module, act
        self.original = getattr(module, name)
        self.before = module.__dict__.get(name)  # set on the instance by its user, or by another WarmStart
        self.active = True
        self.__wrapped__ = inspect.unwrap(self.original)  # Lightning looks here for whether the method is overridden
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        act = self.active
        self.remove()
        result = self.original(*args, **kwargs)
        if act:
            self.act()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_itself, (self.original,))

    def remove(self) -> None:
        self.active = False
        top = self.module.__dict__.get(self.name)
        while isinstance(top, Once) and not top.active:
            del self.module.__dict__[self.name]
            top = top.before
            if top is not None:
                self.module.__dict__[self.name] = top


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method
