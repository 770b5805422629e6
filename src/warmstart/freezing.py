"""Freezing that holds: parameters and buffers, bit for bit, until they are released on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from warmstart.errors import FrozenChangedError, MappingError, TimingError
from warmstart.held_modules import STATISTICS, hold_instead, subtrees_to_hold
from warmstart.held_rows import HeldRows
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.hints import did_you_mean
from warmstart.mapping.model.targets import Live, Target, Targets
from warmstart.patterns import Patterns, PatternSet
from warmstart.shards import gathered, is_sharded, local_of, reshard
from warmstart.tensors import digest, sample

Held = Literal["eval", "train"]


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    dtype: torch.dtype
    full: int
    sampled: int
    sharded: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Fingerprint:
        local = local_of(tensor)
        return cls(local.dtype, digest(local), digest(sample(local)), is_sharded(tensor))


class Frozen:
    """What is frozen in a model, with a digest of every tensor.

    Attributes:
        names: The frozen entries, sorted, as the model spells them.
        declared: The entries that were frozen at first, those released since included.
        rows: Entries of which some rows are held and the others train, with those rows.
        trained: Those of them that trained before.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        held: Held = "eval",
        trained: frozenset[str] | None = None,
        rows: Mapping[str, HeldRows] | None = None,
        row_targets: Mapping[str, Target] | None = None,
        row_names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.model = model
        self._targets = {target.name: target for target in targets}
        self.declared = self.names
        if unborn := [target.name for target in targets if target.tensor.is_meta]:
            raise TimingError(
                f"{len(unborn)} entries are on the meta device and have no values to hold yet\n"
                f"{listed((name, '') for name in unborn)}\n"
                "  -> freeze them when they are loaded, freeze=; an optimizer that is made before leaves them out after "
                "requires_grad_(False)"
            )
        self.rows = dict(rows or {})
        self._row_targets = dict(row_targets or {})
        self._row_names = dict(row_names or {})
        # Only what trained before will train again when it is released.
        training = frozenset(t.name for t in targets if t.kind == "parameter" and t.tensor.requires_grad)
        self.trained = training if trained is None else trained
        self._let([target for target in targets if target.kind == "parameter"], train=False)
        self._deferred: list[Target] = []
        self._sealed: frozenset[str] = frozenset()
        self._held: list[tuple[str, list[nn.Module]]] = []
        self._holds = held == "eval"
        self._hold()
        self._fingerprints = {name: _Fingerprint.of(target.tensor) for name, target in self._targets.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._targets))

    @property
    def targets(self) -> tuple[Target, ...]:
        """The frozen entries themselves, and those of which some rows are."""
        return (*self._targets.values(), *self._row_targets.values())

    @property
    def held(self) -> tuple[str, ...]:
        """Paths of the highest modules that are held in eval mode."""
        return tuple(path for path, _ in self._held)

    @property
    def held_modules(self) -> tuple[nn.Module, ...]:
        """Every module that is held, once or more."""
        return tuple(module for _, modules in self._held for module in modules)

    def __len__(self) -> int:
        return len(self._targets)

    def check(self, *, sampled: bool = False) -> None:
        """Compare every frozen tensor with its digest.

        Args:
            sampled: Compare a fixed sample of at most 4096 elements of each tensor instead of all.

        Raises:
            FrozenChangedError: A tensor moved, was replaced, or is trainable again.
        """
        live = Live(self.model)
        moved: list[tuple[str, str]] = []
        for name, target in self._targets.items():
            tensor = live.tensor(target)
            if tensor is None:
                moved.append((name, "is no longer part of the model"))
            elif target.kind == "parameter" and tensor is not target.tensor:
                moved.append((name, "was replaced by another parameter"))
            elif tensor.requires_grad and target.kind == "parameter":
                moved.append((name, "has requires_grad=True again"))
            elif not self._equal(tensor, name, sampled):
                moved.append((name, "has other values"))
        for name, rows in self.rows.items():
            if id(rows.tensor) not in live.tensors:
                moved.append((name, "was replaced by another parameter"))
            elif not rows.unchanged(sampled=sampled):
                moved.append((name, "has other values in rows that are held"))
        if moved:
            raise FrozenChangedError(
                f"{len(moved)} of {len(self) + len(self.rows)} frozen tensors are not what was frozen\n{listed(moved)}\n"
                "  -> something wrote to them after the freeze; release what is meant to train: "
                f'report.frozen.release(["{printable(moved[0][0])}"]){self._left_in_train([name for name, _ in moved])}',
                tensors=tuple(name for name, _ in moved),
            )

    def follow(self, *, resumed: bool) -> None:
        """Go on with the shards that an engine has made of whole frozen parameters, or put in their place; each rank calls it.

        The shards of all ranks together must be what was frozen or held, unless a resume has put the run's own values there.
        """
        live = Live(self.model)
        for name, target in sorted(self._targets.items()):
            tensor, known = live.tensor(target), self._fingerprints[name]
            if tensor is None or known.sharded or not is_sharded(tensor):
                continue
            if resumed or digest(gathered(tensor).to(known.dtype)) == known.full:
                self._targets[name] = dataclasses.replace(target, tensor=tensor)
                self._fingerprints[name] = _Fingerprint.of(tensor)
        self._deferred = [self._targets[target.name] for target in self._deferred]
        for name, rows in sorted(self.rows.items()):
            tensor = live.tensor(self._row_targets[name])
            if tensor is not None and is_sharded(tensor) and not is_sharded(rows.tensor):
                rows.follow(tensor, resumed=resumed)
                self._row_targets[name] = dataclasses.replace(self._row_targets[name], tensor=rows.tensor)

    def inherit(self, heirs: Mapping[int, nn.Module]) -> None:
        """Hold the modules that a host has put in the place of others, by the others' ids."""

        def moved(target: Target) -> Target:
            return dataclasses.replace(target, owner=heirs.get(id(target.owner), target.owner))

        self._targets = {name: moved(target) for name, target in self._targets.items()}
        self._row_targets = {name: moved(target) for name, target in self._row_targets.items()}
        self._deferred = [self._targets[target.name] for target in self._deferred]
        self._hold()

    def rebase(self, *, all_values: bool) -> None:
        """Take the present values as the frozen ones: all (a resume put the run's own there), or where the dtype changed."""
        live = Live(self.model)
        for name, target in self._targets.items():
            tensor = live.tensor(target)
            if tensor is not None and (all_values or tensor.dtype != self._fingerprints[name].dtype):
                self._fingerprints[name] = _Fingerprint.of(tensor)
        for rows in self.rows.values() if all_values else ():
            rows.rebase()

    def defer(self, patterns: Patterns) -> tuple[str, ...]:
        """Let parameters that will be released later train until `enforce`: what is made in between takes them in.

        An optimizer and a wrapper made in between hold them from the start, so that neither changes shape later.

        Returns:
            The entries that the patterns match.

        Raises:
            MappingError: A pattern matches nothing that is frozen.
        """
        chosen = PatternSet(patterns, where="unfreeze")
        names = [name for name, target in self._targets.items() if chosen.matches(name, target.clean)]
        names += [name for name in self.rows if chosen.matches(name)]
        if unused := chosen.without_hit():
            hint = did_you_mean(unused[0].text, [*self._targets, *self.rows])
            raise MappingError(f"unfreeze={unused[0].text!r} matches nothing that is frozen{hint}")
        self._deferred = [t for name, t in self._targets.items() if name in self.trained.intersection(names)]
        self._let(self._deferred, train=True)
        return tuple(names)

    def enforce(self) -> None:
        """Freeze what was deferred."""
        self._let(self._deferred, train=False)
        self._deferred = []

    def seal(self) -> None:
        """The model is wrapped in what averages gradients over ranks, which never averages those of what is frozen now."""
        self._sealed = frozenset(name for name, target in self._targets.items() if not target.tensor.requires_grad)

    def release(self, patterns: Patterns, optimizer: torch.optim.Optimizer | None = None) -> tuple[str, ...]:
        """Unfreeze what the patterns match, and end the eval mode that was held for it.

        Args:
            patterns: Names of frozen entries, as everywhere.
            optimizer: Given, parameters that none of its groups holds yet are added to it as a new group.

        Returns:
            The entries that train from now on.

        Raises:
            MappingError: A pattern matches nothing that is frozen.
            TimingError: Ranks would train what was frozen when the model was wrapped apart from each other.
        """
        chosen = PatternSet(patterns, where="release")
        released = [n for n, t in self._targets.items() if chosen.matches(n, t.clean)]
        partly = [
            name for name, spellings in self._row_names.items() if name in self.rows and chosen.matches(*spellings)
        ]
        if unused := chosen.without_hit():
            hint = did_you_mean(unused[0].text, [*self._targets, *self.rows])
            raise MappingError(f"release({unused[0].text!r}) matches nothing that is frozen{hint}")
        if apart := [name for name in released if name in self._sealed and name in self.trained]:
            raise TimingError(
                f"{len(apart)} parameters were frozen when the model was wrapped in DistributedDataParallel, which would not "
                f"average their gradients: each rank would train its own\n{listed((name, '') for name in apart)}\n"
                f'  -> say so before it is wrapped: unfreeze={{100: ["{printable(apart[0])}"]}}, find_unused_parameters=True'
            )
        for name in partly:
            self.rows.pop(name).release()
        targets = [self._targets.pop(name) for name in released]
        for name in released:
            self._fingerprints.pop(name)
        training = [target for target in targets if target.name in self.trained]
        self._let(training, train=True)
        self._hold()
        if optimizer is not None:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            new = list({id(t.tensor): t.tensor for t in training if id(t.tensor) not in known}.values())
            if new:
                optimizer.add_param_group({"params": new})
        return (*released, *partly)

    def _let(self, targets: Sequence[Target], *, train: bool) -> None:
        for target in targets:
            target.tensor.requires_grad_(train)
            if not train:
                target.tensor.grad = None
        if targets:  # FSDP2 keeps gathered what had no backward, and looks at the flag where it gathers
            reshard(self.model)

    def _equal(self, tensor: Tensor, name: str, sampled: bool) -> bool:
        known, local = self._fingerprints[name], local_of(tensor)
        return digest(sample(local)) == known.sampled if sampled else digest(local) == known.full

    def _left_in_train(self, moved: list[str]) -> str:
        """What to type where running statistics moved because modes were to be left alone."""
        statistics = not self._holds and any(
            self._targets[name].kind == "buffer" for name in moved if name in self._targets
        )
        return (
            '; statistics that run on are why frozen modules are held in eval: leave held="train" out'
            if statistics
            else ""
        )

    def _hold(self) -> None:
        """Hold each maximal subtree that is frozen as a whole, and each module with frozen statistics, in eval."""
        frozen = {(id(t.owner), t.leaf) for t in self._targets.values()}
        wanted = subtrees_to_hold(self.model, frozen) if self._holds else []
        hold_instead([m for _, modules in self._held for m in modules], [m for _, modules in wanted for m in modules])
        self._held = wanted


def freeze_entries(
    model: nn.Module,
    names: Iterable[str],
    targets: Targets,
    held: Held = "eval",
    trained: frozenset[str] | None = None,
    rows: Mapping[str, Tensor | None] | None = None,
) -> Frozen:
    """Freeze entries by name; a BatchNorm's counter goes with its statistics.

    Args:
        model: The model.
        names: The entries, as the model spells them.
        targets: The model's entries.
        held: `"eval"` holds modules that are frozen as a whole in eval mode.
        trained: The entries that train again when released; None: those that train now.
        rows: Entries of which only some rows are frozen, with those rows as booleans; None: every row.
    """
    chosen = {name: targets.entries[name] for name in names}
    owners = {id(t.owner) for t in chosen.values() if t.leaf in STATISTICS}
    for name, target in targets.entries.items():
        if target.leaf == "num_batches_tracked" and id(target.owner) in owners:
            chosen.setdefault(name, target)
    frozen = {id(target.tensor) for target in chosen.values()}
    held_rows: dict[int, tuple[str, HeldRows]] = {}  # a tied parameter once
    for name, mask in (rows or {}).items():
        tensor = targets.entries[name].tensor
        if id(tensor) not in frozen and id(tensor) not in held_rows:
            held_rows[id(tensor)] = (name, HeldRows(tensor, mask))
    row_targets = {name: targets.entries[name] for name, _ in held_rows.values()}
    names_of = {
        name: tuple(s for tied in targets.groups.get(target.canonical, [name]) for s in targets.spellings(tied))
        for name, target in row_targets.items()
    }
    return Frozen(model, list(chosen.values()), held, trained, dict(held_rows.values()), row_targets, names_of)


def freeze_patterns(model: nn.Module, patterns: Patterns, held: Held = "eval") -> Frozen:
    """Freeze what patterns match.

    Raises:
        MappingError: A pattern matches nothing.
    """
    return freeze_entries(model, entries_matching(model, patterns), Targets.of(model), held)


def entries_matching(model: nn.Module, patterns: Patterns) -> list[str]:
    """The entries that patterns name.

    Raises:
        MappingError: A pattern matches nothing.
    """
    targets = Targets.of(model)
    chosen = PatternSet(patterns, where="freeze")
    names = [name for name in targets.entries if chosen.matches(*targets.spellings(name))]
    if unused := chosen.without_hit():
        hint = did_you_mean(unused[0].text, [t.clean for t in targets.entries.values()])
        raise MappingError(f"freeze={unused[0].text!r} matches no model entry{hint}")
    return names


def refuse_wrapped(targets: Targets) -> None:
    """Refuse to freeze in a model whose wrapper was made for gradients of what trained then.

    Raises:
        TimingError: The model is wrapped in DistributedDataParallel.
    """
    if "DistributedDataParallel" in targets.wrapped:
        raise TimingError(
            "the model is wrapped in DistributedDataParallel, whose reducer would wait for the frozen parameters; load "
            "and freeze first, then wrap: warmstart.load(model, ..., freeze=...); model = DistributedDataParallel(model)"
        )
