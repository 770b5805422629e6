"""Trying a module's own way to load on a stand-in of it, and following which tensor ends up where."""

from __future__ import annotations

import functools
import itertools
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from warmstart.errors import MappingError
from warmstart.mapping.derivations import Shape
from warmstart.shards import full_shape, is_sharded, unsharded_type

_aten = torch.ops.aten


@dataclass(slots=True)
class Outcome:
    """What a module's own way to load made of the tensors it was given, names as given.

    Attributes:
        values: The tensors it leaves: for each of the module's own entries what was put into it, and what is passed on to
            its children.
        as_given: Of these, the ones that are a given tensor, untouched: name to the name it was given under.
        made_from: Of the others: the given names and the module's own tensors they were computed from.
        changed: Given tensors that were written to.
        shapes: Entries that took another shape, or their first one, to hold their value.
        excused: Entries without a value that the module does not call missing.
        refusals: What the module itself has to say against what it was given.
    """

    values: dict[str, Tensor]
    as_given: dict[str, str]
    made_from: dict[str, tuple[frozenset[str], frozenset[int]]]
    changed: set[str]
    shapes: dict[str, Shape]
    excused: list[str]
    refusals: list[str]


class Trial:
    """A module's own way to load, to be run on stand-ins: the module itself is neither written to nor kept.

    What torch does for one module in `load_state_dict`: `_load_from_state_dict` with the keys below the module's path,
    pre-hooks included.
    """

    def __init__(self, module: nn.Module, prefix: str, version: Mapping[str, object]) -> None:
        self._prefix = prefix
        self._version = dict(version)
        twins = _twins(module, {}, torch.device("meta"))
        self._stand_in: nn.Module = twins[id(module)]
        # The real tensors by their stand-ins, for the few that a value is computed from; dropped by `let_go`.
        self._real = {id(twins[id(t)]): t for t in _tensors(module) if not is_lazy(t)}

    def held(self, stand_ins: frozenset[int]) -> dict[int, Tensor]:
        """What the module holds now, on the CPU, of the tensors that `Outcome.made_from` names.

        Raises:
            MappingError: This process holds a part of them only.
        """
        real = {number: self._real[number] for number in sorted(stand_ins)}
        if any(is_sharded(tensor) for tensor in real.values()):
            raise MappingError(
                f"'{self._prefix}*' computes what it loads from tensors of its own, which are sharded over ranks; load before "
                "the model is sharded, or leave the module out with exclude="
            )
        return {number: tensor.detach().cpu().clone() for number, tensor in real.items()}

    def let_go(self) -> None:
        """Keep the stand-ins only: what the module is and holds from here on does not matter."""
        self._real = {}

    def run(self, given: Mapping[str, Tensor], held: Mapping[int, Tensor] | None = None) -> Outcome:
        """Load `given` into a stand-in.

        Args:
            given: Tensors by name; on the meta device where only the shape counts. Not written to, unless `changed` says so.
            held: What the module's own tensors hold, where values are wanted and come from there too; None while only
                shapes are: then nothing has a value, and a module that looks at one raises.

        Raises:
            Exception: Whatever the module's own code raises.
        """
        dry = held is None
        twins = _twins(self._stand_in, held or {}, torch.device("meta" if dry else "cpu"))
        module: nn.Module = twins[id(self._stand_in)]
        flow = _Flow(dry)
        stand_ins = {}
        for original in _tensors(self._stand_in):
            twin = twins[id(original)]
            if not is_lazy(twin):
                flow.follow(twin)
                stand_ins[_storage(twin)] = id(original)
        names = {}
        for name, tensor in given.items():
            if flow.follow(tensor):
                names[_storage(tensor)] = name
        before = {leaf: (t, _storage(t), tuple(t.shape)) for leaf, t in _entries(module) if not is_lazy(t)}
        state: dict[str, Any] = OrderedDict(given)
        missing: list[str] = []
        unexpected: list[str] = []
        messages: list[str] = []
        with warnings.catch_warnings(), torch.no_grad(), flow:
            warnings.simplefilter("ignore")
            module._load_from_state_dict(state, self._prefix, dict(self._version), True, missing, unexpected, messages)

        values = {k: v for k, v in state.items() if k.startswith(self._prefix) and isinstance(v, Tensor)}
        shapes: dict[str, Shape] = {}
        excused = []
        used: set[str] = set()
        moved = False  # into another tensor's memory, as by `.data = `: values and mere shapes cannot be mixed there
        for leaf, entry in _entries(module):
            name = self._prefix + leaf
            mismatched = any(message.startswith(f"size mismatch for {name}:") for message in messages)
            twin, memory, shape = before.get(leaf, (None, None, None))
            reached = None if is_lazy(entry) else flow.reached(entry, memory)
            if reached is not None:
                values[name] = reached
                used.update(names[o] for o in flow.made_from.get(_storage(reached), ()) if o in names)
                moved |= twin is entry and memory != _storage(entry)
                if shape != tuple(entry.shape):
                    shapes[name] = tuple(entry.shape)
            elif not mismatched:
                values.pop(name, None)  # given to it, and not taken
                if name not in missing:
                    excused.append(name)
        entries = {self._prefix + leaf for leaf, _ in _entries(module)}
        for name in used - entries - set(unexpected):
            if name[len(self._prefix) :].partition(".")[0] not in module._modules:
                values.pop(name, None)  # read, and left where it was: nobody comes for it any more
        outcome = Outcome(values, {}, {}, set(), shapes, excused, [])
        outcome.refusals = [m for m in messages if not m.startswith("size mismatch for ")]  # planning says those itself
        outcome.changed = {name for storage, name in names.items() if storage in flow.changed}
        own = [t for t in (*self._stand_in._parameters.values(), *self._stand_in._buffers.values()) if t is not None]
        everything = frozenset(given), frozenset(id(t) for t in own if not is_lazy(t))
        sources = {name: names.get(_storage(value)) for name, value in values.items()}
        unused = set(names.values()) - outcome.changed
        for name in sorted(values, key=lambda name: sources[name] != name):  # under its own name first, then as a copy
            value, source = values[name], sources[name]
            if source is not None and source in unused and _same_view(value, given[source]):
                outcome.as_given[name] = source
                unused.remove(source)
            elif moved:
                outcome.made_from[name] = everything
            else:
                origins = flow.made_from.get(_storage(value), frozenset())
                outcome.made_from[name] = (
                    frozenset(names[o] for o in origins if o in names),
                    frozenset(stand_ins[o] for o in origins if o in stand_ins),
                )
        return outcome


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows by storage what every tensor is computed from, and refuses writes to any that is not ours.

    A tensor without a value (on the meta device) makes whatever it meets one, so that values and mere shapes may mix.
    """

    def __init__(self, dry: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dry = dry
        self.made_from: dict[int, frozenset[int]] = {}
        self.changed: set[int] = set()
        self.copied: dict[int, tuple[Tensor, Shape]] = {}

    def follow(self, tensor: Tensor) -> bool:
        """Start from this tensor; False if another one with the same storage is followed already."""
        storage = _storage(tensor)
        new = storage not in self.made_from
        self.made_from[storage] = frozenset((storage,))
        return new

    def reached(self, entry: Tensor, before: int | None) -> Tensor | None:
        """The tensor that was put into an entry, which had the storage `before`; None if nothing was.

        The one that was copied into it last, or else itself.
        """
        storage = _storage(entry)
        source, shape = self.copied.get(storage, (None, None))
        if source is not None and shape == tuple(entry.shape):
            return source
        return None if storage == before and storage not in self.changed else entry

    def __torch_dispatch__(  # the arguments are whatever the operator takes
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = _written(func._schema, args, kwargs)
        shapes_only = any(t.is_meta for t in tensors)
        origins = frozenset[int]().union(*(self.made_from.get(_storage(t), frozenset()) for t in tensors))
        if not all(_storage(t) in self.made_from for t in written):
            raise RuntimeError("it writes to a tensor that is neither its own nor given to it")
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"] = torch.device("meta" if self.dry or shapes_only else "cpu")
        if func is _aten.copy_.default:
            self._copy(args[0], args[1])
        else:
            for t in written:
                self.copied.pop(_storage(t), None)
                if func is not _aten.resize_.default:
                    self.changed.add(_storage(t))
        for t in written:
            self.made_from[_storage(t)] |= origins
        if func is _aten.lift_fresh.default:  # a constant of the module's code
            out = torch.empty_like(args[0], device="meta") if self.dry else args[0]
            self.made_from[_storage(out)] = frozenset()
            return out
        if shapes_only:
            if any(not t.is_meta for t in written):
                return (
                    written[0] if len(written) == 1 else tuple(written)
                )  # without a value from here on: nobody needs it
            args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
        known = {_storage(t) for t in tensors}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := _storage(leaf)) not in known:
                self.made_from[storage] = origins
                self.copied.pop(storage, None)
                self.changed.discard(storage)
        return out

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if _storage(to) == _storage(source):
            return
        self.copied[_storage(to)] = (source, tuple(to.shape))
        self.changed.add(_storage(to))


def has_own_way(module: nn.Module) -> bool:
    """Whether a module loads in another way than torch's plain one."""
    function = getattr(module._load_from_state_dict, "__func__", None)
    return bool(module._load_state_dict_pre_hooks) or function not in _PLAIN


# torch's BatchNorm overrides it for its counter alone, which has a rule of its own in planning.
_PLAIN = (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)


def _entries(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers."""
    members = itertools.chain(module._parameters.items(), module._buffers.items())
    return [(n, t) for n, t in members if t is not None and n not in module._non_persistent_buffers_set]


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer at and below a module, once."""
    found = {
        id(t): t for m in module.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None
    }
    return list(found.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage show the same elements in the same way."""

    def view(t: Tensor) -> tuple[object, ...]:
        return t.dtype, t.shape, t.stride(), t.storage_offset(), t.is_conj(), t.is_neg()

    return view(a) == view(b)


def _written(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to."""
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def stand_in(module: nn.Module, values: Mapping[int, Tensor]) -> nn.Module:
    """A module like this one, down to its children, that may be run without touching it; sharded tensors are whole in it.

    Args:
        module: What it stands for.
        values: What its tensors hold, by the identity of the module's; the others are on the meta device.
    """
    twin: nn.Module = _twins(module, values, torch.device("meta"))[id(module)]
    return twin


def _twins(module: nn.Module, held: Mapping[int, Tensor], lazy: torch.device) -> dict[int, Any]:
    """Stand-ins of every module and tensor at and below `module`, by the identity of what they stand for.

    The modules are of the same types and share what is no tensor, module or plain container; their parameters and buffers
    are without values, but for those in `held`, and lie on the meta device, lazy ones on `lazy`. Deep copies would follow
    references to trainers, tokenizers and back up to the whole model.
    """
    twins: dict[int, Any] = {}
    for tensor in _tensors(module):
        if is_lazy(tensor):
            twins[id(tensor)] = _like_lazy(tensor, lazy)
            continue
        value = held.get(id(tensor))
        twin = torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta") if value is None else value.clone()
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        twins[id(tensor)] = twin
    modules = list(module.modules())
    for each in modules:
        twins[id(each)] = object.__new__(unsharded_type(each))
    for each in modules:
        # Not setattr: a module's own __setattr__ may do more, and needs what is not there yet.
        twins[id(each)].__dict__ = {name: _rebound(value, twins) for name, value in each.__dict__.items()}
    return twins


def _like_lazy(tensor: Any, device: torch.device) -> Tensor:
    twin: Tensor = type(tensor)(requires_grad=tensor.requires_grad, device=device, dtype=tensor.data.dtype)
    return twin


def _rebound(value: Any, twins: Mapping[int, Any]) -> Any:
    """The same value, speaking of the stand-ins: containers are copied; methods, closures and hooks bound anew."""
    if id(value) in twins:
        return twins[id(value)]
    kind: Any = type(value)
    if kind in (list, tuple, set):
        return kind([_rebound(item, twins) for item in value])
    if kind in (dict, OrderedDict):
        return kind([(key, _rebound(item, twins)) for key, item in value.items()])
    if kind is types.MethodType:
        return types.MethodType(value.__func__, _rebound(value.__self__, twins))
    if kind is functools.partial:
        function, *arguments = (_rebound(part, twins) for part in (value.func, *value.args))
        return functools.partial(function, *arguments, **_rebound(value.keywords, twins))
    if kind is types.FunctionType and value.__closure__:
        return _with_cells(value, twins)
    if kind is nn.modules.module._WrappedHook:
        hook = kind.__new__(kind)
        hook.__dict__ = {
            name: weakref.ref(_rebound(v(), twins)) if name == "module" else _rebound(v, twins)
            for name, v in value.__dict__.items()
        }
        return hook
    return value


def _with_cells(function: types.FunctionType, twins: Mapping[int, Any]) -> Callable[..., Any]:
    """A function whose closure speaks of the stand-ins."""

    def cell(old: types.CellType) -> types.CellType:
        try:
            twin = twins.get(id(old.cell_contents))
        except ValueError:  # an empty cell
            return old
        return old if twin is None else types.CellType(twin)

    cells = tuple(cell(old) for old in function.__closure__ or ())
    bound = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    bound.__kwdefaults__ = function.__kwdefaults__
    bound.__dict__.update(function.__dict__)
    return bound
