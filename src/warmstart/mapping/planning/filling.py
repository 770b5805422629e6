"""Constants for entries that no key gives a value (`fill`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from warmstart.mapping.grouping import printable
from warmstart.mapping.hints import report_unused
from warmstart.mapping.model.targets import Target, Targets
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.pretrained import Pretrained
from warmstart.patterns import PatternSet


def fill(pretrained: Pretrained, scope: Sequence[Target], targets: Targets, out: PartPlan) -> None:
    """Give the entries that `fill` names their constants; an entry that a key gives a value too is an error."""
    if not pretrained.fill:
        return
    inside = {target.name for target in scope}
    given = {targets.entries[name].canonical: key.spelled for name, key in out.assigned.items()}
    given |= {
        targets.entries[name].canonical: mismatch.keys[0] for name, mismatch in out.mismatched.items() if mismatch.keys
    }
    texts = list(pretrained.fill)
    patterns = PatternSet(texts, where="fill")
    hits: list[list[str]] = [[] for _ in texts]
    for name in targets.entries:
        for number in patterns.which(*targets.spellings(name)):
            hits[number].append(name)
    report_unused(patterns, [target.clean for target in targets.entries.values()], "model entry", out.errors)
    for text, names in zip(texts, hits, strict=True):
        value = pretrained.fill[text]
        if names and inside.isdisjoint(names):
            message = (
                f"fill={text!r} names only entries out of the scope, such as '{names[0]}'; widen into= or include="
            )
            out.problem("fill", message, tuple(names))
        for name in filter(inside.__contains__, names):
            target = targets.entries[name]
            if (key := given.get(target.canonical)) is not None:
                message = (
                    f"fill={text!r} gives '{name}' a constant, and the checkpoint's '{printable(key)}' a value; make the "
                    "pattern more exact, or leave the key out with select="
                )
                out.problem("fill", message, (name,))
            elif repr(out.filled.setdefault(name, value)) != repr(value):  # a NaN is the same NaN
                message = f"'{name}' is given {out.filled[name]:g} and {value:g} by two patterns of fill="
                out.problem("fill", f"{message}; make one of them more exact", (name,))
            elif why := unfillable(target, value):
                out.problem("fill", f"fill={text!r}: '{name}' {why}", (name,))


def unfillable(target: Target, value: float) -> str:
    """Why an entry cannot hold a number, in words; empty if it can."""
    if target.lazy:
        return "is lazy and has no shape yet; run one forward pass on a dummy batch first"
    if not (target.dtype.is_floating_point or target.dtype.is_complex):
        if value != value or value in (float("inf"), float("-inf")) or value != int(value):
            return f"has integers, which {value:g} is not"
        least, most = (
            (0, 1) if target.dtype == torch.bool else (torch.iinfo(target.dtype).min, torch.iinfo(target.dtype).max)
        )
        return "" if least <= value <= most else f"cannot hold {value:g} in {target.dtype}"
    finite = value == value and abs(value) != float("inf")
    return f"cannot hold {value:g} in {target.dtype}" if finite and abs(value) > torch.finfo(target.dtype).max else ""
