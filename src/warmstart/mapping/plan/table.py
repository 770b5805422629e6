"""The plan as a few rows: many tensors of one kind and one shape in each."""

from __future__ import annotations

from dataclasses import dataclass

from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.buckets import Assignment, Buckets
from warmstart.mapping.declared import plain
from warmstart.mapping.grouping import grouped, printable
from warmstart.tensors import dtype_name


@dataclass(frozen=True, slots=True)
class Row:
    """One group of tensors.

    Attributes:
        status: `loaded`, `adapted` or `filled`, each also as `..., frozen`; `tied`, `own init`, `out of scope`, `unused key`,
            `ignored key`.
        target: Template of the entries' names; for keys without an entry, of the keys' own.
        source: How the keys are named: `same name`, `from features.#.*`, `no key`, ...
        shape: Their shape, and the checkpoint's where it is another.
        count: How many tensors.
    """

    status: str
    target: str
    source: str
    shape: str
    count: int


def rows(plan: Buckets) -> list[Row]:
    """All groups of a plan, the loaded ones first."""
    out: list[Row] = []
    frozen = set(plan.freeze)
    keys = {a.target: a.sources[0] for a in plan.assignments if a.sources}
    whole = [a for a in plan.assignments if a.alias_of is None and a.adapter is None and a.fill is None]
    adapted = [a for a in plan.assignments if a.adapter is not None]
    filled = [a for a in plan.assignments if a.fill is not None]

    def add(status: str, items: list[tuple[str, tuple[str, str]]]) -> None:
        for group in grouped(items):
            source, shape = group.tag
            if len(group) == 1 and "#" in source:  # one tensor: its key as it is
                source = f"from {printable(keys[group.names[0]])}"
            out.append(Row(status, printable(group.template), source, shape, len(group)))

    for status, chosen, group in (
        ("loaded, frozen", True, whole),
        ("loaded", False, whole),
        ("adapted, frozen", True, adapted),
        ("adapted", False, adapted),
        ("filled, frozen", True, filled),
        ("filled", False, filled),
    ):
        add(status, [(a.target, (_source(a), _shape(a))) for a in group if (a.target in frozen) == chosen])
    add("tied", [(a.target, (f"is {a.alias_of}", str(a.shape))) for a in plan.assignments if a.alias_of is not None])
    entries = plan.targets.entries
    add("own init", [(name, ("no key", str(entries[name].shape))) for name in plan.missing])
    add(
        "own init",
        [(n, ("other shape", f"{m.model_shape}, checkpoint {m.checkpoint_shape}")) for n, m in plan.mismatched.items()],
    )
    add("out of scope", [(name, ("", str(entries[name].shape) if name in entries else "")) for name in plan.excluded])
    add("unused key", _keys(plan, plan.unexpected))
    add("ignored key", _keys(plan, plan.ignored))
    return out


def lines(plan: Buckets, limit: int = 40) -> list[str]:
    """The rows as aligned text; the last of at most `limit` lines says how much is left out."""
    table = rows(plan)
    shown = table if len(table) <= limit else table[: limit - 1]
    cells = [(r.status, f"{r.count:,}", r.target, r.shape, r.source) for r in shown]
    # A name longer than its column pushes the rest of its own row only, and is never cut.
    status, count, target, shape = (max((len(cell[i]) for cell in cells), default=0) for i in range(4))
    out = [
        f"{c[0]:{status}}  {c[1]:>{count}}  {c[2]:{min(target, 72)}}  {c[3]:{min(shape, 24)}}  {c[4]}".rstrip()
        for c in cells
    ]
    if len(table) > limit:
        rest = table[limit - 1 :]
        out.append(f"... and {sum(row.count for row in rest)} more tensors in {len(rest)} groups")
    return out


def _source(assignment: Assignment) -> str:
    """Where a value comes from: a conversion, a constant, or a key, whose name is said as it differs from its entry's."""
    if assignment.fill is not None:
        return f"constant {assignment.fill:g}"
    how = f", {_adapter(assignment.adapter)}" if assignment.adapter else ""
    if assignment.conversion is not None:
        return f"by {printable(assignment.conversion.label)}{how}"
    return renaming(assignment.target, assignment.sources[0]) + how


def _adapter(adapter: Adapter) -> str:
    ((name, options),) = plain(adapter).items()
    return f"{name} {', '.join(f'{k}={v}' for k, v in options.items())}".rstrip()


def renaming(target: str, key: str) -> str:
    """How a key's name differs from its entry's, said so that like differences read alike.

    The segments that both end in are `*`. Of the rest, an index that the entry has at the same turn is `#`: which key goes
    where is then told by the entry's own indices.
    """
    if key == target:
        return "same name"
    t, k = target.split("."), key.split(".")
    same = 0
    while same < min(len(t), len(k)) and t[-1 - same] == k[-1 - same]:
        same += 1
    rest = k[: len(k) - same]
    if not rest:
        return "no prefix"
    indices = [segment for segment in t if segment.isdecimal()]
    turn = 0
    for position, segment in enumerate(rest):
        if segment.isdecimal():
            if turn < len(indices) and segment == indices[turn]:
                rest[position] = "#"
            turn += 1
    return f"from {printable('.'.join(rest))}" + ".*" * bool(same)


def _shape(assignment: Assignment) -> str:
    shape = str(assignment.shape)
    if assignment.source_shape != assignment.shape:
        shape += f" of {assignment.source_shape}"
    if assignment.cast is None:
        return shape
    source, target = map(dtype_name, assignment.cast)
    return f"{shape} {source} to {target}"


def _keys(plan: Buckets, names: tuple[object, ...]) -> list[tuple[str, tuple[str, str]]]:
    items = []
    for item in names:
        number, key = item if isinstance(item, tuple) else (0, item)
        shape = str(plan.parts[number].checkpoint.info(key).shape)
        items.append((key, (f"source {number}" if len(plan.parts) > 1 else "", shape)))
    return items
