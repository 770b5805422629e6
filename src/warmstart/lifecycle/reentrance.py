"""Reentrant gradient checkpointing behind what is frozen: nothing in there would get a gradient."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from warmstart.errors import TimingError

_FORWARD = CheckpointFunction.forward.__code__


class ReentrantWatch:
    """Looks at every module that trains until it has run once where its parameters can get a gradient.

    torch's reentrant checkpointing (`use_reentrant=True`) runs a part of the model without a graph, and gives it one only
    where one of the part's inputs needs a gradient: what comes out of frozen layers does not. torch warns of it, names no
    module, and trains the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        self._graph = True  # whether the model's caller wants gradients: not of a teacher
        self._waiting: set[str] = set()  # modules with parameters of their own that train
        for path, module in model.named_modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                above = path.rpartition(".")[0]
                # An attention computes with its projection's parameters, and never calls the projection.
                called = not isinstance(model.get_submodule(above), nn.MultiheadAttention)
                self._waiting.add(path if called else above)
        self._within = Counter(at for path in self._waiting for at in _upwards(path))  # how many each one is or has
        self._handles = {
            path: module.register_forward_pre_hook(partial(self._enter, path))
            for path, module in model.named_modules()
            if path in self._within
        }

    def remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _enter(self, path: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():  # compiled, checkpointing is another, and has no such frame
            return
        graph = torch.is_grad_enabled()
        inputs = None if graph else _checkpointed()
        if inputs is None:
            if module.training:
                self._graph = graph
        elif any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            graph = True
        if path in self._waiting:
            if graph:
                self._seen(path)
            elif inputs is not None and self._graph and module.training:
                self.remove()
                raise TimingError(
                    f"{path or type(module).__name__} runs in reentrant gradient checkpointing, and nothing that goes into it "
                    "needs a gradient, since what comes before is frozen: its parameters would get none and never train\n"
                    "  -> checkpoint(..., use_reentrant=False); of a transformers model, gradient_checkpointing_kwargs="
                    '{"use_reentrant": False} or model.enable_input_require_grads()'
                )

    def _seen(self, path: str) -> None:
        self._waiting.remove(path)
        for at in _upwards(path):
            self._within[at] -= 1
            if not self._within[at]:
                self._handles.pop(at).remove()


def _upwards(path: str) -> Iterator[str]:
    """A module's path and those of what it is in, up to the model's own, which is empty."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield path


def _checkpointed() -> tuple[Any, ...] | None:
    """What the outermost reentrant checkpoint that runs at present was given; None outside of one."""
    found: tuple[Any, ...] | None = None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _FORWARD:
            found = frame.f_locals["args"]
        frame = frame.f_back
    return found
