"""Compare two checkpoints: names, shapes, dtypes, and values by their relative distance |A - B| / |A| for each module.

Rules apply to A: what --rename and the like would make of it is compared with B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from warmstart.checkpoints.base import Checkpoint
from warmstart.cli.answers import Answer, Exit
from warmstart.cli.comparing import Sums
from warmstart.cli.opening import opened, opened_beside
from warmstart.cli.parsing import READING, RENAMING, add_rules, pretrained
from warmstart.cli.progress import progress
from warmstart.cli.ruled import RuledCheckpoint
from warmstart.locations import public
from warmstart.mapping.grouping import grouped, listed, printable
from warmstart.mapping.model.names import infer_prefix
from warmstart.tensors import dtype_name

_ROWS = 40
_RULES = (*READING, *RENAMING)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="A", help="A checkpoint; the options below are about it.")
    parser.add_argument("other", metavar="B", help="The checkpoint to compare it with.")
    parser.add_argument("--other_checkpoint_key", help="Which tree of B, as a dotted path.")
    parser.add_argument("--names_only", action="store_true", help="Read no tensor: compare names, shapes and dtypes.")
    add_rules(parser, _RULES)


def run(options: Namespace) -> Answer:
    """Keys of the JSON: `equal`, `a`, `b`, `only_a`, `only_b`, `shapes`, `dtypes`, `modules` and `tensors`, the last two with
    `distance` and what is `equal` bit for bit; both null with `--names_only`, under which `equal` speaks of the rest.
    """
    rules = pretrained(options, _RULES)
    a: Checkpoint = RuledCheckpoint(rules, opened(rules))
    b = opened_beside(
        options.other, options.other_checkpoint_key, "other_checkpoint_key", trust_pickle=rules.trust_pickle
    )
    names_a, names_b = set(a.keys()), set(b.keys())
    common = [key for key in a.keys() if key in names_b]
    shapes = {k: (a.info(k).shape, b.info(k).shape) for k in common if a.info(k).shape != b.info(k).shape}
    dtypes = {
        k: (dtype_name(a.info(k).dtype), dtype_name(b.info(k).dtype))
        for k in common
        if a.info(k).dtype != b.info(k).dtype
    }
    only_a, only_b = ([k for k in c.keys() if k not in names] for c, names in ((a, names_b), (b, names_a)))
    pairs = None if options.names_only else _compared(a, b, [key for key in common if key not in shapes])
    modules = None if pairs is None else _by_module(pairs)
    moved = pairs is not None and any(not sums.equal for sums in pairs.values())
    equal = not (only_a or only_b or shapes or dtypes or moved)
    data: dict[str, Any] = {
        "equal": equal,
        "a": public(a.location),
        "b": public(b.location),
        "only_a": only_a,
        "only_b": only_b,
        "shapes": {key: [list(shape) for shape in both] for key, both in shapes.items()},
        "dtypes": {key: list(both) for key, both in dtypes.items()},
        "modules": None if modules is None else {name: _told(sums) for name, sums in modules.items()},
        "tensors": None if pairs is None else {key: _told(sums) for key, sums in pairs.items()},
    }
    out = [f"A  {public(a.location)}  ({len(a):,} tensors)", f"B  {public(b.location)}  ({len(b):,} tensors)"]
    for only, side, where in ((only_a, "A", a), (only_b, "B", b)):
        out += _section(f"only in {side}", [(key, str(where.info(key).shape)) for key in only])
    out += _section("other shape", [(key, f"A {one}, B {two}") for key, (one, two) in shapes.items()])
    out += _section("other dtype", [(key, f"A {one}, B {two}") for key, (one, two) in dtypes.items()])
    if not common:
        out += _prefixes(a, b)
    if pairs is not None and modules is not None:
        same = sum(sums.equal for sums in pairs.values())
        out.append(f"values: {same:,} of {len(pairs):,} tensors are equal bit for bit")
        out += _distances(modules)
    out.append("equal" if equal else "they differ")
    return Answer("\n".join(out), data, Exit.OK if equal else Exit.DIFFERS)


def _compared(a: Checkpoint, b: Checkpoint, keys: Sequence[str]) -> dict[str, Sums]:
    pairs = {}
    with progress("comparing", sum(a.info(key).nbytes for key in keys)) as told:
        for key in keys:
            pairs[key] = Sums.of(a.read(key), b.read(key))
            told(a.info(key).nbytes)
    return pairs


def _by_module(pairs: dict[str, Sums]) -> dict[str, Sums]:
    modules: dict[str, Sums] = {}
    for key, sums in pairs.items():
        modules.setdefault(key.rpartition(".")[0], Sums()).add(sums)
    return modules


def _told(sums: Sums) -> dict[str, Any]:
    distance = sums.distance
    # JSON has no infinity.
    return {"distance": distance if distance != float("inf") else None, "equal": sums.equal, "tensors": sums.tensors}


def _section(title: str, items: list[tuple[str, str]]) -> list[str]:
    return [f"{title}: {len(items):,}", listed(items, limit=_ROWS)] if items else []


def _distances(modules: dict[str, Sums]) -> list[str]:
    moved = {name: sums for name, sums in modules.items() if sums.equal < sums.tensors}
    # Modules of one kind whose distances agree to one digit share a row.
    groups = grouped((name or "(the root)", f"{sums.distance:.0e}") for name, sums in moved.items())
    groups.sort(key=lambda group: -float(group.tag))
    out = []
    for group in groups[:_ROWS]:
        count = f"  x{len(group)}" if len(group) > 1 else ""
        out.append(f"    {group.tag:>6}  {printable(group.template)}{count}")
    if rest := groups[_ROWS:]:
        out.append(f"    ... and {sum(map(len, rest)):,} more modules; --json has them all")
    if moved:
        out.insert(0, "relative distance |A - B| / |A|, the farthest modules first:")
    return out


def _prefixes(a: Checkpoint, b: Checkpoint) -> list[str]:
    pairs = infer_prefix({k: a.info(k).shape for k in a.keys()}, {k: b.info(k).shape for k in b.keys()})
    if not pairs:
        return ["no name is in both"]
    pair = pairs[0]
    rule = f"--strip_prefix '{printable(pair.strip)}'" if pair.strip else ""
    if pair.add:
        rule = f'{rule} --rename \'{{"^": "{printable(pair.add)}."}}\''.strip()
    return [f"no name is in both; {pair.score:,} of A's fit B's under {rule}"]
