"""Meta and lazy entries: memory of their own, and the initialisation that their owner would have given them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from warmstart.mapping.buckets import Assignment
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.load_hooks.trials import stand_in
from warmstart.mapping.model.names import join, strip
from warmstart.mapping.plan.plan import Plan
from warmstart.modules import every_module
from warmstart.shards import full_shape, is_sharded, mesh_device, offloaded, same_draws, shard_of
from warmstart.tensors import same_bits


@dataclass(frozen=True, slots=True)
class _Owner:
    """A module that has to initialise some of its own tensors, because nothing else gives them a value.

    Attributes:
        path: Its path in the model.
        module: The module.
        leaves: Names of its tensors on meta that get no value, or not all of their elements.
        initialise: Initialises the whole module; None if it has no way to.
    """

    path: str
    module: nn.Module
    leaves: tuple[str, ...]
    initialise: Callable[[nn.Module], object] | None


class Unborn:
    """What of a plan has no memory yet: found once, before anything is given some.

    Attributes:
        tensors: What is on meta in scope, and what is tied to it, by identity.
        transient: Names of the non-persistent buffers that are on meta.
        owners: The modules in scope that have tensors on meta without a value, in the model's order.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.tensors = _on_meta(plan)
        self.transient = _transient(plan)
        self.owners = list(_owners(plan, self.tensors, self.transient))

    def __bool__(self) -> bool:
        """Whether `materialise` has anything to do."""
        return bool(self.tensors or self.transient) or any(each.reshapes for each in self._plan.assignments)

    def mappable(self) -> Iterator[Assignment]:
        """Those whose entry may have a file's own pages for its memory: it goes to the CPU, and is not tied."""
        if not self.tensors or torch.get_default_device().type not in {"cpu", "meta"}:
            return
        targets = self._plan.targets
        for assignment in self._plan.written:
            target = targets.entries[assignment.target]
            alone = target.canonical not in targets.groups and not is_sharded(target.tensor)
            if alone and id(target.tensor) in self.tensors:
                yield assignment


def materialise(plan: Plan, unborn: Unborn, memory: Mapping[int, Tensor]) -> list[str]:
    """Give what is in scope and on meta, or lazy, memory, and let owners initialise what the plan gives no value.

    A tensor on meta is swapped for a real one inside its own object, so that ties, names and whoever holds it keep it.
    Only an owner's initialisation draws random numbers, in the order of the model. What else the owner holds is put back.

    Ranks that share the model draw alike. They exchange that before anything can fail on one of them.

    Args:
        plan: The plan.
        unborn: What of it has no memory.
        memory: For some of these, by identity, what they get: of their shape and dtype.

    Returns:
        Notes on what was initialised.
    """
    owners = unborn.owners
    drawn = (t for owner in owners for module in owner.module.modules() for t in _held(module).values())
    home, cpu = torch.get_default_device(), torch.device("cpu")
    with torch.no_grad(), same_draws(drawn):
        for assignment in plan.assignments:
            tensor = plan.targets.entries[assignment.target].tensor
            if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                tensor.materialize(assignment.shape, dtype=assignment.dtype)
                if tensor.is_meta:
                    _swap(tensor, _real(tensor, home))
            elif full_shape(tensor) != assignment.shape:  # an observer's, which takes the shape of what it is given
                tensor.resize_(assignment.shape)
        own = [(owner, _held(owner.module)) for owner in owners]
        was_real = {id(t) for module in every_module(plan.model) for t in _held(module).values() if not t.is_meta}
        on_cpu = offloaded(plan.model)
        with _weak_references(plan.model):
            for key, tensor in unborn.tensors.items():
                device = cpu if key in on_cpu else mesh_device(tensor) or home
                _swap(tensor, _real(tensor, device, None if owners else memory.get(key)))
            for owner, held in own:
                for leaf in owner.leaves:
                    if held[leaf].is_meta:
                        _swap(held[leaf], _real(held[leaf], mesh_device(held[leaf]) or home))
        for owner, _ in own:
            # An owner may initialise what is below it as well: what had a value keeps it.
            below = [t for m in owner.module.modules() for t in _held(m).values() if id(t) in was_real]
            kept = [(tensor, tensor.clone()) for tensor in below if not is_sharded(tensor)]
            assert owner.initialise is not None
            with _whole(owner):
                owner.initialise(owner.module)
            for tensor, value in kept:
                tensor.copy_(value)
            was_real.update(id(_held(owner.module)[leaf]) for leaf in owner.leaves)
    if not owners:
        return []
    for key, pages in memory.items():  # only now: an owner may write to whatever it can reach
        unborn.tensors[key].data = pages
    names = [join(owner.path, leaf) for owner in owners for leaf in owner.leaves]
    return [f"{len(names)} entries were on meta and were initialised by their own modules: {', '.join(names[:4])}"]


def uninitialisable(plan: Plan, unborn: Unborn) -> list[str]:
    """What a load would leave on meta or without a value, in words; decided on copies, with no random number drawn."""
    lost = []
    for owner in unborn.owners:
        left = owner.leaves if owner.initialise is None else _untouched(owner)
        kind = type(owner.module).__name__
        why = "has no reset_parameters()" if owner.initialise is None else "does not set it when it initialises itself"
        lost += [(join(owner.path, leaf), f"{kind} {why}") for leaf in left]
    entries = [
        t
        for t in plan.targets.entries.values()
        if id(t.tensor) in unborn.tensors and not isinstance(t.owner, nn.RNNBase)
    ]
    if watched := [target.name for target in entries if weakref.getweakrefs(target.tensor)]:
        message = f"meta: something holds weak references to {printable(watched[0])} (one of {len(watched)}), so that it cannot"
        return [f"{message} get memory\n  -> build the model on a real device"]
    if not lost:
        return []
    buffers = {name for name, _ in lost} & unborn.transient
    fix = (
        "build the model with real buffers: `with torch.device('meta')` moves them too, "
        "accelerate.init_empty_weights(include_buffers=False) does not"
        if len(buffers) == len(lost)
        else f'give them a constant, fill={{"{lost[0][0]}": 0.0}}, or build the model on a real device'
    )
    return [
        f"meta: {len(lost)} entries are on the meta device and nothing gives them a value\n{listed(lost)}\n  -> {fix}"
    ]


def _on_meta(plan: Plan) -> dict[int, Tensor]:
    unborn = [target for target in plan.targets.entries.values() if target.tensor.is_meta and not target.lazy]
    scope = {name for part in plan.parts for name in part.scope} if unborn else set()
    return {id(target.tensor): target.tensor for target in unborn if target.name in scope}


def _owners(plan: Plan, unborn: Mapping[int, Tensor], transient: Set[str]) -> Iterator[_Owner]:
    # An alias is the same tensor as the entry that is written in its place.
    written = (a for a in plan.assignments if a.alias_of is None and not a.keeps)
    whole = {id(plan.targets.entries[a.target].tensor) for a in written}
    if unborn.keys() <= whole and not transient:
        return
    scope = {name for part in plan.parts for name in part.scope}
    roots = [plan.targets.clean_paths.get(part.pretrained.into, part.pretrained.into) for part in plan.parts]
    met: set[int] = set()
    for module, path in every_module(plan.model).items():
        clean = plan.targets.clean_paths.get(path, path)
        inside = any(not root or clean == root or strip(clean, root) is not None for root in roots)
        leaves = []
        for leaf, tensor in _held(module).items():
            if not tensor.is_meta or id(tensor) in whole or id(tensor) in met:
                continue
            if join(path, leaf) in scope or (inside and leaf in module._non_persistent_buffers_set):
                leaves.append(leaf)
                met.add(id(tensor))
        if leaves:
            yield _Owner(path, module, tuple(leaves), _initialiser(plan.model, path, module))


def _transient(plan: Plan) -> set[str]:
    having = ((module, path) for module, path in every_module(plan.model).items() if module._non_persistent_buffers_set)
    return {
        join(path, leaf)
        for module, path in having
        for leaf in module._non_persistent_buffers_set
        if (tensor := module._buffers.get(leaf)) is not None and tensor.is_meta
    }


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {
        leaf: t
        for leaf, t in [*module._parameters.items(), *module._buffers.items()]
        if t is not None and not is_lazy(t)
    }


@contextmanager
def _whole(owner: _Owner) -> Iterator[None]:
    """Whole tensors in the places of sharded ones while their owner initialises itself; a rank keeps its part of them.

    So the values are those that one process would draw, whatever the engine makes of random numbers on shards.
    """
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (members, leaf, tensor)
        for module in owner.module.modules()
        for members in (module._parameters, module._buffers)
        for leaf, tensor in members.items()
        if tensor is not None and is_sharded(tensor)
    ]
    whole: dict[int, Tensor] = {}
    for members, leaf, tensor in places:
        if id(tensor) not in whole:
            value = torch.empty(full_shape(tensor), dtype=tensor.dtype, device="cpu")
            parameter = isinstance(tensor, nn.Parameter)
            whole[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if parameter else value
        members[leaf] = whole[id(tensor)]
    try:
        yield
    finally:
        for members, leaf, tensor in places:
            members[leaf] = tensor
    for tensor in (_held(owner.module)[leaf] for leaf in owner.leaves):
        if id(tensor) in whole:
            shard = shard_of(tensor)
            shard.local.copy_(whole[id(tensor)] if shard.region is None else shard.region.take(whole[id(tensor)]))


def _real(tensor: Tensor, device: torch.device, memory: Tensor | None = None) -> Tensor:
    """A tensor like one on meta, with memory on `device` (on the CPU for meta), and its dtype, strides and flags."""
    device = torch.device("cpu") if device.type == "meta" else device
    if memory is not None:
        real = memory
    elif type(tensor) in {Tensor, nn.Parameter} and tensor.layout == torch.strided and tensor.is_contiguous():
        # For a tensor on meta `empty_like` is Python, and the first call imports sympy: 0.5 s and 30 MiB.
        real = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        real = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        real = nn.Parameter(real, requires_grad=tensor.requires_grad)
    real.__dict__.update(tensor.__dict__)
    return real


@contextmanager
def _weak_references(model: nn.Module) -> Iterator[None]:
    """Recurrent layers keep weak references to their weights, which torch does not swap: set aside, and made again."""
    layers = [module for module in every_module(model) if isinstance(module, nn.RNNBase)]
    for layer in layers:
        layer._flat_weight_refs = []
    try:
        yield
    finally:
        for layer in layers:
            layer._init_flat_weights()


def _swap(tensor: Tensor, real: Tensor) -> None:
    """Put `real` inside the object `tensor`, which everything that refers to it keeps."""
    torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]


def _initialiser(model: nn.Module, path: str, module: nn.Module) -> Callable[[nn.Module], object] | None:
    """The module's own `reset_parameters`, or the `_init_weights` of the nearest model above it, as transformers has it."""
    if callable(getattr(module, "reset_parameters", None)):
        return lambda owner: owner.reset_parameters()  # type: ignore[operator]
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        above = model.get_submodule(".".join(parts[:depth]))
        if callable(init := getattr(above, "_init_weights", None)):
            return init  # type: ignore[no-any-return]
    return None


def _untouched(owner: _Owner) -> list[str]:
    """The leaves that the owner's initialisation does not write to, tried on a copy."""
    real = [t for m in owner.module.modules() for t in _held(m).values() if not t.is_meta and not is_sharded(t)]
    trial = stand_in(owner.module, {id(tensor): tensor.detach() for tensor in real})
    held = _held(trial)
    for tensor in held.values():
        if tensor.is_meta:
            _swap(tensor, _real(tensor, mesh_device(tensor) or torch.get_default_device()))
    before = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for leaf in owner.leaves:
            # A value that nobody initialises with, to be seen through writes that torch does not count (`.data`).
            held[leaf].fill_(float("nan") if held[leaf].is_floating_point() or held[leaf].is_complex() else 90)
            before[leaf] = (held[leaf], held[leaf].clone(), held[leaf]._version)
        assert owner.initialise is not None
        owner.initialise(trial)
    after = _held(trial)
    return [
        leaf
        for leaf, (tensor, value, version) in before.items()
        if after.get(leaf) is tensor and tensor._version == version and same_bits(tensor, value)
    ]
