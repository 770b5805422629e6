"""Conversions against the keys of a checkpoint: which keys each instance takes, and the virtual keys that it makes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from math import prod

from warmstart.errors import MappingError
from warmstart.mapping.buckets import Problem
from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.converted import Converted, Input, Sketcher
from warmstart.mapping.conversions.slots import Coordinate
from warmstart.mapping.conversions.templates import Template, natural
from warmstart.mapping.grouping import printable
from warmstart.mapping.hints import GUESSES, did_you_mean
from warmstart.mapping.keys import Key

_SHOWN = 4  # names that a message spells out


@dataclass(slots=True)
class Converting:
    """What the conversions made of a pool of keys.

    Attributes:
        keys: The pool after them, by name: the keys that none took, and a virtual key for each output.
        displaced: Keys that none took and whose name an output has: the output stands in the pool, they do not.
        failed: Keys that an error names: of an incomplete instance, or of one that cannot be run.
        errors: Of kind `unused`, `incomplete`, `collision` and `conversion`.
    """

    keys: list[Key] = field(default_factory=list)
    displaced: list[Key] = field(default_factory=list)
    failed: list[Key] = field(default_factory=list)
    errors: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class Instance:
    """One set of values of the shared placeholders, and what each source template takes for it."""

    values: dict[str, str]
    taken: list[dict[Coordinate, Key]]

    @property
    def keys(self) -> list[Key]:
        return [key for cells in self.taken for key in cells.values()]


def convert(keys: Sequence[Key], conversions: Sequence[Conversion]) -> Converting:
    """Replace the keys that conversions take by virtual keys named by their targets, whatever the keys' order.

    All conversions look at the same pool, by `Key.name`, which must differ from key to key. Linear in the number of keys.
    """
    out = Converting()
    pool = sorted(keys, key=lambda key: key.name)
    takers: dict[str, str] = {}
    virtual: dict[str, Key] = {}
    clashes: dict[tuple[str, str, str], list[str]] = {}
    lost: set[str] = set()  # sources of outputs whose name another one has
    for number, conversion in enumerate(conversions):
        try:
            matches = [_Matches(template, conversion.shared, pool) for template in conversion.source_templates]
        except MappingError as error:
            out.errors.append(Problem("conversion", f"convert: {error}"))
            continue
        if not any(match.table for match in matches):
            if not conversion.optional:
                out.errors.append(_unused(conversion, pool if number < GUESSES else []))
            continue
        for match in matches:
            taker = f"the source '{printable(match.template.text)}' of conversion {number + 1}"
            for key in match.keys():
                if (other := takers.setdefault(key.name, taker)) != taker:
                    clashes.setdefault(("taken", other, taker), []).append(key.name)
        for derived in _derived(conversion, matches, pool, out):
            for index, (name, shape, dtype) in enumerate(
                zip(derived.targets, derived.shapes, derived.dtypes, strict=True)
            ):
                key = Key(name, name, name, shape, dtype, made=derived, output=index)
                first = virtual.setdefault(name, key)
                if first is not key and first.made is not None:
                    clashes.setdefault(("made", first.made.label, derived.label), []).append(name)
                    lost.update(derived.sources)
    out.errors += [_collision(*clash, sorted(set(names))) for clash, names in clashes.items()]
    if lost:
        lost.difference_update(
            source for key in virtual.values() if key.made is not None for source in key.made.sources
        )
        out.failed += [key for key in pool if key.spelled in lost]
    rest = [key for key in pool if key.name not in takers]
    out.displaced = [key for key in rest if key.name in virtual]
    out.keys = sorted([*(key for key in rest if key.name not in virtual), *virtual.values()], key=lambda key: key.name)
    out.failed = sorted({id(key): key for key in out.failed}.values(), key=lambda key: key.name)
    return out


class _Matches:
    """The keys that one source template takes, by its shared and its gathered placeholders' values.

    Raises:
        MappingError: A name fits the template in more than one way.
    """

    def __init__(self, template: Template, shared: Sequence[str], pool: Sequence[Key]) -> None:
        self.template = template
        self.shared = tuple(name for name in shared if name in template.names)
        self.gathered = tuple(sorted(set(template.names).difference(shared)))
        self.table: dict[Coordinate, dict[Coordinate, Key]] = {}
        for key in pool:
            values = template.match(key.name)
            if values is not None:
                cells = self.table.setdefault(tuple([values[name] for name in self.shared]), {})
                cells[tuple([values[name] for name in self.gathered])] = key
        if self.gathered:
            order = {at: _naturally(at) for cells in self.table.values() for at in cells}
            self.table = {
                at: {c: cells[c] for c in sorted(cells, key=order.__getitem__)} for at, cells in self.table.items()
            }

    def keys(self) -> Iterator[Key]:
        return (key for cells in self.table.values() for key in cells.values())


def _instances(conversion: Conversion, matches: Sequence[_Matches]) -> list[Instance]:
    """All instances, and what a template took that belongs to none of them, as instances too."""
    whole = dict.fromkeys(at for match in matches if match.shared == conversion.shared for at in match.table)
    instances: list[Instance] = []
    joined: list[set[Coordinate]] = [set() for _ in matches]
    for at in whole:
        values = dict(zip(conversion.shared, at, strict=True))
        taken = []
        for match, seen in zip(matches, joined, strict=True):
            part = tuple([values[name] for name in match.shared])
            seen.add(part)
            taken.append(match.table.get(part, {}))
        instances.append(Instance(values, taken))
    for match, seen in zip(matches, joined, strict=True):
        for at in (at for at in match.table if at not in seen):
            values = dict(zip(match.shared, at, strict=True))
            instances.append(Instance(values, [match.table[at] if other is match else {} for other in matches]))
    return instances


def _derived(
    conversion: Conversion, matches: Sequence[_Matches], pool: Sequence[Key], out: Converting
) -> Iterator[Converted]:
    """What each complete instance makes; the others go to `out`, those with one fault in one error."""
    sketcher = Sketcher(conversion)
    incomplete: list[tuple[Instance, list[str]]] = []
    refused: dict[str, list[Instance]] = {}
    for instance in _instances(conversion, matches):
        if missing := _missing(instance, matches):
            incomplete.append((instance, missing))
            continue
        inputs = tuple(_input(match, cells) for match, cells in zip(matches, instance.taken, strict=True))
        try:
            sources = tuple([key.spelled for key in instance.keys])
            yield Converted(sketcher, inputs, sources, instance.values)
        except MappingError as error:
            refused.setdefault(str(error), []).append(instance)
    if incomplete:
        incomplete.sort(key=lambda item: _naturally(tuple(item[0].values.values())))
        near = did_you_mean(incomplete[0][1][0], [key.name for key in pool])
        lines = [f"    {_where(instance)}no {_some(missing)}" for instance, missing in incomplete[:_SHOWN]]
        if len(incomplete) > _SHOWN:
            lines.append(f"    ... and {len(incomplete) - _SHOWN:,} more instances")
        message = (
            f"convert: {conversion}: needs all its sources, and there is\n" + "\n".join(lines) + f"{near}\n"
            "  -> correct the template that misses them, or leave these keys to another conversion by writing more of "
            "their names out"
        )
        out.errors.append(_failing("incomplete", message, [instance for instance, _ in incomplete], out))
    for why, instances in refused.items():
        instances.sort(key=lambda instance: _naturally(tuple(instance.values.values())))
        more = f" (and {len(instances) - 1:,} more instances)" if len(instances) > 1 else ""
        message = f"convert: {conversion}: {_where(instances[0])}{why}{more}"
        out.errors.append(_failing("conversion", message, instances, out))


def _missing(instance: Instance, matches: Sequence[_Matches]) -> list[str]:
    """The names that an instance lacks: every value of a gathered placeholder must be there wherever it is gathered."""
    if all(instance.taken) and not any(match.gathered for match in matches):
        return []
    axes: dict[str, dict[str, None]] = {}
    for match, cells in zip(matches, instance.taken, strict=True):
        for at in cells:
            for name, value in zip(match.gathered, at, strict=True):
                axes.setdefault(name, {})[value] = None
    axes = {name: _without_holes(met) for name, met in axes.items()}
    names: list[str] = []
    for match, cells in zip(matches, instance.taken, strict=True):
        values = [axes.get(name, {}) for name in match.gathered]
        if not cells:
            names.append(match.template.render(instance.values))
        elif prod(map(len, values)) != len(cells):
            lacking = (at for at in product(*values) if at not in cells)
            for at in islice(lacking, _SHOWN + 1):
                names.append(match.template.render({**instance.values, **dict(zip(match.gathered, at, strict=True))}))
    return names


def _without_holes(values: dict[str, None]) -> dict[str, None]:
    """The values of a gathered placeholder; of numbers, with those between them that are not there."""
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,8}", value) for value in values):
        return values
    numbers = sorted(map(int, values))
    if numbers[-1] - numbers[0] > 2 * len(numbers) + _SHOWN:
        return values  # labels that happen to be numbers
    return dict.fromkeys(map(str, range(numbers[0], numbers[-1] + 1)))


def _input(match: _Matches, cells: dict[Coordinate, Key]) -> Input:
    shapes = []
    for key in cells.values():
        assert key.shape is not None  # of a key of the file
        shapes.append(key.shape)
    return Input(match.gathered, tuple(cells), tuple(shapes), tuple([key.dtype for key in cells.values()]))


def _unused(conversion: Conversion, pool: Sequence[Key]) -> Problem:
    near = did_you_mean(conversion.source_templates[0].example, [key.name for key in pool])
    message = (
        f"convert: {conversion} matches no checkpoint key{near}; "
        "leave it out, or start a source with '?' if it may match nothing"
    )
    return Problem("unused", message, tuple(conversion.sources))


def _collision(what: str, first: str, second: str, names: Sequence[str]) -> Problem:
    who = f"both by {first} and by {second}" if first != second else f"by two instances of {first}"
    fix = "let one conversion take it, with all its targets" if what == "taken" else "give them different targets"
    return Problem("collision", f"convert: {_some(names)} is {what} {who}; {fix}", tuple(names))


def _failing(kind: str, message: str, instances: Sequence[Instance], out: Converting) -> Problem:
    keys = [key for instance in instances for key in instance.keys]
    out.failed += keys
    return Problem(kind, message, tuple(dict.fromkeys(key.spelled for key in keys)))


def _where(instance: Instance) -> str:
    """`i=3: `, of an instance that has a name."""
    values = ", ".join(f"{name}={printable(value.removesuffix('.'))}" for name, value in instance.values.items())
    return f"{values}: " if values else ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{printable(name)}'" for name in names[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")


def _naturally(values: Coordinate) -> tuple[tuple[object, ...], ...]:
    return tuple(map(natural, values))
