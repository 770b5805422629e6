"""Checkpoints and models of names, shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from warmstart import Checkpoint, TensorInfo

Shapes = Mapping[str, tuple[int, ...]]


def shaped(names: Shapes | Iterable[str]) -> Shapes:
    """Names without shapes have two elements each."""
    return names if isinstance(names, Mapping) else dict.fromkeys(names, (2,))


class Header(Checkpoint):
    """Names, shapes and dtypes without tensors: whoever reads one fails."""

    def __init__(
        self, names: Shapes | Iterable[str], dtype: torch.dtype = torch.float32, *, location: str = "header"
    ) -> None:
        infos = {name: TensorInfo(tuple(shape), dtype) for name, shape in shaped(names).items()}
        super().__init__(location=location, format="none", infos=infos)

    def _read(self, key, index):
        raise AssertionError(f"{key} was read while planning")


def grow(root: nn.Module, names: Shapes | Iterable[str], dtype: torch.dtype = torch.float32) -> None:
    """Give a module a tree of modules with one parameter per name, all zero."""
    for name, shape in shaped(names).items():
        *path, leaf = name.split(".")
        module = root
        for segment in path:
            if segment not in module._modules:
                module.add_module(segment, nn.Module())
            module = module.get_submodule(segment)
        module.register_parameter(leaf, nn.Parameter(torch.zeros(shape, dtype=dtype)))


def net(names: Shapes | Iterable[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module tree with one parameter per name."""
    root = nn.Module()
    grow(root, names, dtype)
    return root
