"""Modules with their own way to load: what torch's `load_state_dict` would make of the keys, as part of the plan."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from warmstart.errors import MappingError
from warmstart.mapping.buckets import Problem
from warmstart.mapping.derivations import Derivation, Shape
from warmstart.mapping.grouping import printable
from warmstart.mapping.keys import Key
from warmstart.mapping.load_hooks.parametrizations import into_parametrizations, outputs_of
from warmstart.mapping.load_hooks.trials import Outcome, Trial, has_own_way
from warmstart.mapping.model.names import join

Versions = Mapping[str, Mapping[str, object]]


@dataclass(slots=True)
class Honoured:
    """The pool after the modules' own ways to load, and what they said on the way. Names are relative to `into`.

    Attributes:
        keys: The keys as the modules' entries get them: renamed, or made by a `Loaded`.
        ignored: Keys that a module takes and makes nothing of.
        excused: Entries without a key that their module does not miss: they keep their value.
        shapes: Entries that take the shape of what they get (lazy ones, observers' buffers): name to that shape.
        notes: What was done, in words.
        errors: Modules whose own way failed on the shapes alone, or that refuse what they are given.
    """

    keys: list[Key]
    ignored: list[Key] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[Problem] = field(default_factory=list)


class Loaded(Derivation):
    """What one module's own loading computes from some keys, run again on the real tensors when they are read.

    Outputs that come from the same keys are one derivation, so that reading one holds no more in memory than it must.

    Attributes:
        inputs: The keys it reads, by their names when they were given to the module.
    """

    def __init__(
        self,
        label: str,
        trial: Trial,
        pool: Mapping[str, Key],
        names: Sequence[str],
        held: dict[int, Tensor],
        dry: Outcome,
    ) -> None:
        """Take some outputs of a dry run.

        Args:
            label: The module, for messages.
            trial: Its way to load.
            pool: The keys that the dry run was given, by their names then.
            names: The outputs: names in `dry.values` that are made from the same keys.
            held: What the module's own tensors held that they are made from.
            dry: The dry run's outcome.
        """
        self.label = label
        self.targets = tuple(names)
        self.shapes = [tuple(dry.values[name].shape) for name in names]
        self.dtypes = [dry.values[name].dtype for name in names]
        self._trial = trial
        self._held = held
        self._given = {name: (_shape(key), key.dtype) for name, key in pool.items()}
        self.inputs = {name: key for name, key in pool.items() if name in dry.made_from[names[0]][0]}
        self._changed = dry.changed & self.inputs.keys()
        self.sources = tuple(dict.fromkeys(source for key in self.inputs.values() for source in key.sources))

    def run(self, read: Callable[[int], Tensor]) -> list[Tensor]:
        """The outputs, on the CPU, in the checkpoint's dtype unless the module casts them.

        Raises:
            MappingError: The module's own code fails on the values, or makes another shape of them than planned.
        """
        given = {
            name: self._value(name, read) if name in self.inputs else _empty(shape, dtype)
            for name, (shape, dtype) in self._given.items()
        }
        try:
            values = self._trial.run(given, self._held).values
        except Exception as error:  # the module's code: anything
            raise MappingError(f"{self.label}: its own loading fails on the values: {_words(error)}") from error
        out = [values.get(name) for name in self.targets]
        for name, value, shape in zip(self.targets, out, self.shapes, strict=True):
            if value is None or value.is_meta or tuple(value.shape) != shape:
                what = "nothing" if value is None or value.is_meta else tuple(value.shape)
                raise MappingError(
                    f"{self.label}: its own loading makes {what} of '{printable(name)}' where its shapes alone gave {shape}; "
                    "it looks at values: load that module with its own load_state_dict, and leave it out here with exclude="
                )
        return [value.detach() for value in out if value is not None]

    def undo(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        raise MappingError(f"{self.label}: {self.no_inverse}")

    @property
    def no_inverse(self) -> str:
        return "a module's own loading has no inverse"

    def _value(self, name: str, read: Callable[[int], Tensor]) -> Tensor:
        key = self.inputs[name]
        if key.made is None:
            value = read(self.sources.index(key.spelled))
        else:
            made = key.made
            value = made.run(lambda i: read(self.sources.index(made.sources[i])))[key.output]
        return value.clone() if name in self._changed else value


def may_say(module: nn.Module) -> bool:
    """Whether `honour` has anything to ask of a module."""
    parametrized = "parametrizations" in module._modules and is_parametrized(module)
    return parametrized or has_own_way(module) or _hooked_after(module)


def _hooked_after(module: nn.Module) -> bool:
    """Whether it has hooks that run after `load_state_dict`, apart from those by which FSDP2 follows replaced shards."""
    hooks = module._load_state_dict_post_hooks.values()
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)


def honour(keys: list[Key], modules: Mapping[str, nn.Module], versions: Versions, into: str = "") -> Honoured:
    """Let every module that has its own way to load have its say on the keys below it, parents first, as torch does.

    A module is tried on a stand-in and on shapes alone: no tensor is read, and the module is not written to. One without a
    key below it is left alone. Then plain keys of parametrized tensors go through `right_inverse`.

    Args:
        keys: The pool; each name once. A key that a module only renames is changed in place.
        modules: Clean path below `into` to module, "" for the root: those with an entry in scope.
        versions: The checkpoint's `_metadata`: module path, as the file spells it, to its `{"version": n}`.
        into: The root's own clean path, for messages.
    """
    out = Honoured(keys)
    own = [path for path, module in modules.items() if has_own_way(module)]
    after = [path for path, module in modules.items() if _hooked_after(module)]
    if own or after:
        pool = _Pool(keys)
        done: dict[str, Counter[str]] = {}
        for path in sorted(own, key=lambda p: p.split(".") if p else []):
            below = pool.below(path)
            if below:
                counts = done.setdefault(type(modules[path]).__name__, Counter())
                _honour_one(modules[path], path, below, pool, _version(path, below, versions), into, out, counts)
        out.keys = pool.keys()
        for name, counts in done.items():
            if counts:
                what = ", ".join(f"{verb} {n} tensor{'s' * (n > 1)}" for verb, n in counts.items())
                out.notes.append(f"{name}: its own loading {what}, as in torch itself")
        names = {type(modules[path]).__name__ for path in after if pool.below(path)}
        if names:
            out.notes.append(f"{', '.join(sorted(names))}: hooks that run after load_state_dict are not called")
    out.keys, errors = into_parametrizations(out.keys, modules, into)
    out.errors += errors
    return out


def _honour_one(
    module: nn.Module,
    path: str,
    below: dict[str, Key],
    pool: _Pool,
    version: Mapping[str, object],
    into: str,
    out: Honoured,
    counts: Counter[str],
) -> None:
    where = printable(join(into, path))
    label = f"{where} ({type(module).__name__})" if where else type(module).__name__
    try:
        trial = Trial(module, f"{path}." if path else "", version)
        dry = trial.run({name: _empty(_shape(key), key.dtype) for name, key in below.items()})
        if dry.refusals:
            raise MappingError("; ".join(dry.refusals))
        derivations = _derivations(label, module, trial, below, dry)
        kept = {name: below[source] for name, source in dry.as_given.items()}
        for made in derivations:
            kept |= {key.name: key for key in outputs_of(made)}
        pool.replace(path, below, kept)
    except Exception as error:  # the module's code: anything
        instead = f'leave it out here, exclude=["{where}"]' if where else "call that instead"
        message = (
            f"{label}: its own loading does not take these keys, or not on their shapes alone: {_words(error)}\n"
            f"  -> give it its weights with its own load_state_dict, and {instead}"
        )
        out.errors.append(Problem("load hook", message, (where,)))
        return
    trial.let_go()
    used = {name for made in derivations for name in made.inputs}.union(dry.as_given.values())
    for name, source in dry.as_given.items():
        counts["renames"] += name != source
        below[source].name = name
    counts["makes"] += sum(len(made.targets) for made in derivations)
    dropped = [key for name, key in below.items() if name not in used]
    counts["drops"] += len(dropped)
    out.ignored += dropped
    out.excused += dry.excused
    out.shapes |= dry.shapes
    for verb in [verb for verb, n in counts.items() if not n]:
        del counts[verb]


def _derivations(label: str, module: nn.Module, trial: Trial, below: Mapping[str, Key], dry: Outcome) -> list[Loaded]:
    """One for all outputs that are made from the same tensors."""
    groups: dict[tuple[frozenset[str], frozenset[int]], list[str]] = {}
    for name, origins in dry.made_from.items():
        counter = isinstance(module, nn.modules.batchnorm._NormBase) and name.endswith("num_batches_tracked")
        if not counter or name in below:  # a counter that an old file lacks keeps its value: planning's own rule
            groups.setdefault(origins, []).append(name)
    return [Loaded(label, trial, below, names, trial.held(origins[1]), dry) for origins, names in groups.items()]


def _version(path: str, below: Mapping[str, Key], versions: Versions) -> Mapping[str, object]:
    """What the file says of the module that one of these keys belongs to, under the path that the file has for it."""
    if not versions:
        return {}
    for name, key in sorted(below.items(), key=lambda item: item[0].count(".")):
        rest = name[len(path) + 1 :] if path else name
        if key.made is None and (key.spelled == rest or key.spelled.endswith(f".{rest}")):
            found = versions.get(key.spelled[: -len(rest)].rstrip("."))
            if found is not None:
                return found
    return {}


class _Pool:
    """The keys by name, sorted, so that those below a path are a slice."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = {key.name: key for key in keys}
        self._names = sorted(self._keys)

    def keys(self) -> list[Key]:
        return list(self._keys.values())

    def below(self, path: str) -> dict[str, Key]:
        """The keys below a path that a module can be given: without extra state, and of a shape that is settled."""
        found = ((name, self._keys[name]) for name in self._names[self._slice(path)])
        return {n: k for n, k in found if k.shape is not None and n.rpartition(".")[2] != "_extra_state"}

    def replace(self, path: str, before: Mapping[str, Key], after: Mapping[str, Key]) -> None:
        """Put other keys, all of them below the same path, in the place of these.

        Raises:
            MappingError: One of them has the name of a key that is not replaced; nothing is changed.
        """
        for name in after:
            if name in self._keys and name not in before:
                raise MappingError(f"it makes '{printable(name)}', and a conversion makes one too")
        for name in before:
            if name not in after:
                del self._keys[name]
        self._keys |= after
        if before.keys() != after.keys():
            inside = self._slice(path)
            rest = (name for name in self._names[inside] if name not in before)
            self._names[inside] = sorted([*rest, *after])

    def _slice(self, path: str) -> slice:
        if not path:
            return slice(0, len(self._names))
        return slice(bisect_left(self._names, f"{path}."), bisect_left(self._names, f"{path}/"))  # "/" comes after "."


def _shape(key: Key) -> Shape:
    assert key.shape is not None
    return key.shape


def _empty(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _words(error: Exception) -> str:
    """An exception of somebody else's code on one line."""
    text = " ".join(str(error).split())
    return printable(text if isinstance(error, MappingError) else f"{type(error).__name__}: {text}")
