"""Ops on every tensor alone that only move its elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.conversions.ops.base import EachOp, Op, check_ints, ints
from warmstart.mapping.derivations import Shape


@dataclass(frozen=True)
class Transpose(EachOp):
    """Swap two dimensions.

    Attributes:
        a: The one.
        b: The other.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        check_ints(self, a=self.a, b=self.b)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(self.a, self.b)

    def inverted(self) -> Transpose:
        return self


@dataclass(frozen=True)
class Permute(EachOp):
    """Put the dimensions in another order, as `torch.permute` does.

    Attributes:
        dims: For each dimension of the result, which one it was.
    """

    dims: Sequence[int]

    def __post_init__(self) -> None:
        dims = ints(self, "dims", self.dims)
        if sorted(d % len(dims) if -len(dims) <= d < len(dims) else d for d in dims) != list(range(len(dims))):
            raise MappingError(f"{self}: dims must name each dimension once, for example dims=[2, 0, 1]")
        object.__setattr__(self, "dims", tuple(d % len(dims) for d in dims))

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.permute(tuple(self.dims))

    def inverted(self) -> Permute:
        return Permute(tuple(sorted(range(len(self.dims)), key=lambda d: self.dims[d])))


@dataclass(frozen=True)
class Reshape(EachOp):
    """The same elements in the same order in another shape.

    Attributes:
        shape: The new shape; one size may be -1, which is what remains.
    """

    shape: Sequence[int]

    def __post_init__(self) -> None:
        shape = ints(self, "shape", self.shape, allow_empty=True)
        if any(size < -1 for size in shape) or shape.count(-1) > 1:
            raise MappingError(f"{self}: sizes are not negative but for one -1, for example shape=[-1, 64]")
        object.__setattr__(self, "shape", shape)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tuple(self.shape))

    def unapply(self, tensor: Tensor, shape: Shape) -> Tensor:
        return tensor.reshape(shape)

    def shape_before(self, shape: Shape) -> Shape | None:
        del shape
        return None

    def inverted(self) -> Op:
        raise MappingError(
            f"{self} has no declared inverse: it does not say the shape before it; write that Reshape out"
        )


@dataclass(frozen=True)
class RopePermute(EachOp):
    """Rows of a query or key projection, between the two ways to pair the dimensions that a rotary embedding turns.

    With `d` rows per head, the *interleaved* layout (Meta's Llama, GPT-J) turns the rows (2j, 2j + 1) of a head together,
    the *half* layout (Hugging Face's Llama, GPT-NeoX) the rows (j, j + d/2). So `to="half"` moves row `2j + k` of each
    head to row `k * d/2 + j`, for k in (0, 1) and j < d/2; for a weight `w` of shape (heads * d, in) that is

        w.view(heads, d // 2, 2, in).transpose(1, 2).reshape(heads * d, in)

    the `permute` of transformers' Llama conversion script. A bias has shape (heads * d,). Attention scores stay the same,
    as long as query and key are moved alike.

    Attributes:
        heads: Heads that the rows belong to; of a key under grouped-query attention, the key's own.
        to: The layout to make.
    """

    heads: int
    to: Literal["half", "interleaved"] = "half"

    def __post_init__(self) -> None:
        check_ints(self, heads=self.heads)
        if self.heads < 1:
            raise MappingError(f"{self}: heads must be positive, for example heads=32")
        if self.to not in ("half", "interleaved"):
            raise MappingError(f'{self}: write to="half" (Meta to Hugging Face) or to="interleaved" (back)')

    def apply(self, tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.ndim else 0
        if tensor.ndim not in (1, 2) or rows % (2 * self.heads):
            raise MappingError(
                f"{self} takes a weight (heads * d, in) or a bias (heads * d,) with an even d, not {tuple(tensor.shape)}; "
                "give the heads of this projection"
            )
        half = rows // self.heads // 2
        pairs = (half, 2) if self.to == "half" else (2, half)
        return tensor.reshape(self.heads, *pairs, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def inverted(self) -> RopePermute:
        return replace(self, to="interleaved" if self.to == "half" else "half")
