"""Planning one source alone, step by step in the order the documentation gives.

Each step sees what the one before it left; every key and every entry is put into its bucket once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.mapping.buckets import Mismatch, Part
from warmstart.mapping.conversions.converting import convert
from warmstart.mapping.derivations import Shape
from warmstart.mapping.grouping import printable
from warmstart.mapping.hints import GUESSES, did_you_mean, report_unused
from warmstart.mapping.keys import Key
from warmstart.mapping.load_hooks.load_hooks import honour, may_say
from warmstart.mapping.model.names import KeyShapes, Prefix, Shapes, infer_prefix, join, strip
from warmstart.mapping.model.targets import Target, Targets
from warmstart.mapping.planning.checks import better_prefix, check_casts, check_nothing, foreign
from warmstart.mapping.planning.filling import fill
from warmstart.mapping.planning.fitting import Fitting, adapters_of
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.planning.peft_scope import apart, view
from warmstart.mapping.planning.pool import clean_keys, renamed, selected, without_collisions
from warmstart.mapping.planning.suffixes import match_suffixes
from warmstart.mapping.pretrained import Pretrained
from warmstart.patterns import PatternSet


@dataclass(frozen=True, slots=True)
class Scope:
    """The entries that a source may give values to, under their names relative to `into`, in the model's order."""

    into: str
    entries: dict[str, Target]

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: target.shape for name, target in self.entries.items()}


def plan_part(number: int, pretrained: Pretrained, checkpoint: Checkpoint, targets: Targets, parts: int) -> PartPlan:
    out = PartPlan(Part(pretrained, checkpoint, None, ()), notes=list(checkpoint.notes))
    keys = selected(clean_keys(checkpoint, targets), pretrained, out)
    keys = without_collisions(keys, out)
    plain = {key.clean: key.shape for key in keys}
    renamed(keys, pretrained, out)
    scope = _scope(pretrained, targets, out)
    keys = without_collisions(keys, out)
    keys = _converted(keys, pretrained, out)
    if targets.peft_prefixes:
        scope = _seen(scope, keys, out)
    named, shapes = {key.name: key.shape for key in keys}, scope.shapes

    prefix: Prefix | None = None
    if pretrained.match == "suffix":
        _with_suffixes(keys, scope, out)
    elif pretrained.strip_prefix is None and not (out.hint and targets.peft_prefixes):
        prefix = _inferred(named, shapes, scope.into, out)
    if prefix is not None:
        keys = _with_prefix(keys, prefix, shapes, out)
        out.notes.append(f"prefix inferred: {prefix} ({prefix.score} of {len(keys)} keys fit then)")
    pair = (prefix.strip, prefix.add) if prefix else None
    out.part = Part(pretrained, checkpoint, pair, tuple(t.name for t in scope.entries.values()))

    keys = _by_their_modules(keys, scope, targets, out)
    _settle(keys, scope, targets, out)
    out.adapters = adapters_of(pretrained, targets, out)
    leftover = _matched(keys, scope, targets, out)
    fill(pretrained, list(scope.entries.values()), targets, out)
    out.notes += apart(list(scope.entries.values()), out.assigned)
    if leftover and not targets.peft_prefixes:  # keys of an adapter, which a plain model has no place for
        out.hint = view(list(scope.entries.values()), scope.into, [key.name for key in leftover]).hint
    if leftover and pretrained.strip_prefix is not None and not out.hint:
        out.hint = better_prefix(plain, shapes, pretrained, len(out.assigned))
    if leftover and out.assigned and not out.hint:
        out.hint = foreign(out, len(leftover), len(keys), len(shapes))
    _leftovers(leftover, scope, targets, out)
    check_casts(out, targets)
    check_nothing(out, named, shapes)
    if parts > 1:
        out.notes = [f"source {number}: {note}" for note in out.notes]
    return out


def _scope(pretrained: Pretrained, targets: Targets, out: PartPlan) -> Scope:
    """The entries under `into`, narrowed by `include` and `exclude`."""
    entries = list(targets.entries.values())
    into = pretrained.into
    known = not into or into in targets.modules
    if not known:
        message = f"into={into!r} is no module of the model{did_you_mean(into, targets.modules)}"
        out.problem("into", message, (into,))
    clean_into = targets.clean_paths.get(into, into)
    include = PatternSet(pretrained.include, where="include")
    exclude = PatternSet(pretrained.exclude, where="exclude")
    scope = {}
    for target in entries:
        included = not include or include.matches(*targets.spellings(target.name))
        excluded = bool(exclude) and exclude.matches(*targets.spellings(target.name))
        local = strip(target.clean, clean_into)
        if included and not excluded and local is not None:
            scope[local] = target
    for patterns in (include, exclude):
        report_unused(patterns, [t.clean for t in entries], "model entry", out.errors)
    if not scope and known:
        out.problem("into", "nothing of the model is in scope; widen into=, include= or exclude=")
    return Scope(clean_into, scope)


def _converted(keys: list[Key], pretrained: Pretrained, out: PartPlan) -> list[Key]:
    """Conversions put what they make in the place of the keys they take."""
    if not pretrained.conversions:
        return keys
    converting = convert(keys, pretrained.conversions)
    out.errors += converting.errors
    out.reported.update(key.spelled for key in converting.failed)
    out.unexpected += [key.spelled for key in [*converting.displaced, *converting.failed]]
    return without_collisions(converting.keys, out)


def _seen(scope: Scope, keys: list[Key], out: PartPlan) -> Scope:
    """Of a PEFT model, the side that the keys are of, under the names that they know it by."""
    seen = view(list(scope.entries.values()), scope.into, [key.name for key in keys])
    if seen.problem:
        out.problem("ambiguous", seen.problem)
    out.notes += seen.notes
    out.hint = seen.hint
    named = [(seen.names[t.name], t) for t in scope.entries.values() if t.name in seen.names]
    return Scope(scope.into, {strip(name, scope.into) or name: target for name, target in named})


def _with_suffixes(keys: list[Key], scope: Scope, out: PartPlan) -> None:
    found = match_suffixes({key.name: key.shape for key in keys}, scope.shapes)
    for key in keys:
        key.name = found.pairs.get(key.name, key.name)
    for rivals, entries in found.ties[:GUESSES]:
        first = printable(rivals[0])
        message = (
            f"{_some(rivals)} and {_some(entries)} share their longest suffix and shape, so that no pair of them is better\n"
            f"  -> say which is meant, for example rename={{r'{first}': '{printable(entries[0])}'}}, or leave some out with "
            "select= or exclude="
        )
        out.problem("ambiguous", message, (*rivals, *entries))
    if len(found.ties) > GUESSES:
        out.problem("ambiguous", f"... and {len(found.ties) - GUESSES} more ties of the same kind")


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"'{printable(name)}'" for name in names[:4]) + more


def _inferred(named: KeyShapes, shapes: Shapes, into: str, out: PartPlan) -> Prefix | None:
    pairs = infer_prefix(named, shapes)
    if len(pairs) > 1 and (named_alike := [p for p in pairs if into and (p.strip, p.add) == (into, "")]):
        return named_alike[0]  # of a whole model's file: its keys are the entries' own names
    if len(pairs) > 1:
        choices = "; ".join(str(pair) for pair in pairs[:GUESSES]) + ("; ..." if len(pairs) > GUESSES else "")
        first = [f'into="{join(into, pairs[0].add)}"'] if pairs[0].add else []
        first += [f'strip_prefix="{printable(pairs[0].strip)}"'] if pairs[0].strip else []
        message = (
            f"{len(pairs)} prefix changes fit equally well ({pairs[0].score} keys each): {choices}\n"
            f"  -> say which one is meant; for the first of them: {', '.join(first)}"
        )
        out.problem("ambiguous", message)
        return None
    return pairs[0] if pairs else None


def _with_prefix(keys: list[Key], prefix: Prefix, shapes: Shapes, out: PartPlan) -> list[Key]:
    for key in keys:
        if key.name in shapes and key.shape in (None, shapes[key.name]):
            continue  # never rewrites a key that is already right
        key.rewritten = prefix.rewrite(key.name)
        if key.rewritten is not None and key.rewritten in shapes:
            key.name = key.rewritten
    return without_collisions(keys, out)


def _by_their_modules(keys: list[Key], scope: Scope, targets: Targets, out: PartPlan) -> list[Key]:
    """Modules that load in a way of their own (old versions, parametrizations) have their say."""
    if not any(may_say(module) for module in targets.clean_modules.values()):
        return keys
    above = {""}  # a module with nothing in scope is not asked
    for name in scope.entries:
        parts = name.split(".")
        above.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    modules = {}
    for path, module in targets.clean_modules.items():
        local = path if not scope.into else "" if path == scope.into else strip(path, scope.into)
        if local in above:
            modules[local] = module
    honoured = honour(keys, modules, out.part.checkpoint.versions, scope.into)
    out.notes += honoured.notes
    out.ignored += [key.spelled for key in honoured.ignored]
    out.errors += honoured.errors
    out.excused = {scope.entries[name].name for name in honoured.excused if name in scope.entries}
    out.reshaped = {scope.entries[name].name for name in honoured.shapes if name in scope.entries}
    return without_collisions(honoured.keys, out)


def _settle(keys: list[Key], scope: Scope, targets: Targets, out: PartPlan) -> None:
    """Shapes that a conversion left open are those of the entries its outputs go to."""
    open_keys = [key for key in keys if key.shape is None and key.made is not None]
    if not open_keys:
        return
    everywhere = {target.clean: target for target in targets.entries.values()}
    wanted: dict[int, list[Shape | None]] = {}
    for key in keys:
        if key.made is not None:
            target = scope.entries.get(key.name) or everywhere.get(join(scope.into, key.name))
            shapes = wanted.setdefault(id(key.made), [None] * len(key.made.targets))
            shapes[key.output] = target.shape if target is not None and not target.lazy else None
    failed: set[int] = set()
    for key in open_keys:
        assert key.made is not None
        made = key.made
        if any(shape is None for shape in made.shapes) and id(made) not in failed:
            try:
                made.resolve(wanted[id(made)])
            except MappingError as error:
                failed.add(id(made))
                out.problem("conversion", str(error), made.sources)
                out.reported.update(made.sources)
        key.shape = made.shapes[key.output]
        if key.shape is not None:
            key.dtype = made.dtypes[key.output]


def _matched(keys: list[Key], scope: Scope, targets: Targets, out: PartPlan) -> list[Key]:
    leftover = []
    fitting = Fitting(out, targets)
    for key in keys:
        target = scope.entries.get(key.name)
        if target is None or key.shape is None:
            leftover.append(key)
            continue
        reshaped = target.lazy or target.name in out.reshaped
        adapter = out.adapters.get(target.name)
        if not target.lazy and (target.tensor.layout != torch.strided or target.tensor.is_quantized):
            what = "quantised" if target.tensor.is_quantized else "sparse"
            message = f"'{target.name}' is {what} in the model and cannot be written in place; leave it out: "
            out.problem("dtype", f'{message}exclude=["{target.clean}"]', (target.name,))
            out.assigned[target.name] = key
        elif (fitting.fits(key, target, adapter, reshaped)) if adapter else reshaped or target.shape == key.shape:
            out.assigned[target.name] = key
        else:
            out.mismatched[target.name] = Mismatch(key.sources, key.shape, target.shape)
    fitting.report()
    return leftover


def _leftovers(keys: list[Key], scope: Scope, targets: Targets, out: PartPlan) -> None:
    """Unmatched keys: ignored if they name something of the model outside the scope, else unexpected."""
    inside = {t.clean for t in scope.entries.values()}
    outside = ({t.clean for t in targets.entries.values()} | set(targets.wrapper_own.values())) - inside
    known = (
        (outside, "outside the scope"),
        (targets.transient, "non-persistent buffers, which the model computes itself"),
        (targets.extra_state, "modules' extra state, which is not weights"),
    )
    used = {source for key in out.assigned.values() if key.made for source in key.sources}
    used.update(source for mismatch in out.mismatched.values() for source in mismatch.keys)
    unexpected = dict.fromkeys(out.unexpected)
    reasons: dict[str, dict[str, None]] = {}
    for key in keys:
        spellings = [key.clean, join(scope.into, key.name)] + (
            [join(scope.into, key.rewritten)] if key.rewritten else []
        )
        reason = next((words for group, words in known if any(name in group for name in spellings)), None)
        if reason is None and key.name.rpartition(".")[2] == "_extra_state":
            reason = known[2][1]
        if reason is not None:
            reasons.setdefault(reason, {}).update(dict.fromkeys(key.sources))
        elif key.made is not None and not used.isdisjoint(key.sources):
            out.dangling.append(key)
        else:
            unexpected.update(dict.fromkeys(key.sources))
    # A key that a conversion makes several things of is used if one of them is, and unexpected before it is ignored.
    out.unexpected = [name for name in unexpected if name not in used]
    taken = used | set(unexpected)
    for reason, sources in reasons.items():
        names = [name for name in sources if name not in taken]
        taken.update(names)
        if names:
            out.ignored += names
            shown = ", ".join(printable(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
            out.notes.append(f"{len(names)} key{'s' * (len(names) > 1)} ignored ({reason}): {shown}")
