"""What a restore put into the model, between the load and the start of training."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from warmstart.mapping.model.names import WRAPPER_SEGMENTS, without_wrappers


class RestoreWatch:
    """A model's load-state-dict hook: which of its entries a restore had values for, over all of its files.

    It knows neither the model nor the lifecycle, so that a copy of the model carries nothing along.
    """

    def __init__(self, warning: str | None) -> None:
        self.warning = warning
        self.matched: set[str] = set()
        self.seen = False

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        self.seen = True
        entries = module.state_dict(keep_vars=True).keys()
        # Of a load through the model's wrapper, the names have the wrapper's segments.
        segments = WRAPPER_SEGMENTS.difference(*(name.split(".") for name in entries))
        missing = {*incompatible.missing_keys, *(without_wrappers(k, segments) for k in incompatible.missing_keys)}
        self.matched |= entries - missing
        if self.warning is not None:
            warning, self.warning = self.warning, None
            warnings.warn(warning, UserWarning, stacklevel=2)

    @property
    def passed_over(self) -> bool:
        """Whether a restore had nothing for the model; a counter that old files lack is filled in by torch."""
        return self.seen and all(name.rpartition(".")[2] == "num_batches_tracked" for name in self.matched)

    def lacking(self, model: nn.Module) -> list[str]:
        """The model's entries that got no value, neither by name nor through a tie."""
        entries = model.state_dict(keep_vars=True)
        filled = {id(value) for name, value in entries.items() if name in self.matched}
        return [name for name, value in entries.items() if isinstance(value, Tensor) and id(value) not in filled]
