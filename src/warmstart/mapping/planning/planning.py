"""Planning: each source alone, then all of them together."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.mapping.buckets import Assignment, Mismatch, Problem
from warmstart.mapping.grouping import listed, pasteable, printable
from warmstart.mapping.hints import paste, report_unused
from warmstart.mapping.keys import Key
from warmstart.mapping.model.targets import Target, Targets
from warmstart.mapping.plan.plan import Plan, R
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.planning.part_planning import plan_part
from warmstart.mapping.pretrained import Pretrained
from warmstart.patterns import PatternSet


def make_plan(
    model: nn.Module,
    sources: Sequence[tuple[Pretrained, Checkpoint]],
    applier: Callable[..., R],
    renderer: Callable[[str | os.PathLike[str], Plan[R]], Path],
) -> Plan[R]:
    """Plan each source alone and join the results.

    Args:
        model: The model to load into; it is not touched.
        sources: Each source's rules and its opened checkpoint.
        applier: What `Plan.apply` calls; the floors above this one write, this one only decides.
        renderer: What `Plan.to_html` calls.

    Raises:
        MappingError: The model is not ready to be planned for (lazy or meta entries).
    """
    with _without_collector():
        targets = Targets.of(model)
        parts = [plan_part(i, p, c, targets, len(sources)) for i, (p, c) in enumerate(sources)]
        return _joined(parts, targets, model, applier, renderer)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Planning makes no cycles: the garbage collector would walk a large model again and again and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _joined(
    parts: list[PartPlan],
    targets: Targets,
    model: nn.Module,
    applier: Callable[..., R],
    renderer: Callable[[str | os.PathLike[str], Plan[R]], Path],
) -> Plan[R]:
    errors = [problem for part in parts for problem in part.errors]
    notes = [note for part in parts for note in part.notes]
    first: dict[str, int] = {}  # canonical entry -> the part that gives it its value
    assigned: dict[str, tuple[int, Key | None]] = {}  # None: a constant
    mismatched: dict[str, Mismatch] = {}
    given: dict[str, int] = {}  # entry -> the part that has a key for it, of the right shape or not
    overlaps: dict[tuple[int, int], list[str]] = {}
    for number, part in enumerate(parts):
        for name, key in [*part.assigned.items(), *((name, None) for name in part.filled)]:
            owner = first.setdefault(targets.entries[name].canonical, number)
            if owner == number:
                assigned[name] = (number, key)
                given[name] = number
            else:
                overlaps.setdefault((owner, number), []).append(name)
    for number, part in enumerate(parts):
        for name, mismatch in part.mismatched.items():
            owner = given.setdefault(name, number)
            if owner == number:
                mismatched[name] = mismatch
            else:
                overlaps.setdefault((owner, number), []).append(name)
    for (owner, number), names in overlaps.items():
        errors.append(_overlap(names, parts[owner], parts[number], targets))
        # Of a conversion, another output may be this source's to give all the same.
        kept = {s for i, key in assigned.values() if i == number and key is not None for s in key.sources}
        kept.update(s for n, m in mismatched.items() if given[n] == number for s in m.keys)
        lost = dict.fromkeys(source for name in names for source in _keys_of(parts[number], name))
        kept.update(parts[number].unexpected)
        parts[number].unexpected += [key for key in lost if key not in kept]
        parts[number].reported.update(lost)
    in_scope = {name for part in parts for name in part.part.scope}

    assignments, missing, excluded = [], [], []
    writers = {targets.entries[name].canonical: name for name in reversed(assigned)} if targets.groups else {}
    for name, target in targets.entries.items():
        owner_of = first.get(target.canonical)
        if name in assigned:
            number, key = assigned[name]
            assignments.append(_assignment(target, key, number, parts[number]))
        elif name in in_scope and name in mismatched:
            continue
        elif owner_of is not None and name in in_scope:
            assignments.append(
                Assignment(
                    name, (), owner_of, target.shape, target.dtype, target.shape, alias_of=writers[target.canonical]
                )
            )
        elif name in in_scope:
            missing.append(name)
        else:
            excluded.append(name)
    excluded += sorted(targets.wrapper_own)

    # A source of which nothing is left or nothing fits has one error that says so; listing all its names would bury it.
    nothing = {i for i, part in enumerate(parts) if not part.assigned and not part.mismatched and part.errors}
    errors += unexcused(parts, targets, missing, mismatched, notes, nothing)
    coverage = _coverage(in_scope, assignments, targets)
    errors += _too_little(parts, assignments, targets)
    freeze = _to_freeze(parts, assignments, targets, errors, notes)
    untouched = {name for name in (*missing, *mismatched) if not _is_counter(targets.entries[name])}
    if random := [name for name in freeze if name in untouched]:
        notes.append(f"{len(random)} entries are frozen as they were initialised, without a value from a checkpoint")
    several = len(parts) > 1
    return Plan(
        parts=tuple(part.part for part in parts),
        assignments=tuple(assignments),
        missing=tuple(sorted(missing)),
        unexpected=tuple(sorted((i, k) if several else k for i, p in enumerate(parts) for k in p.unexpected)),
        excluded=tuple(sorted(excluded)),
        ignored=tuple(sorted((i, k) if several else k for i, p in enumerate(parts) for k in p.ignored)),
        mismatched=mismatched,
        freeze=freeze,
        coverage=coverage,
        errors=tuple(errors),
        notes=tuple(notes),
        model=model,
        targets=targets,
        applier=applier,
        renderer=renderer,
    )


def _assignment(target: Target, key: Key | None, number: int, part: PartPlan) -> Assignment:
    if key is None:
        fill = part.filled[target.name]
        return Assignment(target.name, (), number, target.shape, target.dtype, target.shape, fill=fill)
    assert key.shape is not None
    dtype = key.dtype if part.part.pretrained.dtype == "checkpoint" else target.dtype
    reshapes = target.lazy or target.name in part.reshaped
    return Assignment(
        target.name,
        key.sources,
        number,
        key.shape if reshapes else target.shape,
        dtype,
        key.shape,
        None if key.dtype == dtype else (key.dtype, dtype),
        conversion=key.made,
        output=key.output,
        adapter=None if reshapes else part.adapters.get(target.name),
        reshapes=reshapes,
    )


def _keys_of(part: PartPlan, name: str) -> tuple[str, ...]:
    if name in part.mismatched:
        return part.mismatched[name].keys
    return part.assigned[name].sources if name in part.assigned else ()


def _overlap(names: list[str], first: PartPlan, second: PartPlan, targets: Targets) -> Problem:
    labels = first.part.pretrained.label, second.part.pretrained.label
    if len(names) == 1:
        keys = [_quoted(_keys_of(part, names[0])) for part in (first, second)]
        what = f"'{names[0]}' is given by two sources: {keys[0]} of {labels[0]} and {keys[1]} of {labels[1]}"
    else:
        shapes = ((name, str(targets.entries[name].shape)) for name in names)
        what = f"{len(names)} entries are given by two sources, {labels[0]} and {labels[1]}\n{listed(shapes)}"
    message = (
        f"{what}\n  -> leave them to one of the two: Pretrained(..., {paste('exclude', names, targets)}), or give each "
        "its own into="
    )
    return Problem("overlap", message, tuple(names))


def _quoted(keys: tuple[str, ...]) -> str:
    return " and ".join(f"'{printable(key)}'" for key in keys[:4]) + ", ..." * (len(keys) > 4) if keys else "a constant"


def unexcused(
    parts: list[PartPlan],
    targets: Targets,
    missing: list[str],
    mismatched: dict[str, Mismatch],
    notes: list[str],
    nothing: set[int],
) -> list[Problem]:
    """The names in the three bad buckets that no `allow_*` pattern excuses, and patterns that hit nothing."""
    errors: list[Problem] = []
    excused: dict[str, set[str]] = {"allow_missing": set(), "allow_mismatched": set()}
    for part in parts:
        for where, found in excused.items():
            patterns = PatternSet(getattr(part.part.pretrained, where), where=where)
            if not patterns:
                continue
            found.update(name for name in targets.entries if patterns.matches(*targets.spellings(name)))
            report_unused(patterns, [t.clean for t in targets.entries.values()], "model entry", errors)

    migrated = _may_lack(missing, parts, targets)
    excused["allow_missing"].update(*(part.excused for part in parts))
    if migrated:
        notes.append(
            f"{len(migrated)} num_batches_tracked are not in the file and keep their value, as in torch itself"
        )
    may_miss = excused["allow_missing"] | migrated
    open_missing = [name for name in missing if name not in may_miss]
    if open_missing and len(nothing) < len(parts):
        message = (
            f"{_count(open_missing, 'model entry', 'model entries')} without a key in the checkpoint\n"
            f"{listed((n, str(targets.entries[n].shape)) for n in open_missing)}\n"
            f"  -> to let them keep their own initialisation: {paste('allow_missing', open_missing, targets)}"
        )
        errors.append(Problem("missing", message, tuple(open_missing)))

    refused = {name for part in parts for name in part.reported}
    may_differ = excused["allow_mismatched"] | refused
    bad = {name: m for name, m in mismatched.items() if name not in may_differ}
    if bad:
        rows = ((n, f"checkpoint {m.checkpoint_shape}, model {m.model_shape}") for n, m in bad.items())
        message = (
            f"{_count(bad, 'entry', 'entries')} of another shape\n{listed(rows)}\n"
            f"  -> to let them keep their own initialisation: {paste('allow_mismatched', bad, targets)}"
        )
        matched = sum(len(part.assigned) for part in parts)
        if len(bad) > max(2, matched):
            message += (
                f"\n  wrong architecture? only {matched} of {matched + len(bad)} entries have the checkpoint's shape"
                f"{_sizes(bad.values())}"
            )
        errors.append(Problem("mismatched", message, tuple(bad)))

    for number, part in enumerate(parts):
        allowed = PatternSet(part.part.pretrained.allow_unexpected, where="allow_unexpected")
        keys = part.part.checkpoint.keys()
        hits: set[str] = set()
        if allowed:
            clean = targets.key_cleaner()
            hits.update(key for key in keys if allowed.matches(key, clean(key)))
        report_unused(allowed, keys, "checkpoint key", errors)
        for key in part.dangling:
            if not hits.issuperset(key.sources):
                label = printable(key.made.label if key.made else "")
                unused = ", ".join(f'"{printable(source)}"' for source in key.sources[:8])
                message = (
                    f"a conversion makes '{printable(key.name)}', {key.shape}, which fits nothing in the model, from "
                    f"{_quoted(key.sources)}\n  -> correct its targets: {label}\n"
                    f"  -> or leave it unused: allow_unexpected=[{unused}]"
                )
                errors.append(Problem("unexpected", message, key.sources))
        left = [key for key in sorted(part.unexpected) if key not in hits and key not in part.reported]
        if left and number not in nothing:
            info = part.part.checkpoint.info
            fix = pasteable("allow_unexpected", left, set(keys).difference(left))
            fit = "fits" if len(left) == 1 else "fit"
            message = (
                f"{_count(left, 'key', 'keys')} of {part.part.pretrained.label} {fit} nothing in the model\n"
                f"{listed((key, str(info(key).shape)) for key in left)}\n"
                f"  -> to leave them unused: {fix}"
            ) + (f"\n{part.hint}" if part.hint else "")
            errors.append(Problem("unexpected", message, tuple(left)))
    return errors


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:4])) + ", ..." * (len(names) > 4)


def _count(names: Collection[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


def _sizes(mismatches: Iterable[Mismatch]) -> str:
    """Which size of the checkpoint stands most often where the model has another one."""
    pairs: Counter[tuple[int, int]] = Counter()
    for m in mismatches:
        if len(m.checkpoint_shape) == len(m.model_shape):
            pairs.update({(a, b) for a, b in zip(m.checkpoint_shape, m.model_shape, strict=True) if a != b})
    if not pairs:
        return "; the checkpoint's have another number of dimensions"
    (theirs, ours), count = min(pairs.items(), key=lambda item: (-item[1], item[0]))
    return f"; in {count} of them it has {theirs:,} where the model has {ours:,}: build the model with {theirs:,} there"


def _is_counter(target: Target) -> bool:
    return target.leaf == "num_batches_tracked" and isinstance(target.owner, nn.modules.batchnorm._NormBase)


def _may_lack(missing: Sequence[str], parts: list[PartPlan], targets: Targets) -> set[str]:
    """The entries that torch itself lets an old file leave out: BatchNorm's counter, which came with version 2."""
    counters = [name for name in missing if _is_counter(targets.entries[name])]
    if not counters:
        return set()
    versions: dict[int, object] = {}
    for part in parts:
        for name, key in part.assigned.items():
            path = key.spelled.rpartition(".")[0]
            if version := part.part.checkpoint.versions.get(path, {}).get("version"):
                versions[id(targets.entries[name].owner)] = version
    known = {name: versions.get(id(targets.entries[name].owner)) for name in counters}
    return {name for name, version in known.items() if not isinstance(version, int) or version < 2}


def _coverage(scope: Collection[str], assignments: Sequence[Assignment], targets: Targets) -> float:
    """Share of the elements in scope that are loaded; of a partly loaded entry, those that are."""
    entries = targets.entries
    sizes: dict[str, int] = {}
    for name in scope:
        target = entries[name]
        sizes.setdefault(target.canonical, target.numel)
    total = sum(sizes.values())
    loaded: dict[str, float] = {}
    for assignment in assignments:
        if assignment.alias_of is None and assignment.fill is None:
            share = 1.0 if (mask := assignment.loaded) is None else mask.sum().item() / mask.numel()
            target = entries[assignment.target]
            loaded[target.canonical] = share * target.numel
    return sum(loaded.values()) / total if total else float(bool(assignments))


def _too_little(parts: list[PartPlan], assignments: Sequence[Assignment], targets: Targets) -> list[Problem]:
    errors = []
    for number, part in enumerate(parts):
        least = part.part.pretrained.min_coverage
        if least is None:
            continue
        coverage = _coverage(part.part.scope, [a for a in assignments if a.part == number], targets)
        if coverage < least:
            message = (
                f"{part.part.pretrained.label} loads {coverage:.2%} of the elements in scope, less than the "
                f"{least:.2%} asked for; narrow into= or include=, or lower min_coverage="
            )
            errors.append(Problem("coverage", message))
    return errors


def _to_freeze(
    parts: list[PartPlan],
    assignments: Sequence[Assignment],
    targets: Targets,
    errors: list[Problem],
    notes: list[str],
) -> tuple[str, ...]:
    names: set[str] = set()
    # What is only partly loaded has to learn the rest.
    partly = {
        targets.entries[a.target].canonical for a in assignments if a.adapter is not None and a.loaded is not None
    }
    for number, part in enumerate(parts):
        freeze = part.part.pretrained.freeze
        if freeze is True:
            loaded = [a.target for a in assignments if a.part == number]
            names.update(name for name in loaded if targets.entries[name].canonical not in partly)
            if trains := [name for name in loaded if targets.entries[name].canonical in partly]:
                notes.append(f"{_few(trains)} stays trainable, because it was only partly loaded")
        elif freeze:
            patterns = PatternSet(freeze, where="freeze")
            names.update(name for name in targets.entries if patterns.matches(*targets.spellings(name)))
            report_unused(patterns, [t.clean for t in targets.entries.values()], "model entry", errors)
    if not names:
        return ()
    # A tied tensor is frozen under all of its names.
    frozen = {targets.entries[name].canonical for name in names}
    return tuple(name for name, target in targets.entries.items() if target.canonical in frozen)
