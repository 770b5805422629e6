"""What a restore put into the model, between the load and the start of training."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from warmstart.errors import VerificationError
from warmstart.mapping.grouping import listed
from warmstart.mapping.model.names import WRAPPER_SEGMENTS, without_wrappers
from warmstart.shards import local_of
from warmstart.tensors import digest, sample


class Restored:
    """What a restore gave some parameters, by a sample of each: a host's cast or sharding that comes after it is no change."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.names = names
        self._digests = dict(self._of(model))

    def refuse_other(self, model: nn.Module, when: str) -> None:
        """Refuse a model whose parameters hold something else.

        Raises:
            VerificationError: It does.
        """
        now = dict(self._of(model))
        wrong = [
            name
            for name, (kind, value) in self._digests.items()
            if name not in now or (now[name][0] == kind and now[name][1] != value)
        ]
        if wrong:
            raise VerificationError(
                f"{len(wrong)} tensors do not hold what the resumed checkpoint gave them {when}\n"
                f"{listed((name, '') for name in wrong)}\n"
                "  -> something initialised, replaced or overwrote them after the resume; let it come before, or go through "
                'model.load_state_dict(...). verify="off" trains without this check',
                tensors=tuple(wrong),
            )

    def _of(self, model: nn.Module) -> Iterator[tuple[str, tuple[object, int]]]:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self.names and not parameter.is_meta and not is_lazy(parameter):
                local = local_of(parameter)
                yield name, ((local.dtype, local.shape), digest(sample(local)))


class RestoreWatch:
    """A model's load-state-dict hook: which of its entries a restore had values for, over all of its files.

    It knows neither the model nor the lifecycle, so that a copy of the model carries nothing along.
    """

    def __init__(self, warning: str | None, names: Collection[str] = ()) -> None:
        """Watch a model.

        Args:
            warning: What to tell when a restore is seen.
            names: The parameters whose values are remembered.
        """
        self.warning, self.names = warning, names
        self.restored: Restored | None = None
        self.matched: set[str] = set()
        self.seen = False

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        self.seen = True
        self.restored = Restored(module, self.names)
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
