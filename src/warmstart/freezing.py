"""Freezing that holds: parameters and buffers, bit for bit, until they are released on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from warmstart.errors import FrozenChangedError, MappingError
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.hints import did_you_mean
from warmstart.mapping.targets import Target, Targets
from warmstart.patterns import Patterns, PatternSet
from warmstart.tensors import digest, sample

Held = Literal["eval", "train"]
_STATISTICS = ("running_mean", "running_var")


class HeldInEval:
    """Stands in for a module's `train` method: whatever mode is asked for, the module stays in eval.

    An object and not a closure, so that a held module can be pickled and deep-copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.module).train(self.module, False)


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    dtype: torch.dtype
    full: int
    sampled: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Fingerprint:
        return cls(tensor.dtype, digest(tensor), digest(sample(tensor)))


class Frozen:
    """What is frozen in a model, with a digest of every tensor.

    Attributes:
        names: The frozen entries, sorted, as the model spells them.
    """

    def __init__(self, model: nn.Module, targets: list[Target], held: Held = "eval") -> None:
        self.model = model
        self._targets = {target.name: target for target in targets}
        for target in targets:
            if target.kind == "parameter":
                target.tensor.requires_grad_(False)
                target.tensor.grad = None
        self._held: list[tuple[str, nn.Module]] = []
        if held == "eval":
            self._hold()
        self._fingerprints = {name: _Fingerprint.of(target.tensor) for name, target in self._targets.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._targets))

    @property
    def held(self) -> tuple[str, ...]:
        """Paths of the modules that are held in eval mode."""
        return tuple(path for path, _ in self._held)

    @property
    def held_modules(self) -> tuple[tuple[str, nn.Module], ...]:
        """The same with the modules themselves."""
        return tuple(self._held)

    def __len__(self) -> int:
        return len(self._targets)

    def check(self, *, sampled: bool = False) -> None:
        """Compare every frozen tensor with its digest.

        Args:
            sampled: Compare a fixed sample of at most 4096 elements of each tensor instead of all.

        Raises:
            FrozenChangedError: A tensor moved, was replaced, or is trainable again.
        """
        moved: list[tuple[str, str]] = []
        for name, target in self._targets.items():
            tensor = _live(target)
            if tensor is None:
                moved.append((name, "is no longer in its module"))
            elif tensor.requires_grad and target.kind == "parameter":
                moved.append((name, "has requires_grad=True again"))
            elif not self._equal(tensor, name, sampled):
                moved.append((name, "has other values"))
        if moved:
            raise FrozenChangedError(
                f"{len(moved)} of {len(self)} frozen tensors are not what was frozen\n{listed(moved)}\n"
                "  -> something wrote to them after the freeze; release what is meant to train: "
                f'report.frozen.release(["{printable(moved[0][0])}"])',
                tensors=tuple(name for name, _ in moved),
            )

    def rebase(self, *, all_values: bool) -> None:
        """Take the present values as the frozen ones: all (a resume put the run's own there), or where the dtype changed."""
        for name, target in self._targets.items():
            tensor = _live(target)
            if tensor is not None and (all_values or tensor.dtype != self._fingerprints[name].dtype):
                self._fingerprints[name] = _Fingerprint.of(tensor)

    def release(self, patterns: Patterns, optimizer: torch.optim.Optimizer | None = None) -> tuple[str, ...]:
        """Unfreeze what the patterns match, and end the eval mode that was held for it.

        Args:
            patterns: Names of frozen entries, as everywhere.
            optimizer: Given, parameters that none of its groups holds yet are added to it as a new group.

        Returns:
            The entries that train from now on.

        Raises:
            MappingError: A pattern matches nothing that is frozen.
        """
        chosen = PatternSet(patterns, where="release")
        released = [n for n, t in self._targets.items() if chosen.matches(n, t.clean)]
        if unused := chosen.without_hit():
            hint = did_you_mean(unused[0].text, self._targets)
            raise MappingError(f"release({unused[0].text!r}) matches nothing that is frozen{hint}")
        parameters = []
        for name in released:
            target = self._targets.pop(name)
            self._fingerprints.pop(name)
            if target.kind == "parameter":
                tensor = _live(target)
                if tensor is not None:
                    tensor.requires_grad_(True)
                    parameters.append(tensor)
        self._hold()
        if optimizer is not None:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            new = list({id(p): p for p in parameters if id(p) not in known}.values())
            if new:
                optimizer.add_param_group({"params": new})
        return tuple(released)

    def _equal(self, tensor: Tensor, name: str, sampled: bool) -> bool:
        known = self._fingerprints[name]
        return digest(sample(tensor)) == known.sampled if sampled else digest(tensor) == known.full

    def _hold(self) -> None:
        """Hold each maximal subtree that is frozen as a whole, and each module with frozen statistics, in eval."""
        wanted = _to_hold(self.model, {(id(t.owner), t.leaf) for t in self._targets.values()})
        ids = {id(module) for _, module in wanted}
        training = self.model.training or any(module is self.model for _, module in self._held)
        for _, module in self._held:
            if id(module) not in ids and isinstance(module.__dict__.get("train"), HeldInEval):
                del module.__dict__["train"]
                module.train(training)
        for _, module in wanted:
            module.__dict__["train"] = HeldInEval(module)
            module.eval()
        self._held = wanted


def freeze_entries(model: nn.Module, names: Iterable[str], targets: Targets, held: Held = "eval") -> Frozen:
    """Freeze entries by name; a BatchNorm's counter goes with its statistics."""
    chosen = {name: targets.entries[name] for name in names}
    owners = {id(t.owner) for t in chosen.values() if t.leaf in _STATISTICS}
    for name, target in targets.entries.items():
        if target.leaf == "num_batches_tracked" and id(target.owner) in owners:
            chosen.setdefault(name, target)
    return Frozen(model, list(chosen.values()), held)


def freeze_patterns(model: nn.Module, patterns: Patterns, held: Held = "eval") -> Frozen:
    """Freeze what patterns match.

    Raises:
        MappingError: A pattern matches nothing.
    """
    targets = Targets.of(model)
    chosen = PatternSet(patterns, where="freeze")
    names = [name for name in targets.entries if chosen.matches(*targets.spellings(name))]
    if unused := chosen.without_hit():
        hint = did_you_mean(unused[0].text, [t.clean for t in targets.entries.values()])
        raise MappingError(f"freeze={unused[0].text!r} matches no model entry{hint}")
    return freeze_entries(model, names, targets, held)


def _live(target: Target) -> Tensor | None:
    """The tensor that now stands where the target stood; casts replace a module's buffers by new ones."""
    members: dict[str, Any] = target.owner._parameters if target.kind == "parameter" else target.owner._buffers
    tensor = members.get(target.leaf)
    return tensor if isinstance(tensor, Tensor) else None


def _to_hold(model: nn.Module, frozen: set[tuple[int, str]]) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []

    def visit(path: str, module: nn.Module) -> None:
        entries = [
            (id(owner), leaf)
            for owner in module.modules()
            for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]
            if tensor is not None and leaf not in owner._non_persistent_buffers_set
        ]
        if entries and all(entry in frozen for entry in entries):
            found.append((path, module))
            return
        if any((id(module), leaf) in frozen for leaf in _STATISTICS):
            found.append((path, module))
        for leaf, child in module.named_children():
            visit(f"{path}.{leaf}" if path else leaf, child)

    visit("", model)
    return found
