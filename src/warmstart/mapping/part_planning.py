"""Planning one source alone, step by step in the order the documentation gives.

Each step sees what the one before it left; every key and every entry is put into its bucket once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.mapping.buckets import Mismatch, Part, Problem
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.hints import did_you_mean, paste, report_unused
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
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.renames import Renamer
from warmstart.mapping.targets import Target, Targets
from warmstart.patterns import PatternSet
from warmstart.tensors import bits_lost, castable, dtype_name

_GUESSES = 8  # rules for which the nearest names are looked up: it costs more than planning itself


@dataclass(slots=True)
class Key:
    """A checkpoint key on its way: as the file spells it, without wrappers, and its name so far."""

    spelled: str
    clean: str
    name: str
    shape: tuple[int, ...]
    rewritten: str | None = None


@dataclass(slots=True)
class PartPlan:
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


def plan_part(number: int, pretrained: Pretrained, checkpoint: Checkpoint, targets: Targets, parts: int) -> PartPlan:
    errors: list[Problem] = []
    out = PartPlan(Part(pretrained, checkpoint, None, ()), errors=errors, notes=list(checkpoint.notes))
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
        out.hint = better_prefix(plain, shapes, pretrained, len(out.assigned))
    _leftovers(leftover, into, scope, targets, out)
    _note_load_hooks(out, targets)
    check_casts(out, targets, pretrained)
    check_nothing(out, named, shapes)
    if parts > 1:
        out.notes = [f"source {number}: {note}" for note in out.notes]
    return out


def _clean_keys(checkpoint: Checkpoint, targets: Targets) -> list[Key]:
    """All keys, sorted, so that a plan does not depend on their order."""
    segments = WRAPPER_SEGMENTS - targets.clean_segments()
    keys = []
    for spelled in sorted(checkpoint.keys()):
        clean = without_wrappers(spelled, segments)
        keys.append(Key(spelled, clean, clean, checkpoint.info(spelled).shape))
    return keys


def _selected(keys: list[Key], pretrained: Pretrained, errors: list[Problem]) -> tuple[list[Key], list[str]]:
    select = PatternSet(pretrained.select, where="select")
    if not select:
        return keys, []
    kept, ignored = [], []
    for key in keys:
        if select.matches(key.spelled, key.clean):
            kept.append(key)
        else:
            ignored.append(key.spelled)
    report_unused(select, [key.clean for key in keys], "checkpoint key", errors)
    return kept, ignored


def _renamed(keys: list[Key], pretrained: Pretrained, errors: list[Problem]) -> None:
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
            why = did_you_mean(prefix, originals)
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
                else did_you_mean(rule.rule, originals)
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
        message = f"into={into!r} is no module of the model{did_you_mean(into, targets.modules)}"
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
        report_unused(patterns, [t.clean for t in entries], "model entry", errors)
    if not scope and known:
        errors.append(Problem("into", "nothing of the model is in scope; widen into=, include= or exclude="))
    return scope


def _without_collisions(keys: list[Key], out: PartPlan) -> list[Key]:
    """The first key of each name; the others are unexpected, with an error that names both."""
    kept: dict[str, Key] = {}
    for key in keys:
        other = kept.setdefault(key.name, key)
        if other is not key:
            out.errors.append(_collision(other, key))
            out.unexpected.append(key.spelled)
            out.reported.add(key.spelled)
    return list(kept.values())


def _collision(first: Key, second: Key) -> Problem:
    names = f"'{printable(first.spelled)}' and '{printable(second.spelled)}'"
    if first.clean == second.clean:
        message = (
            f"{names} are both '{printable(first.clean)}' without wrapper segments; "
            "keep one of them: select= takes keys as the file spells them"
        )
    else:
        inferred = first.name in (first.rewritten, second.rewritten)
        how = (
            "change the prefix by hand with strip_prefix=" if inferred else "make the rule that renames them more exact"
        )
        message = f"{names} would both become '{printable(first.name)}'; {how}, or leave one out with select="
    return Problem("collision", message, (first.spelled, second.spelled))


def _inferred(named: Shapes, shapes: Shapes, into: str, errors: list[Problem]) -> Prefix | None:
    pairs = infer_prefix(named, shapes)
    if len(pairs) > 1 and (named_alike := [p for p in pairs if into and (p.strip, p.add) == (into, "")]):
        return named_alike[0]  # of a whole model's file: its keys are the entries' own names
    if len(pairs) > 1:
        choices = "; ".join(str(pair) for pair in pairs[:_GUESSES]) + ("; ..." if len(pairs) > _GUESSES else "")
        first = [f'into="{join(into, pairs[0].add)}"'] if pairs[0].add else []
        first += [f'strip_prefix="{printable(pairs[0].strip)}"'] if pairs[0].strip else []
        message = (
            f"{len(pairs)} prefix changes fit equally well ({pairs[0].score} keys each): {choices}\n"
            f"  -> say which one is meant; for the first of them: {', '.join(first)}"
        )
        errors.append(Problem("ambiguous", message))
        return None
    return pairs[0] if pairs else None


def _with_prefix(keys: list[Key], prefix: Prefix, shapes: Shapes, out: PartPlan) -> list[Key]:
    for key in keys:
        if shapes.get(key.name) == key.shape:
            continue  # never rewrites a key that is already right
        key.rewritten = prefix.rewrite(key.name)
        if key.rewritten is not None and key.rewritten in shapes:
            key.name = key.rewritten
    return _without_collisions(keys, out)


def _matched(keys: list[Key], local: dict[str, Target], out: PartPlan) -> list[Key]:
    leftover = []
    for key in keys:
        target = local.get(key.name)
        if target is None:
            leftover.append(key)
        elif target.tensor.layout != torch.strided or target.tensor.is_quantized:
            what = "quantised" if target.tensor.is_quantized else "sparse"
            message = f"'{target.name}' is {what} in the model and cannot be written in place; leave it out: "
            out.errors.append(Problem("dtype", f'{message}exclude=["{target.clean}"]', (target.name,)))
            out.assigned[target.name] = key.spelled
        elif target.shape == key.shape:
            out.assigned[target.name] = key.spelled
        else:
            out.mismatched[target.name] = Mismatch((key.spelled,), key.shape, target.shape)
    return leftover


def _note_load_hooks(out: PartPlan, targets: Targets) -> None:
    """Say so where a module would change what it is given: its values are written as the file has them."""
    owners = {type(t.owner).__name__ for name in out.assigned if _has_load_hooks((t := targets.entries[name]).owner)}
    if owners:
        out.notes.append(
            f"{', '.join(sorted(owners))}: own load hooks are not called, the values are written as the checkpoint has them"
        )


def _has_load_hooks(owner: nn.Module) -> bool:
    # torch's BatchNorm overrides it for its counter alone, which has a rule of its own here.
    own = type(owner)._load_from_state_dict
    plain = own in (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)
    return not plain or bool(owner._load_state_dict_pre_hooks) or bool(owner._load_state_dict_post_hooks)


def _leftovers(keys: list[Key], into: str, scope: list[Target], targets: Targets, out: PartPlan) -> None:
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


def check_casts(out: PartPlan, targets: Targets, pretrained: Pretrained) -> None:
    kinds: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    narrowed: list[str] = []
    for name, key in out.assigned.items():
        source, target = out.part.checkpoint.info(key).dtype, targets.entries[name].dtype
        if source == target:
            continue
        if not castable(source, target):
            kinds.setdefault((source, target), []).append(name)
        elif pretrained.dtype == "model" and bits_lost(source, target):
            narrowed.append(name)
    for (source, target), names in kinds.items():
        message = (
            f"{dtype_name(source)} in the checkpoint cannot become {dtype_name(target)} without another meaning:\n"
            f"{listed((name, '') for name in names)}\n"
            f"  -> leave them out, {paste('exclude', names, targets)}, or cast the source to {dtype_name(target)} first"
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


def check_nothing(out: PartPlan, named: Shapes, shapes: Shapes) -> None:
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


def better_prefix(plain: Shapes, shapes: Shapes, pretrained: Pretrained, assigned: int) -> str:
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
