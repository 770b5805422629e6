"""Planning: from rules, keys and entries to a plan, step by step in the order the documentation gives.

Each step sees what the one before it left; every key and every entry is put into its bucket once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.mapping.buckets import Assignment, Mismatch, Part, Problem
from warmstart.mapping.grouping import listed, pasteable, printable
from warmstart.mapping.names import (
    WRAPPER_SEGMENTS,
    Prefix,
    Shapes,
    infer_prefix,
    join,
    matches,
    strip,
    without_wrappers,
)
from warmstart.mapping.plan import Plan, R
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.renames import Renamer
from warmstart.mapping.targets import Target, Targets
from warmstart.patterns import PatternSet, nearest
from warmstart.tensors import bits_lost

_GUESSES = 8  # rules for which the nearest names are looked up: it costs more than planning itself


@dataclass(slots=True)
class _Key:
    """A checkpoint key on its way: as the file spells it, without wrappers, and its name so far."""

    spelled: str
    clean: str
    name: str
    shape: tuple[int, ...]
    rewritten: str | None = None


@dataclass(slots=True)
class _PartPlan:
    """What planning one source alone decided.

    Attributes:
        reported: Keys among the unexpected ones that an error of their own names already.
        hint: The prefix that would fit better than the one given, as a line to type; empty if there is none.
    """

    part: Part
    assigned: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, Mismatch] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    errors: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reported: set[str] = field(default_factory=set)
    hint: str = ""


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
    parts = [_plan_part(i, p, c, targets, len(sources)) for i, (p, c) in enumerate(sources)]
    return _joined(parts, targets, model, applier)


# ---- one source ----


def _plan_part(number: int, pretrained: Pretrained, checkpoint: Checkpoint, targets: Targets, parts: int) -> _PartPlan:
    errors: list[Problem] = []
    out = _PartPlan(Part(pretrained, checkpoint, None, ()), errors=errors, notes=list(checkpoint.notes))
    keys, out.ignored = _selected(_clean_keys(checkpoint, targets), pretrained, errors)
    keys = _without_collisions(keys, out)
    plain = {key.clean: key.shape for key in keys}
    _renamed(keys, pretrained, errors)
    scope = _scope(pretrained, targets, errors)
    into = targets.clean_paths.get(pretrained.into, pretrained.into)
    local = {(strip(t.clean, into) or t.clean): t for t in scope}
    keys = _without_collisions(keys, out)
    named = {key.name: key.shape for key in keys}
    shapes = {name: t.shape for name, t in local.items()}

    prefix = _inferred(named, shapes, into, errors) if pretrained.strip_prefix is None else None
    if prefix is not None:
        keys = _with_prefix(keys, prefix, shapes, out)
        out.notes.append(f"prefix inferred: {prefix} ({prefix.score} of {len(keys)} keys fit then)")
    pair = (prefix.strip, prefix.add) if prefix else None
    out.part = Part(pretrained, checkpoint, pair, tuple(t.name for t in scope))

    leftover = _matched(keys, local, out)
    if leftover and pretrained.strip_prefix is not None:
        out.hint = _better_prefix(plain, shapes, pretrained, len(out.assigned))
    _leftovers(leftover, into, scope, targets, out)
    _check_casts(out, targets, pretrained)
    _check_nothing(out, named, shapes)
    if parts > 1:
        out.notes = [f"source {number}: {note}" for note in out.notes]
    return out


def _clean_keys(checkpoint: Checkpoint, targets: Targets) -> list[_Key]:
    """All keys, sorted, so that a plan does not depend on their order."""
    segments = WRAPPER_SEGMENTS - targets.clean_segments()
    keys = []
    for spelled in sorted(checkpoint.keys()):
        clean = without_wrappers(spelled, segments)
        keys.append(_Key(spelled, clean, clean, checkpoint.info(spelled).shape))
    return keys


def _selected(keys: list[_Key], pretrained: Pretrained, errors: list[Problem]) -> tuple[list[_Key], list[str]]:
    select = PatternSet(pretrained.select, where="select")
    if not select:
        return keys, []
    kept, ignored = [], []
    for key in keys:
        if select.matches(key.spelled, key.clean):
            kept.append(key)
        else:
            ignored.append(key.spelled)
    _report_unused(select, [key.clean for key in keys], "checkpoint key", errors)
    return kept, ignored


def _renamed(keys: list[_Key], pretrained: Pretrained, errors: list[Problem]) -> None:
    """`strip_prefix`, then the rename stages, on what is left of each name."""
    originals = [key.name for key in keys]
    if pretrained.strip_prefix:
        prefix = pretrained.strip_prefix.removeprefix("?").strip(".")
        hits = 0
        for key in keys:
            rest = strip(key.name, prefix)
            if rest is not None:
                key.name = rest
                hits += 1
        if not hits and not pretrained.strip_prefix.startswith("?"):
            why = _did_you_mean(prefix, originals)
            if any(strip(key.spelled, prefix) is not None for key in keys):
                why = (
                    "; it is removed as a wrapper's already: leave strip_prefix= out, or write it without that segment"
                )
            message = f"strip_prefix={prefix!r} is the leading path of no checkpoint key{why}"
            errors.append(Problem("unused", message, (prefix,)))
    try:
        renamer = Renamer(pretrained.stages)
        for key in keys:
            key.name = renamer(key.name)
    except MappingError as error:
        errors.append(Problem("unused", str(error)))
        return
    for number, rule in enumerate(renamer.without_hit()):
        stage = f" (stage {rule.stage + 1})" if len(renamer.stages) > 1 else ""
        why = ""
        if number < _GUESSES:
            wrapped = next((k for k in keys if k.spelled != k.clean and rule.regex.search(k.spelled)), None)
            why = (
                f": rules see '{printable(wrapped.clean)}', without the wrapper segments of '{printable(wrapped.spelled)}'"
                if wrapped
                else _did_you_mean(rule.rule, originals)
            )
        message = (
            f"rename rule {rule.rule!r}{stage} matches no checkpoint key in whole segments{why}; "
            "leave it out, or start it with '?' if it may match nothing"
        )
        errors.append(Problem("unused", message, (rule.rule,)))


def _scope(pretrained: Pretrained, targets: Targets, errors: list[Problem]) -> list[Target]:
    """The entries under `into`, narrowed by `include` and `exclude`, in the model's order."""
    entries = list(targets.entries.values())
    into = pretrained.into
    known = not into or into in targets.modules
    if not known:
        message = f"into={into!r} is no module of the model{_did_you_mean(into, targets.modules)}"
        errors.append(Problem("into", message, (into,)))
    clean_into = targets.clean_paths.get(into, into)
    include = PatternSet(pretrained.include, where="include")
    exclude = PatternSet(pretrained.exclude, where="exclude")
    scope = []
    for target in entries:
        spellings = targets.spellings(target.name)
        included = not include or include.matches(*spellings)
        excluded = bool(exclude) and exclude.matches(*spellings)
        if included and not excluded and strip(target.clean, clean_into) is not None:
            scope.append(target)
    for patterns in (include, exclude):
        _report_unused(patterns, [t.clean for t in entries], "model entry", errors)
    if not scope and known:
        errors.append(Problem("into", "nothing of the model is in scope; widen into=, include= or exclude="))
    return scope


def _without_collisions(keys: list[_Key], out: _PartPlan) -> list[_Key]:
    """The first key of each name; the others are unexpected, with an error that names both."""
    kept: dict[str, _Key] = {}
    for key in keys:
        other = kept.setdefault(key.name, key)
        if other is not key:
            out.errors.append(_collision(other, key))
            out.unexpected.append(key.spelled)
            out.reported.add(key.spelled)
    return list(kept.values())


def _collision(first: _Key, second: _Key) -> Problem:
    names = f"'{printable(first.spelled)}' and '{printable(second.spelled)}'"
    if first.clean == second.clean:
        message = (
            f"{names} are both '{printable(first.clean)}' without wrapper segments; "
            "keep one of them: select= takes keys as the file spells them"
        )
    else:
        message = (
            f"{names} would both become '{printable(first.name)}'; "
            "make the rule that renames them more exact, or leave one out with select="
        )
    return Problem("collision", message, (first.spelled, second.spelled))


def _inferred(named: Shapes, shapes: Shapes, into: str, errors: list[Problem]) -> Prefix | None:
    pairs = infer_prefix(named, shapes)
    if len(pairs) > 1 and (named_alike := [p for p in pairs if into and (p.strip, p.add) == (into, "")]):
        return named_alike[0]  # of a whole model's file: its keys are the entries' own names
    if len(pairs) > 1:
        choices = "; ".join(str(pair) for pair in pairs[:_GUESSES]) + ("; ..." if len(pairs) > _GUESSES else "")
        first = [f'into="{join(into, pairs[0].add)}"'] if pairs[0].add else []
        first += [f'strip_prefix="{pairs[0].strip}"'] if pairs[0].strip else []
        message = (
            f"{len(pairs)} prefix changes fit equally well ({pairs[0].score} keys each): {choices}\n"
            f"  -> say which one is meant; for the first of them: {', '.join(first)}"
        )
        errors.append(Problem("ambiguous", message))
        return None
    return pairs[0] if pairs else None


def _with_prefix(keys: list[_Key], prefix: Prefix, shapes: Shapes, out: _PartPlan) -> list[_Key]:
    for key in keys:
        if shapes.get(key.name) == key.shape:
            continue  # never rewrites a key that is already right
        key.rewritten = prefix.rewrite(key.name)
        if key.rewritten is not None and key.rewritten in shapes:
            key.name = key.rewritten
    return _without_collisions(keys, out)


def _matched(keys: list[_Key], local: dict[str, Target], out: _PartPlan) -> list[_Key]:
    leftover = []
    for key in keys:
        target = local.get(key.name)
        if target is None:
            leftover.append(key)
        elif target.shape == key.shape:
            out.assigned[target.name] = key.spelled
        else:
            out.mismatched[target.name] = Mismatch((key.spelled,), key.shape, target.shape)
    return leftover


def _leftovers(keys: list[_Key], into: str, scope: list[Target], targets: Targets, out: _PartPlan) -> None:
    """Unmatched keys: ignored if they name something of the model outside the scope, else unexpected."""
    inside = {t.clean for t in scope}
    outside = ({t.clean for t in targets.entries.values()} | targets.wrapper_own) - inside
    known = (
        (outside, "outside the scope"),
        (targets.transient, "non-persistent buffers, which the model computes itself"),
        (targets.extra_state, "modules' extra state, which is not weights"),
    )
    reasons: dict[str, list[str]] = {}
    for key in keys:
        spellings = [key.clean, join(into, key.name)] + ([join(into, key.rewritten)] if key.rewritten else [])
        reason = next((words for group, words in known if any(name in group for name in spellings)), None)
        if reason is None and key.name.rpartition(".")[2] == "_extra_state":
            reason = known[2][1]
        if reason is None:
            out.unexpected.append(key.spelled)
        else:
            out.ignored.append(key.spelled)
            reasons.setdefault(reason, []).append(key.spelled)
    for reason, names in reasons.items():
        shown = ", ".join(printable(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
        out.notes.append(f"{len(names)} key{'s' * (len(names) > 1)} ignored ({reason}): {shown}")


def _check_casts(out: _PartPlan, targets: Targets, pretrained: Pretrained) -> None:
    kinds: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    narrowed: list[str] = []
    for name, key in out.assigned.items():
        source, target = out.part.checkpoint.info(key).dtype, targets.entries[name].dtype
        if source == target:
            continue
        if not _castable(source, target):
            kinds.setdefault((source, target), []).append(name)
        elif pretrained.dtype == "model" and bits_lost(source, target):
            narrowed.append(name)
    for (source, target), names in kinds.items():
        message = (
            f"{_words(source)} in the checkpoint cannot become {_words(target)} without another meaning:\n"
            f"{listed((name, '') for name in names)}\n"
            f"  -> leave them out, {_pasteable('exclude', names, targets)}, or cast the source to {_words(target)} first"
        )
        out.errors.append(Problem("dtype", message, tuple(names)))
    if narrowed and not pretrained.allow_narrowing:
        message = (
            f"{len(narrowed)} tensors would be rounded to the model's dtype:\n"
            f"{listed((name, '') for name in narrowed)}\n"
            "  -> allow_narrowing=True, or build the model in the checkpoint's dtype"
        )
        out.errors.append(Problem("dtype", message, tuple(narrowed)))
    elif narrowed:
        out.notes.append(f"{len(narrowed)} tensors are rounded to the model's dtype")


def _castable(source: torch.dtype, target: torch.dtype) -> bool:
    def kind(dtype: torch.dtype) -> str:
        if dtype.is_floating_point:
            return "float"
        if dtype.is_complex:
            return "complex"
        return "bool" if dtype == torch.bool else "int"

    quantised = {torch.quint8, torch.qint8, torch.qint32}
    return kind(source) == kind(target) and not {source, target} & quantised


def _check_nothing(out: _PartPlan, named: Shapes, shapes: Shapes) -> None:
    """Nothing fits at all: say what does not, and what would have."""
    if not shapes or out.assigned or any(problem.kind == "ambiguous" for problem in out.errors):
        return
    if not named:
        message = f"select= leaves none of the {len(out.part.checkpoint)} keys; widen it"
        out.errors.append(Problem("nothing matched", message))
        return
    if out.mismatched:
        message = (
            f"{len(out.mismatched)} names fit, but every key has another shape than its entry; is it the right file, or "
            "the right size of the model?"
        )
        out.errors.append(Problem("nothing matched", message))
        return
    keys = "\n".join(f"    {printable(key)}  {shape}" for key, shape in list(named.items())[:4])
    entries = "\n".join(f"    {name}  {shape}" for name, shape in list(shapes.items())[:4])
    fix = out.hint or "  -> rename={regex: replacement} maps the first onto the second, if it is the right file at all"
    message = (
        f"none of the {len(named)} keys fits any of the {len(shapes)} model entries in scope\n"
        f"  the checkpoint has keys such as\n{keys}\n  the model has entries such as\n{entries}\n{fix}"
    )
    out.errors.append(Problem("nothing matched", message))


def _better_prefix(plain: Shapes, shapes: Shapes, pretrained: Pretrained, assigned: int) -> str:
    """The prefix that would match more keys than the one that was given, as a line to type; empty if there is none."""
    renamer = Renamer(pretrained.stages)
    try:
        plain = {renamer(name): shape for name, shape in plain.items()}
    except MappingError:
        return ""
    as_is, pairs = matches(plain, shapes), infer_prefix(plain, shapes)
    best = pairs[0].score if len(pairs) == 1 else as_is
    if best <= assigned:
        return ""
    what = f"{pairs[0]} is inferred then" if best > as_is else "the names are right as they are"
    return f"  -> leave strip_prefix= out: {what}, and {best} of {len(plain)} keys match"


def _report_unused(patterns: PatternSet, names: Collection[str], what: str, errors: list[Problem]) -> None:
    for number, pattern in enumerate(patterns.without_hit()):
        near = _did_you_mean(pattern.text, names) if number < _GUESSES else ""
        message = (
            f"{patterns.where}={pattern.text!r} matches no {what}{near}; leave it out, or start it with '?' if it may "
            "match nothing"
        )
        errors.append(Problem("unused", message, (pattern.text,)))


def _did_you_mean(text: str, names: Collection[str]) -> str:
    near = nearest(text, names)
    return f"; did you mean {' or '.join(repr(printable(name)) for name in near)}?" if near else ""


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- all sources together ----


def _joined(parts: list[_PartPlan], targets: Targets, model: nn.Module, applier: Callable[..., R]) -> Plan[R]:
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
    errors += _unexcused(parts, targets, missing, mismatched, notes, nothing)
    coverage = _coverage(in_scope, [a.target for a in assignments], targets)
    errors += _too_little(parts, targets)
    freeze = _to_freeze(parts, assignments, targets, errors)
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


def _overlap(rows: list[tuple[str, str, str]], first: _PartPlan, second: _PartPlan, targets: Targets) -> Problem:
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
        f"{what}\n  -> leave them to one of the two: Pretrained(..., {_pasteable('exclude', names, targets)}), or give each "
        "its own into="
    )
    return Problem("overlap", message, names)


def _unexcused(
    parts: list[_PartPlan],
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
            _report_unused(patterns, names, "model entry", errors)

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
            f"  -> to let them keep their own initialisation: {_pasteable('allow_missing', open_missing, targets)}"
        )
        errors.append(Problem("missing", message, tuple(open_missing)))

    bad = {name: m for name, m in mismatched.items() if name not in excused["allow_mismatched"]}
    if bad:
        rows = ((n, f"checkpoint {m.checkpoint_shape}, model {m.model_shape}") for n, m in bad.items())
        message = (
            f"{_count(bad, 'entry', 'entries')} of another shape\n{listed(rows)}\n"
            f"  -> to let them keep their own initialisation: {_pasteable('allow_mismatched', bad, targets)}"
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
        _report_unused(allowed, keys, "checkpoint key", errors)
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


def _pasteable(field_name: str, names: Collection[str], targets: Targets) -> str:
    """The line to type for these entries, whose names are printed without wrapper segments."""
    chosen = set(names)
    others = [t.clean for name, t in targets.entries.items() if name not in chosen]
    return pasteable(field_name, [targets.entries[name].clean for name in names], others)


def _migrates(target: Target) -> bool:
    """Whether torch itself lets an old file leave the entry out (BatchNorm's counter, added in version 2)."""
    return target.leaf == "num_batches_tracked" and isinstance(target.owner, nn.modules.batchnorm._NormBase)


def _coverage(scope: Collection[str], loaded: Sequence[str], targets: Targets) -> float:
    def elements(names: Collection[str]) -> int:
        unique = {targets.entries[name].canonical for name in names}
        return sum(targets.entries[name].tensor.numel() for name in unique)

    total = elements(scope)
    return elements(loaded) / total if total else float(bool(loaded))


def _too_little(parts: list[_PartPlan], targets: Targets) -> list[Problem]:
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
    parts: list[_PartPlan], assignments: Sequence[Assignment], targets: Targets, errors: list[Problem]
) -> tuple[str, ...]:
    names: set[str] = set()
    for number, part in enumerate(parts):
        freeze = part.part.pretrained.freeze
        if freeze is True:
            names.update(a.target for a in assignments if a.part == number)
        elif freeze:
            patterns = PatternSet(freeze, where="freeze")
            names.update(name for name in targets.entries if patterns.matches(*targets.spellings(name)))
            _report_unused(patterns, [t.clean for t in targets.entries.values()], "model entry", errors)
    # A tied tensor is frozen under all of its names.
    frozen = {targets.entries[name].canonical for name in names}
    return tuple(name for name, target in targets.entries.items() if target.canonical in frozen)
