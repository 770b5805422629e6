"""The model's side: every entry with its name, its name without wrappers, its shape, and what it is tied to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from warmstart.errors import MappingError, TimingError
from warmstart.mapping.model.names import WRAPPER_SEGMENTS, without_wrappers, wrapped_child
from warmstart.mapping.model.peft import PEFT_SEGMENTS, AdapterEntry, base_child, cleaner, member_of_adapter, prefix_of
from warmstart.modules import every_module
from warmstart.shards import full_shape, is_sharded, sharded_behind

Kind = Literal["parameter", "buffer"]


@dataclass(slots=True, eq=False)
class Target:
    """One parameter or persistent buffer of the model. (Not frozen, which would make it three times as slow to make.)

    Attributes:
        name: As the module tree spells it, wrapper segments included.
        clean: The same without wrapper segments.
        tensor: The parameter or buffer itself.
        owner: The module that holds it.
        leaf: Its name in `owner`.
        adapter: Where it stands in a PEFT adapter; None for an entry of the model itself.
        shape: Its shape, of a sharded one the whole tensor's; `()` for a lazy one, which has none yet.
        lazy: Whether it had no shape when it was found: a load gives it the checkpoint's.
        numel: Its number of elements, in all shards; 0 for a lazy one.
        alias_of: Name of the first entry that is the same tensor; None for the first one.
    """

    name: str
    clean: str
    kind: Kind
    tensor: Tensor
    owner: nn.Module
    leaf: str
    adapter: AdapterEntry | None
    shape: tuple[int, ...]
    lazy: bool
    numel: int
    alias_of: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def canonical(self) -> str:
        """The name of the first entry that is this tensor."""
        return self.alias_of or self.name


@dataclass(slots=True)
class Targets:
    """All entries of a model, found once.

    Attributes:
        entries: Name to entry, in the model's order.
        modules: Clean path to module, for `into`; the spelled path is a key as well.
        transient: Clean names of non-persistent buffers.
        extra_state: Clean names of modules' `_extra_state`.
        wrapper_own: Names that wrapper modules hold themselves (an averaged model's counter), to the same without wrappers.
        wrapped: Type names of the wrappers met.
        clean_paths: Module path as spelled to its clean path.
        clean_modules: Clean path to the innermost module there, past its wrappers.
        groups: First name to all names, of every tensor that has more than one.
        peft_prefixes: Paths that PEFT puts before the names of this model in its files.
    """

    entries: dict[str, Target] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    transient: set[str] = field(default_factory=set)
    extra_state: set[str] = field(default_factory=set)
    wrapper_own: dict[str, str] = field(default_factory=dict)
    wrapped: set[str] = field(default_factory=set)
    clean_paths: dict[str, str] = field(default_factory=dict)
    clean_modules: dict[str, nn.Module] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    peft_prefixes: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> Targets:
        """All entries of `model`.

        Raises:
            TimingError: Wrapped parameters are flattened into one.
            MappingError: Two entries have one name, or shards do not say what they are shards of.
        """
        targets = cls()
        tied = _Ties()
        clean_names: dict[str, str] = {}
        for target in _walk(model, targets):
            first = tied.first(target)
            if first != target.name:
                target.alias_of = first
            other = clean_names.setdefault(target.clean, target.name)
            if other != target.name:
                if targets.entries[other].canonical == target.canonical:
                    continue  # one module that its wrapper holds under two names
                raise MappingError(
                    f"'{other}' and '{target.name}' are both '{target.clean}' without their wrappers; "
                    "load into the module inside the wrapper instead"
                )
            targets.entries[target.name] = target
            if target.alias_of is not None:
                targets.groups.setdefault(target.alias_of, [target.alias_of]).append(target.name)
        _refuse_flattened(targets)
        return targets

    def spellings(self, name: str) -> tuple[str, ...]:
        """An entry's name with and without wrapper segments."""
        clean = self.entries[name].clean
        return (name,) if clean == name else (name, clean)

    def clean_segments(self) -> set[str]:
        names = [t.clean for t in self.entries.values()] + [*self.transient, *self.extra_state]
        return {segment for name in names for segment in name.split(".")}

    def key_cleaner(self) -> Callable[[str], str]:
        """What takes wrapper segments out of a checkpoint's keys, wherever the model's own names do not have them."""
        own = self.clean_segments()
        segments, without_peft = WRAPPER_SEGMENTS - own, cleaner(self.peft_prefixes, own)
        of_others = segments | PEFT_SEGMENTS

        def clean(key: str) -> str:
            return key if of_others.isdisjoint(key.split(".")) else without_peft(without_wrappers(key, segments))

        return clean

    def follow(self, model: nn.Module) -> None:
        """Let go of the whole tensors that an engine has put shards in the place of, so that their memory is free."""
        live = Live(model)
        for name, target in self.entries.items():
            tensor = live.tensor(target)
            if tensor is not None and tensor is not target.tensor and is_sharded(tensor):
                self.entries[name] = replace(target, tensor=tensor)


class Live:
    """What a model holds now, to find again what it held when its targets were taken: by identity, never by name.

    A parameter that moved (into a parametrization, into another module) is found by its object. A buffer that a cast
    replaced is found where it stood. What stood in a module that is no longer in the model is gone.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = every_module(model)
        members = (m for module in modules for m in (module._parameters, module._buffers))
        self._modules = {id(module) for module in modules}
        self._behind = sharded_behind(model)
        self.tensors = {id(self._behind.get(id(t), t)) for m in members for t in m.values() if t is not None}

    def has(self, module: nn.Module) -> bool:
        return id(module) in self._modules

    def tensor(self, target: Target) -> Tensor | None:
        if self.has(target.owner):
            members = target.owner._parameters if target.kind == "parameter" else target.owner._buffers
            # A TorchScript module's members have no `get`.
            if target.leaf in members and (tensor := members[target.leaf]) is not None:
                return self._behind.get(id(tensor), tensor)
        return target.tensor if id(target.tensor) in self.tensors else None


def _walk(model: nn.Module, targets: Targets) -> Iterator[Target]:
    """Depth first, in registration order, every path to every tensor (a shared module is met under each of its names)."""
    stack: list[tuple[nn.Module, str, str, AdapterEntry | None, tuple[int, ...]]] = [(model, "", "", None, ())]
    behind = sharded_behind(model)
    while stack:
        module, path, clean, at, above = stack.pop()
        if id(module) in above:
            continue
        wrapper = wrapped_child(module)
        base = base_child(module) if at is None else None
        if wrapper is not None:
            targets.wrapped.add(type(module).__name__)
        if base is not None:
            targets.peft_prefixes.add(prefix_of(module))
        targets.modules.setdefault(clean, module)
        if path != clean:
            targets.modules.setdefault(path, module)
        targets.clean_paths.setdefault(path, clean)
        if wrapper is None and base is None:
            targets.clean_modules.setdefault(clean, module)
        both: tuple[tuple[Kind, Mapping[str, Tensor | None]], ...] = (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
        )
        outside = at is None and base is None
        prefix, clean_prefix = (f"{each}." if each else "" for each in (path, clean))
        for kind, members in both:
            for leaf, tensor in members.items():
                if tensor is None:
                    continue
                tensor = behind.get(id(tensor), tensor)
                name = prefix + leaf
                clean_name = name if path == clean else clean_prefix + leaf
                if wrapper is not None:
                    targets.wrapper_own[name] = clean_name
                elif kind == "buffer" and leaf in module._non_persistent_buffers_set:
                    targets.transient.add(clean_name)
                else:
                    lazy = is_lazy(tensor)
                    shape = () if lazy else full_shape(tensor)
                    adapter = None if outside else member_of_adapter(module, base, clean, at, leaf)
                    numel = 0 if lazy else math.prod(shape)
                    yield Target(name, clean_name, kind, tensor, module, leaf, adapter, shape, lazy, numel)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            targets.extra_state.add(clean_prefix + "_extra_state")
        children = [(n, m) for n, m in module._modules.items() if m is not None]
        above = (*above, id(module))
        for leaf, child in reversed(children):
            child_path = prefix + leaf
            child_clean = clean if leaf in (wrapper, base) else child_path if path == clean else clean_prefix + leaf
            inside = at if outside or leaf == wrapper else member_of_adapter(module, base, clean, at, leaf)
            stack.append((child, child_path, child_clean, inside, above))


class _Ties:
    """The first name of each tensor: of the same object, or of another view of exactly the same memory."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._at: dict[int, list[Target]] = {}  # by the address where they start

    def first(self, target: Target) -> str:
        tensor, name = target.tensor, target.name
        first = self._names.setdefault(id(tensor), name)
        if first != name or target.lazy or tensor.is_meta or not target.numel or is_sharded(tensor):
            return first
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # a subclass without storage of its own
            return first
        if address:
            others = self._at.setdefault(address, [])
            for other in others:
                seen = other.tensor
                if (seen.shape, seen.stride(), seen.dtype) == (tensor.shape, tensor.stride(), tensor.dtype):
                    self._names[id(tensor)] = other.name
                    return other.name
            others.append(target)
        return first


def _refuse_flattened(targets: Targets) -> None:
    if "FullyShardedDataParallel" in targets.wrapped:
        raise TimingError(
            "the model is wrapped in FullyShardedDataParallel, which keeps many parameters as one flat one; load before the "
            "wrap, or shard with torch.distributed.fsdp.fully_shard, which can be loaded into at any time"
        )
