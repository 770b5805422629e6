"""The first layer of a network whose input has another number of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.refusals import KEEP_OWN, check_mode, refused, written
from warmstart.mapping.adapters.resampling import along, wide
from warmstart.mapping.derivations import Shape


@dataclass(frozen=True)
class AdaptInChannels(Adapter):
    """A weight (out, in, ...) of a convolution of any rank or of a linear layer, for n -> m input channels (dimension 1).

    "repeat" and "mean" keep the sum over the input channels, and with it the response to an input that is constant across
    them, for every n and m. "repeat" equals timm's `adapt_input_conv` where m is 1 or a multiple of n. In float64. Not for
    transposed convolutions, whose dimension 0 is the input.

    Attributes:
        mode: "repeat": new channel j is old channel j mod n, divided by the number of its copies; with fewer channels old
            channel i is added to new channel i mod m (3 -> 1 is their sum). "mean": every new channel is the mean of the old
            ones, times n / m. "slice": the first m channels as they are, bit for bit and not rescaled, for m <= n (RGB out
            of RGB and infrared).

    Raises:
        MappingError: A mode that there is not.
    """

    mode: Literal["repeat", "mean", "slice"] = "repeat"

    def __post_init__(self) -> None:
        check_mode(self, self.mode, "repeat", "mean", "slice")

    def check(self, source: Shape, target: Shape) -> None:
        if source == target:
            return
        if len(source) < 2 or len(source) != len(target) or source[:1] + source[2:] != target[:1] + target[2:]:
            why = "weights (out, in, ...) are needed that differ in dimension 1 alone"
            raise refused(source, target, why, KEEP_OWN)
        if not source[1] or not target[1]:
            raise refused(source, target, "there is no input channel", KEEP_OWN)
        if self.mode == "slice" and target[1] > source[1]:
            why = f"the first {target[1]} of {source[1]} channels cannot be taken"
            raise refused(source, target, why, written(self, mode="repeat"))

    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        if value.shape == current.shape:
            return value.to(current.dtype)
        n, m = value.shape[1], current.shape[1]
        if self.mode == "slice":
            return value[:, :m].to(current.dtype).contiguous()
        shares = (
            torch.full((m, n), 1 / m, dtype=torch.float64, device="cpu") if self.mode == "mean" else _repeated(n, m)
        )
        return along(wide(value), 1, shares).to(current.dtype)

    def no_inverse(self, source: Shape, target: Shape) -> str | None:
        if source == target:
            return None
        return (
            "the other input channels are left out" if self.mode == "slice" else "input channels are mixed or rescaled"
        )


def _repeated(n: int, m: int) -> Tensor:
    """The matrix (m, n) that deals n channels out to m in turn; each of the n gives 1 in total."""
    turn = torch.arange(max(n, m), device="cpu")
    dealt = torch.zeros(m, n, dtype=torch.float64, device="cpu")
    dealt[turn % m, turn % n] = 1
    return dealt / dealt.sum(0)
