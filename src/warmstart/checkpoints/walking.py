"""From whatever a source holds - mappings, lists, stubs, modules - to branches with tensors as leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Union, cast

import numpy as np
from torch import Tensor, nn

from warmstart.checkpoints.pickled.refs import ArrayRef, OrderedDictRef, SetRef, StorageRef, Stub, TensorRef, Unreadable
from warmstart.errors import CheckpointError
from warmstart.showing import shown

MAX_NODES: Final = 2_000_000
MAX_OTHERS: Final = 1_000
MAX_DEPTH: Final = 64

Raw = Union[Tensor, "np.ndarray[Any, Any]", "np.generic", TensorRef, ArrayRef, Unreadable]
Role = Literal["tree", "optimizer", "aside"]

_ASIDE: Final = re.compile(
    r"callbacks|loops|(lr_)?schedulers?|sched|(grad_)?scaler|amp|native_amp_scaling_state|rng.*|.*_rng|random_state"
    r"|hyper_?parameters|hparams|arg(s|uments)|cfg|configs?",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(slots=True, eq=False)
class Branch:
    """A mapping or list of a source.

    Attributes:
        children: What it holds that is a tensor or a branch, by name.
        others: Names of the first of what it holds beside: numbers, strings, objects.
        other_count: How many of these there are.
        role: `optimizer` and `aside` (callbacks, schedulers, hyper-parameters) are not weights by themselves.
        versions: A state dict's `_metadata`, if it has one.
        tensors: How many tensors lie in it, at any depth; optimizer states hold none that count.
        weight: How many entries it unfolds to, where something is shared.
        height: How many levels it has.
    """

    children: dict[str, Branch | Raw] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    other_count: int = 0
    role: Role = "tree"
    versions: object = None
    tensors: int = 0
    weight: int = 1
    height: int = 1


class Walker:
    """Makes the branches of one source; cycles end, and what is shared too often is refused."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._nodes = 0
        self._path: set[int] = set()
        # What is shared is walked once. The values are kept, so that no id is given out twice.
        self._known: dict[tuple[int, bool], tuple[object, Branch]] = {}

    def walk(self, source: object) -> Branch:
        """The root branch.

        Raises:
            CheckpointError: The source is no mapping and no list, or nested beyond all use.
        """
        entries = entries_of(source)
        if entries is None:
            found = "a single tensor" if is_raw(source) else f"an object of type {type_name(source)}"
            raise CheckpointError(
                f"{self._location}: holds {found}, not named tensors; save a dict of them: "
                "torch.save(model.state_dict(), path)"
            )
        return self._branch(source, entries, 0, False)

    def _branch(self, source: object, entries: Iterable[tuple[object, object]], depth: int, aside: bool) -> Branch:
        known = self._known.get((id(source), aside))
        if known is not None:
            self._check(depth + known[1].height, known[1].weight)
            return known[1]
        if depth > MAX_DEPTH and aside:
            return Branch()
        self._check(depth, 0)
        branch = Branch(versions=versions_of(source))
        self._path.add(id(source))
        for key, value in entries:
            self._nodes += 1
            self._add(branch, key, value, depth, aside)
            self._check(depth, max(branch.weight, self._nodes))
        self._path.discard(id(source))
        self._known[id(source), aside] = (source, branch)
        return branch

    def _check(self, depth: int, nodes: int) -> None:
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{self._location}: nested deeper than {MAX_DEPTH} levels; save a plain state dict: "
                "torch.save(model.state_dict(), path)"
            )
        if nodes > MAX_NODES:
            raise CheckpointError(
                f"{self._location}: more than {MAX_NODES:,} entries (or the same ones shared over and over); "
                "save a plain state dict: torch.save(model.state_dict(), path)"
            )

    def _add(self, branch: Branch, key: object, value: object, depth: int, aside: bool) -> None:
        if is_raw(value):
            branch.tensors += 1
            branch.weight += 1
            self._put(branch, key, cast(Raw, value))
            return
        below = None if id(value) in self._path else entries_of(value)
        if below is None:
            branch.other_count += 1
            if len(branch.others) < MAX_OTHERS:
                branch.others.append(spelled(key) or type_name(key))
            return
        name = spelled(key)
        if name is not None and (is_optimizer_name(name) or is_optimizer(value)):
            child = Branch(role="optimizer")
        else:
            beside = name is not None and is_aside_name(name)
            child = self._branch(value, below, depth + 1, aside or beside)
            if not child.tensors:
                if name is None:
                    return
                child = Branch()
            if beside:
                child = replace(child, role="aside")
        branch.tensors += child.tensors
        branch.weight += child.weight
        branch.height = max(branch.height, 1 + child.height)
        self._put(branch, key, child)

    def _put(self, branch: Branch, key: object, child: Branch | Raw) -> None:
        name = spelled(key)
        if name is None:
            raise CheckpointError(
                f"{self._location}: a tensor lies under a key of type {type_name(key)}; keys must be strings or numbers: "
                "save a dict with names"
            )
        if name in branch.children:
            raise CheckpointError(
                f"{self._location}: two keys are both spelled {shown(name)}; rename one of them and save the file again"
            )
        branch.children[name] = child


def is_raw(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    if type(value) is ArrayRef:
        return not isinstance(value.data, list)
    return isinstance(value, (Tensor, TensorRef, Unreadable, np.generic))


def entries_of(value: object) -> Iterable[tuple[object, object]] | None:
    """What a container holds, by key; None if the value is no container."""
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if isinstance(value, Stub):
        return _stub_entries(value)
    if isinstance(value, nn.Module):
        return value.state_dict(keep_vars=True).items()
    if type(value) is ArrayRef and isinstance(value.data, list):
        return _object_entries(value.shape, value.data)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return _object_entries(value.shape, list(value.flat))
    return None


def _object_entries(shape: tuple[int, ...], items: list[Any]) -> Iterable[tuple[object, object]] | None:
    if shape == () and len(items) == 1:
        return None if is_raw(items[0]) else entries_of_plain(items[0])
    return enumerate(items) if len(shape) == 1 and shape[0] == len(items) else None


def entries_of_plain(value: object) -> Iterable[tuple[object, object]] | None:
    # An object array that holds an object array, and so on, has no end: one level is read.
    return None if isinstance(value, (ArrayRef, np.ndarray)) else entries_of(value)


def _stub_entries(stub: Stub) -> Iterable[tuple[object, object]] | None:
    state = stub.state
    if type(state) is dict and all(
        isinstance(state.get(part), dict) for part in ("_parameters", "_buffers", "_modules")
    ):
        return module_entries(stub)
    if stub.entries is not None:
        return stub.entries.items()
    if stub.sequence is not None:
        return None if isinstance(stub, SetRef) else enumerate(stub.sequence)
    return state.items() if isinstance(state, dict) else None


def module_entries(root: Stub) -> Iterator[tuple[object, object]]:
    """The state dict of a module that was pickled whole, without building the module."""
    pending: list[tuple[str, object, frozenset[int]]] = [("", root, frozenset())]
    steps = 0
    while pending:
        prefix, stub, above = pending.pop()
        state = stub.state if isinstance(stub, Stub) else None
        if type(state) is not dict or id(stub) in above:
            continue
        steps += 1
        if steps > MAX_NODES or len(above) > 10 * MAX_DEPTH or len(prefix) > 1 << 20:
            raise CheckpointError("a pickled module that is nested without end; save its state_dict() instead")
        transient = state.get("_non_persistent_buffers_set")
        names = transient.sequence if isinstance(transient, SetRef) else transient
        left_out = {name for name in names or () if type(name) is str} if isinstance(names, (list, set)) else set()
        for part in ("_parameters", "_buffers"):
            values = state.get(part)
            for name, value in values.items() if isinstance(values, dict) else ():
                if type(name) is str and value is not None and not (part == "_buffers" and name in left_out):
                    yield f"{prefix}{name}", value
        children = state.get("_modules")
        if isinstance(children, dict):
            inside = above | {id(stub)}
            pending.extend(
                (f"{prefix}{name}.", child, inside)
                for name, child in reversed(list(children.items()))
                if type(name) is str
            )


def versions_of(source: object) -> object:
    if type(source) is OrderedDictRef:
        return source.versions
    if isinstance(source, nn.Module):
        return getattr(source.state_dict(), "_metadata", None)
    return getattr(source, "_metadata", None) if isinstance(source, Mapping) else None


def clean_versions(value: object) -> dict[str, dict[str, object]]:
    """A state dict's `_metadata`, as far as it is what torch writes."""
    if not isinstance(value, Mapping):
        return {}
    return {
        path: {name: entry for name, entry in entries.items() if type(name) is str}
        for path, entries in value.items()
        if type(path) is str and isinstance(entries, Mapping)
    }


def spelled(key: object) -> str | None:
    """A key as text; None for a key that has no short and unique spelling."""
    if type(key) is str:
        return key
    if isinstance(key, str):
        return str(key)
    if key is None or isinstance(key, (bool, float)):
        return str(key)
    if isinstance(key, int):
        return str(int(key)) if abs(key) < 1 << 64 else None
    return None


def is_optimizer_name(name: str) -> bool:
    return name.lower().startswith(("optim", "opt_state"))


def is_optimizer(value: object) -> bool:
    return isinstance(value, dict) and "state" in value and "param_groups" in value


def is_aside_name(name: str) -> bool:
    return len(name) < 200 and _ASIDE.fullmatch(name) is not None


def type_name(value: object) -> str:
    if isinstance(value, Stub):
        return type(value).qualified_name or "a class that was not built"
    if isinstance(value, StorageRef):
        return "torch storage"
    return type(value).__name__
