"""Kernels of 2-D convolutions in 3-D ones: image networks for video and volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.refusals import KEEP_OWN, check_mode, refused
from warmstart.mapping.adapters.resampling import wide
from warmstart.mapping.derivations import Shape


@dataclass(frozen=True)
class InflateConv(Adapter):
    """A kernel (out, in, h, w) as (out, in, t, h, w): a clip that repeats one frame gives the 2-D output.

    With zero padding in time that holds for "center" everywhere, for "average" away from the ends of the clip.

    Attributes:
        mode: "average": every time step holds the kernel divided by t (I3D, Carreira & Zisserman 2017,
            arXiv:1705.07750). "center": step t // 2 holds it and the others are zero, so that frames do not mix at first;
            the kernel can be had back.

    Raises:
        MappingError: A mode that there is not.
    """

    mode: Literal["average", "center"] = "average"

    def __post_init__(self) -> None:
        check_mode(self, self.mode, "average", "center")

    def check(self, source: Shape, target: Shape) -> None:
        if source != target and (
            len(source) != 4 or len(target) != 5 or source != target[:2] + target[3:] or not target[2]
        ):
            why = (
                "a kernel (out, in, height, width) and one (out, in, time, height, width) of the same sizes are needed"
            )
            raise refused(source, target, why, KEEP_OWN)

    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        if value.shape == current.shape:
            return value.to(current.dtype)
        steps = current.shape[2]
        if self.mode == "average":
            return (wide(value) / steps).to(current.dtype).unsqueeze(2).repeat(1, 1, steps, 1, 1)
        inflated = torch.zeros(current.shape, dtype=current.dtype, device="cpu")
        inflated[:, :, steps // 2] = value.to(current.dtype)
        return inflated

    def no_inverse(self, source: Shape, target: Shape) -> str | None:
        if source == target or self.mode == "center" or target[2] == 1:
            return None
        return f"dividing by {target[2]} rounds"

    def undo(self, value: Tensor, source: Shape) -> Tensor:
        return value if tuple(value.shape) == source else value[:, :, value.shape[2] // 2]
