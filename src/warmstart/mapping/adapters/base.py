"""What every adapter can be asked: whether it fits, what it makes of a tensor, and how to undo it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from warmstart.mapping.derivations import Shape


class Adapter(ABC):
    """How one checkpoint tensor becomes an entry of (mostly) another shape. Subclasses are frozen dataclasses.

    Bit-exact where there is nothing to change. What is solved or resampled is computed in float64 and rounded once.
    """

    @abstractmethod
    def check(self, source: Shape, target: Shape) -> None:
        """Decide on shapes alone whether this adapter can make `target` of `source`.

        Raises:
            MappingError: It cannot; the message says why and what to write instead.
        """

    @abstractmethod
    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        """The adapted value, on the CPU, in `current`'s shape and dtype; neither argument is written to.

        Args:
            value: The checkpoint's tensor, on the CPU, in the checkpoint's dtype.
            current: What the entry holds before the load, on any device; kept elements come from it.
        """

    def loaded(self, source: Shape, target: Shape) -> Tensor | None:
        """Which elements come from the checkpoint: booleans that broadcast to `target`; None where all of them do."""
        del source, target
        return None

    def keeps(self, source: Shape, target: Shape) -> bool:
        """Whether elements of the entry stay what they are."""
        del source, target
        return False

    @property
    def constant(self) -> float | None:
        """The number that elements get which the checkpoint has no value for; None if there is no such number."""
        return None

    def computes(self, source: Shape, target: Shape) -> bool:
        """Whether elements are computed from others, which integers and booleans do not survive, and not only moved."""
        del source, target
        return True

    def no_inverse(self, source: Shape, target: Shape) -> str | None:
        """Why the checkpoint's tensor cannot be had back bit for bit, in a few words; None if it can."""
        return None if source == target else "resampling loses what the checkpoint held"

    def undo(self, value: Tensor, source: Shape) -> Tensor:
        """The checkpoint's tensor, of shape `source`, from the entry's; only called where `no_inverse` is None."""
        assert tuple(value.shape) == source
        return value
