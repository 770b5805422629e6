"""Planning: each source alone, then all of them together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.mapping.buckets import Assignment, Mismatch, Problem
from warmstart.mapping.grouping import listed, pasteable, printable
from warmstart.mapping.hints import paste, report_unused
from warmstart.mapping.names import WRAPPER_SEGMENTS, without_wrappers
from warmstart.mapping.part_planning import PartPlan, plan_part
from warmstart.mapping.plan import Plan, R
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.targets import Target, Targets
from warmstart.patterns import PatternSet


def make_plan(
    model: nn.Module,
    sources: Sequence[tuple[Pretrained, Checkpoint]],
    applier: Callable[..., R],
) -> Plan[R]:
    """Plan each source alone and join the results.

    Args:
        model: The model to load into; it is not touched.
        sources: Each source's rules and its opened checkpoint.
        applier: What `Plan.apply` calls; the floors above this one write, this one only decides.

    Raises:
        MappingError: The model is not ready to be planned for (lazy or meta entries).
    """
    targets = Targets.of(model)
    parts = [plan_part(i, p, c, targets, len(sources)) for i, (p, c) in enumerate(sources)]
    return _joined(parts, targets, model, applier)


def _joined(parts: list[PartPlan], targets: Targets, model: nn.Module, applier: Callable[..., R]) -> Plan[R]:
    errors = [problem for part in parts for problem in part.errors]
    notes = [note for part in parts for note in part.notes]
    first: dict[str, tuple[int, str]] = {}  # canonical entry -> part and key that give it its value
    assigned: dict[str, tuple[int, str]] = {}
    mismatched: dict[str, Mismatch] = {}
    given: dict[str, int] = {}  # entry -> the part that has a key for it, of the right shape or not
    overlaps: dict[tuple[int, int], list[tuple[str, str, str]]] = {}
    for number, part in enumerate(parts):
        for name, key in part.assigned.items():
            owner, other = first.setdefault(targets.entries[name].canonical, (number, key))
            if owner == number:
                assigned[name] = (number, key)
                given[name] = number
            else:
                overlaps.setdefault((owner, number), []).append((name, other, key))
    for number, part in enumerate(parts):
        for name, mismatch in part.mismatched.items():
            owner = given.setdefault(name, number)
            if owner == number:
                mismatched[name] = mismatch
            else:
                other = assigned[name][1] if name in assigned else mismatched[name].keys[0]
                overlaps.setdefault((owner, number), []).append((name, other, mismatch.keys[0]))
    for (owner, number), rows in overlaps.items():
        errors.append(_overlap(rows, parts[owner], parts[number], targets))
        lost = [key for _, _, key in rows]
        parts[number].unexpected += lost
        parts[number].reported.update(lost)
    in_scope = {name for part in parts for name in part.part.scope}

    assignments, missing, excluded = [], [], []
    for name, target in targets.entries.items():
        group = first.get(target.canonical)
        if name in assigned:
            number, key = assigned[name]
            info = parts[number].part.checkpoint.info(key)
            keep = parts[number].part.pretrained.dtype == "checkpoint" or info.dtype == target.dtype
            casts = None if keep else (info.dtype, target.dtype)
            assignments.append(Assignment(name, (key,), number, target.shape, casts))
        elif name in in_scope and name in mismatched:
            continue
        elif group is not None and name in in_scope:
            writer = next(n for n in assigned if targets.entries[n].canonical == target.canonical)
            assignments.append(Assignment(name, (), group[0], target.shape, alias_of=writer))
        elif name in in_scope:
            missing.append(name)
        else:
            excluded.append(name)
    excluded += sorted(targets.wrapper_own)

    # A source of which nothing is left or nothing fits has one error that says so; listing all its names would bury it.
    nothing = {i for i, part in enumerate(parts) if not part.assigned and not part.mismatched and part.errors}
    errors += unexcused(parts, targets, missing, mismatched, notes, nothing)
    coverage = _coverage(in_scope, [a.target for a in assignments], targets)
    errors += _too_little(parts, targets)
    freeze = _to_freeze(parts, assignments, targets, errors)
    untouched = {name for name in (*missing, *mismatched) if not _migrates(targets.entries[name])}
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
    )


def _overlap(rows: list[tuple[str, str, str]], first: PartPlan, second: PartPlan, targets: Targets) -> Problem:
    names = tuple(name for name, _, _ in rows)
    name, first_key, second_key = rows[0]
    labels = first.part.pretrained.label, second.part.pretrained.label
    if len(rows) == 1:
        what = f"'{name}' is given by two sources: '{printable(first_key)}' of {labels[0]} and '{printable(second_key)}' of"
        what += f" {labels[1]}"
    else:
        shapes = ((name, str(targets.entries[name].shape)) for name in names)
        what = f"{len(rows)} entries are given by two sources, {labels[0]} and {labels[1]}\n{listed(shapes)}"
    message = (
        f"{what}\n  -> leave them to one of the two: Pretrained(..., {paste('exclude', names, targets)}), or give each "
        "its own into="
    )
    return Problem("overlap", message, names)


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
    names = [t.clean for t in targets.entries.values()]
    excused: dict[str, set[str]] = {"allow_missing": set(), "allow_mismatched": set()}
    for part in parts:
        for where, found in excused.items():
            patterns = PatternSet(getattr(part.part.pretrained, where), where=where)
            found.update(name for name in targets.entries if patterns.matches(*targets.spellings(name)))
            report_unused(patterns, names, "model entry", errors)

    migrated = {name for name in missing if _migrates(targets.entries[name])}
    if migrated:
        notes.append(
            f"{len(migrated)} num_batches_tracked are not in the file and keep their value, as in torch itself"
        )
    open_missing = [name for name in missing if name not in excused["allow_missing"] | migrated]
    if open_missing and len(nothing) < len(parts):
        message = (
            f"{_count(open_missing, 'model entry', 'model entries')} without a key in the checkpoint\n"
            f"{listed((n, str(targets.entries[n].shape)) for n in open_missing)}\n"
            f"  -> to let them keep their own initialisation: {paste('allow_missing', open_missing, targets)}"
        )
        errors.append(Problem("missing", message, tuple(open_missing)))

    bad = {name: m for name, m in mismatched.items() if name not in excused["allow_mismatched"]}
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
            )
        errors.append(Problem("mismatched", message, tuple(bad)))

    for number, part in enumerate(parts):
        allowed = PatternSet(part.part.pretrained.allow_unexpected, where="allow_unexpected")
        keys = part.part.checkpoint.keys()
        segments = WRAPPER_SEGMENTS - targets.clean_segments()
        hits = {k for k in keys if allowed.matches(k, without_wrappers(k, segments))} if allowed else set()
        report_unused(allowed, keys, "checkpoint key", errors)
        left = [key for key in sorted(part.unexpected) if key not in hits and key not in part.reported]
        if left and number not in nothing:
            info = part.part.checkpoint.info
            fix = pasteable("allow_unexpected", left, set(keys).difference(left))
            message = (
                f"{_count(left, 'key', 'keys')} of {part.part.pretrained.label} fit nothing in the model\n"
                f"{listed((key, str(info(key).shape)) for key in left)}\n"
                f"  -> to leave them unused: {fix}"
            ) + (f"\n{part.hint}" if part.hint else "")
            errors.append(Problem("unexpected", message, tuple(left)))
    return errors


def _count(names: Collection[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


def _migrates(target: Target) -> bool:
    """Whether torch itself lets an old file leave the entry out (BatchNorm's counter, added in version 2)."""
    return target.leaf == "num_batches_tracked" and isinstance(target.owner, nn.modules.batchnorm._NormBase)


def _coverage(scope: Collection[str], loaded: Sequence[str], targets: Targets) -> float:
    def elements(names: Collection[str]) -> int:
        unique = {targets.entries[name].canonical for name in names}
        return sum(targets.entries[name].tensor.numel() for name in unique)

    total = elements(scope)
    return elements(loaded) / total if total else float(bool(loaded))


def _too_little(parts: list[PartPlan], targets: Targets) -> list[Problem]:
    errors = []
    for part in parts:
        least = part.part.pretrained.min_coverage
        if least is None:
            continue
        loaded = {targets.entries[name].canonical for name in part.assigned}
        aliases = [name for name in part.part.scope if targets.entries[name].canonical in loaded]
        coverage = _coverage(part.part.scope, aliases, targets)
        if coverage < least:
            message = (
                f"{part.part.pretrained.label} loads {coverage:.2%} of the elements in scope, less than the "
                f"{least:.2%} asked for; narrow into= or include=, or lower min_coverage="
            )
            errors.append(Problem("coverage", message))
    return errors


def _to_freeze(
    parts: list[PartPlan], assignments: Sequence[Assignment], targets: Targets, errors: list[Problem]
) -> tuple[str, ...]:
    names: set[str] = set()
    for number, part in enumerate(parts):
        freeze = part.part.pretrained.freeze
        if freeze is True:
            names.update(a.target for a in assignments if a.part == number)
        elif freeze:
            patterns = PatternSet(freeze, where="freeze")
            names.update(name for name in targets.entries if patterns.matches(*targets.spellings(name)))
            report_unused(patterns, [t.clean for t in targets.entries.values()], "model entry", errors)
    # A tied tensor is frozen under all of its names.
    frozen = {targets.entries[name].canonical for name in names}
    return tuple(name for name, target in targets.entries.items() if target.canonical in frozen)
