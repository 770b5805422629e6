"""The keys that are considered, under the names that the rules give them."""

from __future__ import annotations

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.mapping.grouping import printable
from warmstart.mapping.hints import GUESSES, did_you_mean, report_unused
from warmstart.mapping.keys import Key
from warmstart.mapping.model.names import strip
from warmstart.mapping.model.targets import Targets
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.planning.renames import Renamer
from warmstart.mapping.pretrained import Pretrained
from warmstart.patterns import PatternSet


def clean_keys(checkpoint: Checkpoint, targets: Targets) -> list[Key]:
    """All keys, sorted, so that a plan does not depend on their order."""
    clean_key = targets.key_cleaner()
    keys = []
    for spelled in sorted(checkpoint.keys()):
        clean = clean_key(spelled)
        info = checkpoint.info(spelled)
        keys.append(Key(spelled, clean, clean, info.shape, info.dtype))
    return keys


def selected(keys: list[Key], pretrained: Pretrained, out: PartPlan) -> list[Key]:
    """The keys that `select` matches; the others are ignored."""
    select = PatternSet(pretrained.select, where="select")
    if not select:
        return keys
    kept = []
    for key in keys:
        if select.matches(key.spelled, key.clean):
            kept.append(key)
        else:
            out.ignored.append(key.spelled)
    report_unused(select, [key.clean for key in keys], "checkpoint key", out.errors)
    return kept


def renamed(keys: list[Key], pretrained: Pretrained, out: PartPlan) -> None:
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
            out.problem("unused", f"strip_prefix={prefix!r} is the leading path of no checkpoint key{why}", (prefix,))
    if not pretrained.stages:
        return
    try:
        renamer = Renamer(pretrained.stages)
        for key in keys:
            key.name = renamer(key.name)
    except MappingError as error:
        out.problem("unused", str(error))
        return
    for number, rule in enumerate(renamer.without_hit()):
        stage = f" (stage {rule.stage + 1})" if len(renamer.stages) > 1 else ""
        why = ""
        if number < GUESSES:
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
        out.problem("unused", message, (rule.rule,))


def without_collisions(keys: list[Key], out: PartPlan) -> list[Key]:
    """The first key of each name; the others are unexpected, with an error that names both."""
    kept: dict[str, Key] = {}
    for key in keys:
        other = kept.setdefault(key.name, key)
        if other is not key:
            out.problem("collision", _collision(other, key), (*other.sources, *key.sources))
            out.unexpected += key.sources
            out.reported.update(key.sources)
    return list(kept.values())


def _collision(first: Key, second: Key) -> str:
    names = f"'{printable(first.spelled)}' and '{printable(second.spelled)}'"
    if first.clean == second.clean and not first.made and not second.made:
        return (
            f"{names} are both '{printable(first.clean)}' without wrapper segments; "
            "keep one of them: select= takes keys as the file spells them"
        )
    inferred = first.name in (first.rewritten, second.rewritten)
    how = "change the prefix by hand with strip_prefix=" if inferred else "make the rule that renames them more exact"
    return f"{names} would both become '{printable(first.name)}'; {how}, or leave one out with select="
