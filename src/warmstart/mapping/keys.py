"""A checkpoint key on its way to an entry of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from warmstart.mapping.derivations import Derivation, Shape


@dataclass(slots=True)
class Key:
    """A key of the file, or an output of a derivation that stands in the place of the keys it is made from.

    Attributes:
        spelled: As the file spells it; of an output, its name when it was made.
        clean: The same without wrapper segments.
        name: Its name so far, relative to `into`.
        shape: Its shape; None while a derivation leaves it open.
        dtype: Its dtype.
        made: The derivation it is an output of; None for a key of the file.
        output: Its index in `made.targets`.
        rewritten: Its name under the inferred prefix, where it has that prefix.
    """

    spelled: str
    clean: str
    name: str
    shape: Shape | None
    dtype: torch.dtype
    made: Derivation | None = None
    output: int = 0
    rewritten: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The keys of the file that it comes from, as the file spells them."""
        return (self.spelled,) if self.made is None else self.made.sources
