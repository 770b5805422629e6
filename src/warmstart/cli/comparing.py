"""How far one tensor is from another, in sums that add up over a module."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from warmstart.tensors import same_bits

_CHUNK = 1 << 20  # elements; each takes 8 bytes while it is summed


@dataclass(slots=True)
class Sums:
    """Sums over the elements of pairs of tensors of equal shape, in float64.

    Attributes:
        tensors: How many pairs.
        equal: How many of them have one dtype and the same bits.
        count: Elements.
        a, b, aa, bb, ab: Sums of the values and of their products.
        gap: Sum of the squared differences; inf where one side is not finite and the other is another value.
    """

    tensors: int = 0
    equal: int = 0
    count: int = 0
    a: float = 0.0
    b: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    gap: float = 0.0

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Sums:
        """The sums of one pair."""
        sums = cls(tensors=1, equal=int(same_bits(a, b)))
        a, b = _flat(a), _flat(b)
        sums.count = a.numel()
        for start in range(0, sums.count, _CHUNK):
            x, y = (_wide(t[start : start + _CHUNK]) for t in (a, b))
            sums.a += x.sum().item()
            sums.b += y.sum().item()
            sums.aa += x.dot(x).item()
            sums.bb += y.dot(y).item()
            sums.ab += x.dot(y).item()
            gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, x - y)
            sums.gap += gap.dot(gap).nan_to_num(nan=math.inf).item()
        return sums

    def add(self, other: Sums) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def distance(self) -> float:
        """|A - B| / |A|, by the Frobenius norm; inf where they differ and A is zero or not finite."""
        if self.gap == 0:
            return 0.0
        return math.sqrt(self.gap / self.aa) if 0 < self.aa < math.inf and self.gap < math.inf else math.inf

    @property
    def correlation(self) -> float | None:
        """Pearson's, -1 to 1; None where one side is constant, not finite, or too small to say."""
        if self.count < 2:
            return None
        spread_a, spread_b = (self.aa - self.a**2 / self.count, self.bb - self.b**2 / self.count)
        shared = self.ab - self.a * self.b / self.count
        scale = math.sqrt(spread_a) * math.sqrt(spread_b) if spread_a > 0 and spread_b > 0 else 0.0
        floor = 1e-12 * math.sqrt(self.aa) * math.sqrt(self.bb) if self.aa > 0 and self.bb > 0 else 0.0
        if not math.isfinite(scale) or not math.isfinite(shared) or scale <= floor:
            return None
        return max(-1.0, min(1.0, shared / scale))


def _flat(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().reshape(-1)


def _wide(part: Tensor) -> Tensor:
    if part.dtype.itemsize == 1 and part.is_floating_point():
        part = part.to(torch.float32)  # float8 has no cast to float64 on every version
    return part.to(torch.float64)
