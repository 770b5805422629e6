"""What ops work on: tensors that are made when asked for, in slots that remember which placeholder values they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Coordinate = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slot(Generic[T]):
    """What one source template took, and what became of it.

    Attributes:
        axes: The placeholders by which its tensors differ; none where there is one tensor.
        cells: Its tensors by their values of `axes`, in natural order.
    """

    axes: tuple[str, ...]
    cells: dict[Coordinate, T]


class LazyTensor:
    """A tensor of known shape and dtype that is made when asked for, each time anew.

    Args:
        meta: A tensor of its shape and dtype on the meta device.
        make: Makes it.
    """

    def __init__(self, meta: Tensor, make: Callable[[], Tensor]) -> None:
        self.meta = meta
        self.make = make

    def write(self, out: Tensor) -> None:
        """Copy it into `out`, of its shape and dtype."""
        made = self.make()
        assert (made.shape, made.dtype) == (out.shape, out.dtype)  # copy_ would broadcast and cast
        out.copy_(made)


class JoinedTensor(LazyTensor):
    """A tensor whose parts are written into it one at a time, so that it and one part is all that is held.

    Args:
        meta: As of `LazyTensor`.
        parts: What it is made of.
        views: The places in a tensor of its shape that they go to, in turn.
    """

    def __init__(self, meta: Tensor, parts: Sequence[LazyTensor], views: Callable[[Tensor], Iterator[Tensor]]) -> None:
        super().__init__(meta, self._joined)
        self._parts = parts
        self._views = views

    def write(self, out: Tensor) -> None:
        for part, view in zip(self._parts, self._views(out), strict=True):
            part.write(view)

    def _joined(self) -> Tensor:
        out = torch.empty(self.meta.shape, dtype=self.meta.dtype)
        self.write(out)
        return out


def shared(metas: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> list[LazyTensor]:
    """Tensors that are made together: at the first that is asked for, and let go with the last."""
    made: dict[int, Tensor] = {}

    def take(number: int) -> Tensor:
        if number not in made:
            made.update(enumerate(make()))
        return made.pop(number)

    return [LazyTensor(meta, lambda n=n: take(n)) for n, meta in enumerate(metas)]  # type: ignore[misc]
