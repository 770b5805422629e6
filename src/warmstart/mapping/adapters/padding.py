"""Tensors cut or padded at the end of each dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.refusals import KEEP_OWN, refused
from warmstart.mapping.derivations import Shape


@dataclass(frozen=True)
class SliceOrPad(Adapter):
    """Every dimension cut, or padded, at its end; the part that both have is copied bit for bit.

    What is cut off is dropped without another word: naming this adapter allows it. For rows that mean something (a
    vocabulary, classes) `MapRows` carries them by label and counts what it drops.

    Attributes:
        fill: What the padded elements hold: "keep" what the entry was initialised with, or this number.

    Raises:
        MappingError: Neither "keep" nor a number.
    """

    fill: float | Literal["keep"] = "keep"

    def __post_init__(self) -> None:
        if self.fill != "keep" and (isinstance(self.fill, bool) or not isinstance(self.fill, int | float)):
            raise MappingError(f'fill={self.fill!r}: write SliceOrPad(fill="keep") or SliceOrPad(fill=0.0)')

    def check(self, source: Shape, target: Shape) -> None:
        if len(source) != len(target):
            raise refused(source, target, "the same number of dimensions is needed", KEEP_OWN)

    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        common = _common(tuple(value.shape), tuple(current.shape))
        if value[common].shape == current.shape:
            return value[common].to(current.dtype)
        padded = (
            current.detach().to("cpu", copy=True)
            if self.fill == "keep"
            else torch.full(current.shape, self.fill, dtype=current.dtype, device="cpu")
        )
        padded[common] = value[common].to(current.dtype)
        return padded

    def loaded(self, source: Shape, target: Shape) -> Tensor | None:
        mask: Tensor | None = None
        for dim, (s, t) in enumerate(zip(source, target, strict=True)):
            if s < t:
                inside = (torch.arange(t, device="cpu") < s).view([-1 if d == dim else 1 for d in range(len(target))])
                mask = inside if mask is None else mask & inside
        return mask

    def keeps(self, source: Shape, target: Shape) -> bool:
        return self.fill == "keep" and self.loaded(source, target) is not None

    @property
    def constant(self) -> float | None:
        return None if isinstance(self.fill, str) else self.fill

    def computes(self, source: Shape, target: Shape) -> bool:
        del source, target
        return False

    def no_inverse(self, source: Shape, target: Shape) -> str | None:
        cut = any(s > t for s, t in zip(source, target, strict=True))
        return "what was cut off is gone" if cut else None

    def undo(self, value: Tensor, source: Shape) -> Tensor:
        return value[_common(source, tuple(value.shape))]


def _common(source: Shape, target: Shape) -> tuple[slice, ...]:
    return tuple(slice(min(s, t)) for s, t in zip(source, target, strict=True))
