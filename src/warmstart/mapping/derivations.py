"""Tensors that are made from checkpoint tensors: by a conversion, or by a module's own way to load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Derivation(ABC):
    """Several keys to several outputs, decided on names, shapes and dtypes; run when its values are read.

    Attributes:
        label: What does it, for messages and tables: the conversion as it was written, or the module.
        sources: The checkpoint keys it reads, as the file spells them.
        targets: The names of its outputs, as planning's steps after it see them (relative to `into`).
        shapes: The outputs' shapes; None while a shape depends on the entry it will go to.
        dtypes: The outputs' dtypes.
        may_refuse: Whether `run` may raise MappingError for the sake of values, so that it is tried before anything is written.
    """

    label: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    shapes: list[Shape | None]
    dtypes: list[torch.dtype]
    may_refuse: bool = False

    def resolve(self, wanted: Sequence[Shape | None]) -> None:
        """Settle shapes that were left open, given the shapes of the entries the outputs go to (None: goes nowhere).

        Raises:
            MappingError: They cannot be settled; the message says what to write.
        """
        del wanted

    @abstractmethod
    def run(self, read: Callable[[int], Tensor]) -> list[Tensor]:
        """The outputs, in the order of `targets`, on the CPU. `read(i)` gives the tensor of `sources[i]`, to be read only."""

    @abstractmethod
    def undo(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The sources' tensors from all the outputs', on the CPU; only called where `no_inverse` is None."""

    @property
    def no_inverse(self) -> str | None:
        """Why the sources cannot be had back bit for bit, in a few words; None if they can."""
        return None
