"""`suggest`: what names, shapes and structure say, as rules that a plan confirms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.mapping.derivations import Shape
from warmstart.mapping.grouping import covering, listed, printable
from warmstart.mapping.model.names import strip
from warmstart.mapping.model.targets import Target, Targets
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.planning.part_planning import plan_part
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.suggesting.inference import Guess, Inference, Match, infer
from warmstart.mapping.suggesting.layer_rules import layer_renames
from warmstart.mapping.suggesting.reshaping import Reshaping, doubt_squares, reshapings
from warmstart.mapping.suggesting.rules import renames
from warmstart.mapping.suggesting.shifts import shifted
from warmstart.mapping.suggesting.suggestion import Coverage, Pairs, Proposal, Suggestion, Unexplained
from warmstart.mapping.suggesting.templates import index_positions
from warmstart.mapping.suggesting.values import refuted
from warmstart.mapping.suggesting.words import INDEX
from warmstart.patterns import Patterns, PatternSet

# Rules must explain next to all tensors of the smaller side (a part of a larger model), or with proposals next to all of
# both sides, or most; then rules alone at least some of the smaller.
_WHOLE = 0.95
_MOST = 0.7, 0.5
_SURE = 0.1
_INFERRED = ("strip_prefix", "match", "rename", "convert")


@dataclasses.dataclass(frozen=True, slots=True)
class _Sides:
    """Both sides under the names that rules see.

    Attributes:
        keys: Key without wrapper segments to its spelling.
        key_shapes: The same keys to their shapes.
        entries: Entry without wrapper segments, relative to `into`, to its target.
    """

    keys: dict[str, str]
    key_shapes: dict[str, Shape]
    entries: dict[str, Target]

    @property
    def entry_shapes(self) -> dict[str, Shape]:
        return {name: target.shape for name, target in self.entries.items()}


def suggest_rules(
    model: nn.Module,
    pretrained: Pretrained,
    checkpoint: Checkpoint,
    *,
    accept: Patterns = (),
    vocabulary: bool = True,
    evidence: Literal["names", "values"] = "names",
) -> Suggestion:
    """Infer the rules by which a checkpoint goes into a model. Reads no tensor, unless `evidence="values"`.

    Args:
        model: The model, on any device; it is not touched.
        pretrained: The source, with what is known of it (`checkpoint_key`, `select`, `into`, ...) and no rules yet.
        checkpoint: The source, opened.
        accept: Patterns of model entries whose proposals are to be applied as well, in their first reading.
        vocabulary: Whether the declared synonyms of known codebases are used.
        evidence: `"values"` lets a bounded sample of the checkpoint's tensors refute proposals.

    Returns:
        The suggestion; every pair that its rules make has been confirmed by a plan.

    Raises:
        MappingError: The two have too little in common; the message has the best partial explanation. Or one has more
            kinds of names than are compared, `pretrained` has rules already, or a pattern of `accept` names no proposal.
    """
    if given := [name for name in _INFERRED if name in pretrained.rules()]:
        raise MappingError(
            f"{', '.join(f'{name}=' for name in given)} is what suggest infers; leave it out, or load with it as it is"
        )
    targets = Targets.of(model)
    sides = _sides(plan_part(0, dataclasses.replace(pretrained, strip_prefix=""), checkpoint, targets, 1), targets)
    found = infer(sides.key_shapes, sides.entry_shapes, vocabulary=vocabulary)
    made = reshapings(found, _renames(found), vocabulary=vocabulary)
    doubt_squares(found, made)
    _refuse_unrelated(found, made, sides, pretrained, model)
    if evidence == "values":
        found.guesses = [g for g in found.guesses if not refuted(g, sides.keys, sides.entries, checkpoint)]
    patterns = PatternSet(accept, where="accept")
    open_guesses, open_made = _accepted(found, made, patterns, sides)
    ruled, mapping, withheld = _ruled(
        targets, pretrained, checkpoint, found, [r for r in made if r not in open_made], sides
    )
    proposed = [_guessed(guess, mapping, sides) for guess in open_guesses]
    proposed += [Proposal(_named(r, sides), (), r.why, r.doubt) for r in open_made]
    return _suggestion(ruled, mapping, [p for p in proposed if p.mapping], sides, checkpoint, model, withheld)


def _sides(plan: PartPlan, targets: Targets) -> _Sides:
    """The keys and entries that the fields of a `Pretrained` leave in."""
    part = plan.part
    into = targets.clean_paths.get(part.pretrained.into, part.pretrained.into)
    if bad := [error for error in plan.errors if error.kind in ("into", "collision")]:
        raise MappingError(bad[0].message)
    clean_key = targets.key_cleaner()
    left_out = set(plan.ignored)
    keys = {clean_key(key): key for key in sorted(part.checkpoint.keys()) if key not in left_out}
    entries = {}
    for name in part.scope:
        target = targets.entries[name]
        local = strip(target.clean, into)
        if local is not None and not target.lazy:
            entries[local] = target
    return _Sides(keys, {clean: part.checkpoint.info(key).shape for clean, key in keys.items()}, entries)


def _refuse_unrelated(
    found: Inference, made: Iterable[Reshaping], sides: _Sides, pretrained: Pretrained, model: nn.Module
) -> None:
    sure = {entry: key for match in found.sure for entry, key in match.names().items()}
    pairs = {entry: keys[0] for reshaping in made for entry, keys in reshaping.mapping.items()} | sure
    for guess in found.guesses:
        for match in guess.readings[0]:
            pairs.update(match.names())
    small, large = sorted((max(1, len(sides.keys)), max(1, len(sides.entries))))
    most = len(pairs) >= _MOST[0] * small and len(pairs) >= _MOST[1] * large
    if len(sure) >= _WHOLE * small or len(pairs) >= _WHOLE * large or (most and len(sure) >= _SURE * small):
        return
    name, label = type(model).__name__, printable(pretrained.short_label)
    lead = (
        f"{label} and {name} have too little in common to suggest rules: {len(pairs):,} of {len(sides.keys):,} keys and of "
        f"{len(sides.entries):,} entries could be paired by name and shape"
    )
    lines = [lead]
    if sure:
        lines += [f"the best partial explanation ({len(sure):,} pairs):"]
        lines += [listed(((e, "same name" if e == k else f"from {printable(k)}") for e, k in sure.items()), limit=6)]
    lines.append(
        '  -> if only a part of the model is meant, say which: into="..."; if only a part of the file is, select=["..."]; '
        "else write the rules by hand, rename={...}"
    )
    raise MappingError("\n".join(lines))


def _accepted(
    found: Inference, made: Iterable[Reshaping], accept: PatternSet, sides: _Sides
) -> tuple[list[Guess], list[Reshaping]]:
    """Moves the guesses that `accept` names to the sure pairs; returns what stays open."""

    def accepted(entries: Iterable[str]) -> bool:
        return bool(accept) and accept.matches(*(sides.entries[entry].clean for entry in entries))

    guesses = []
    for guess in found.guesses:
        if accepted(entry for match in guess.readings[0] for entry in match.names()):
            found.sure += guess.readings[0]
        else:
            guesses.append(guess)
    doubted = [reshaping for reshaping in made if reshaping.doubt and not accepted(reshaping.mapping)]
    if unused := accept.without_hit():
        raise MappingError(f"accept={unused[0].text!r} names no entry that something is proposed for; leave it out")
    return guesses, doubted


def _renames(found: Inference) -> dict[str, str]:
    """The rules of layers that numbers of no list tell apart first, which match no other name, and those of all others."""
    layers = [m for m in found.sure if m in found.layers or _is_numbered(m)]
    names = {key: entry for match in layers for entry, key in match.names().items()}
    others = [name for template in found.keys for name in template.names.values() if name not in names]
    told = set(layers)
    return layer_renames(names, others) | renames({m.key.spelled: m.entry.spelled for m in found.sure if m not in told})


def _is_numbered(match: Match) -> bool:
    """Whether a single name has other words, and numbers on both sides."""
    paths = match.key.spelled, match.entry.spelled
    return paths[0] != paths[1] and all(
        any(segment.isdecimal() for segment in path) and not index_positions(path) for path in paths
    )


def _ruled(
    targets: Targets,
    pretrained: Pretrained,
    checkpoint: Checkpoint,
    found: Inference,
    made: Sequence[Reshaping],
    sides: _Sides,
) -> tuple[Pretrained, Pairs, tuple[str, ...]]:
    """The rules of what is sure, what a plan makes of them, and the equal names they leave out because they are not."""
    wanted = _spelled(found.sure, sides)
    for reshaping in made:
        wanted.update(_named(reshaping, sides))
    conversions = [*shifted(found.sure), *(reshaping.conversion for reshaping in made)]
    prefix = "" if made else _prefix(found.sure)
    rename = {} if prefix else _renames(found)
    ruled = dataclasses.replace(pretrained, strip_prefix=prefix, rename=rename, convert=conversions)
    plan = plan_part(0, ruled, checkpoint, targets, 1)
    extra = plan.assigned.keys() - wanted.keys()
    if extra:  # equal names that are not sure: the rules leave them out
        others = [target.clean for name, target in targets.entries.items() if name not in extra]
        patterns = covering([targets.entries[name].clean for name in sorted(extra)], others)
        ruled = dataclasses.replace(ruled, exclude=[*_listed(pretrained.exclude), *patterns])
        plan = plan_part(0, ruled, checkpoint, targets, 1)
    mapping = {name: key.sources for name, key in plan.assigned.items() if key.sources == wanted.get(name)}
    if lost := [r for r in made if not mapping.keys() >= _named(r, sides).keys()]:
        return _ruled(targets, pretrained, checkpoint, found, [r for r in made if r not in lost], sides)
    return ruled, mapping, tuple(sorted(extra))


def _named(reshaping: Reshaping, sides: _Sides) -> Pairs:
    return {
        sides.entries[entry].name: tuple(sides.keys[key] for key in keys) for entry, keys in reshaping.mapping.items()
    }


def _listed(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _prefix(sure: Sequence[Match]) -> str:
    """The leading path whose removal is all there is to do; empty if it is not."""
    first = next((m for m in sure), None)
    if first is None or len(first.key.spelled) <= len(first.entry.spelled):
        return ""
    prefix = first.key.spelled[: len(first.key.spelled) - len(first.entry.spelled)]
    if any(segment.endswith(INDEX) for segment in prefix):
        return ""
    return ".".join(prefix) if all(m.key.spelled == (*prefix, *m.entry.spelled) for m in sure) else ""


def _suggestion(
    ruled: Pretrained,
    mapping: Pairs,
    proposed: Sequence[Proposal],
    sides: _Sides,
    checkpoint: Checkpoint,
    model: nn.Module,
    withheld: tuple[str, ...],
) -> Suggestion:
    explained = {**mapping, **{e: k for p in proposed for e, k in p.mapping.items()}}
    used = {key for keys in explained.values() for key in keys}
    canonical = {sides.entries[name].canonical for name in sides.entries if sides.entries[name].name in explained}
    left = Unexplained(
        tuple(key for key in sides.keys.values() if key not in used),
        tuple(t.name for t in sides.entries.values() if t.name not in explained and t.canonical not in canonical),
    )
    loaded = {key for keys in mapping.values() for key in keys}
    key_sizes = {key: math.prod(checkpoint.info(key).shape) for key in sides.keys.values()}
    entry_sizes = {t.name: t.numel for t in sides.entries.values()}
    coverage = Coverage(
        sum(key_sizes.get(key, 0) for key in loaded) / max(1, sum(key_sizes.values())),
        sum(entry_sizes.get(name, 0) for name in mapping) / max(1, sum(entry_sizes.values())),
    )
    return Suggestion(ruled, mapping, tuple(proposed), left, coverage, type(model).__name__, withheld)


def _guessed(guess: Guess, mapping: Pairs, sides: _Sides) -> Proposal:
    readings = [_spelled(reading, sides) for reading in guess.readings]
    readings = [{e: k for e, k in reading.items() if e not in mapping} for reading in readings]
    return Proposal(readings[0], tuple(readings[1:]), guess.why, guess.why_not)


def _spelled(reading: Iterable[Match], sides: _Sides) -> Pairs:
    return {sides.entries[entry].name: (sides.keys[key],) for match in reading for entry, key in match.names().items()}
