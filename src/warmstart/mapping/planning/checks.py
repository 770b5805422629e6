"""What one source's plan is checked for: casts that change the meaning, nothing assigned at all, a prefix that is wrong."""

from __future__ import annotations

import torch

from warmstart.errors import MappingError
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.hints import paste
from warmstart.mapping.model.names import KeyShapes, Shapes, infer_prefix, matches
from warmstart.mapping.model.targets import Targets
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.planning.renames import Renamer
from warmstart.mapping.pretrained import Pretrained
from warmstart.tensors import bits_lost, castable, dtype_name


def check_casts(out: PartPlan, targets: Targets) -> None:
    pretrained = out.part.pretrained
    kinds: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    narrowed: list[str] = []
    for name, key in out.assigned.items():
        source, target = key.dtype, targets.entries[name].dtype
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
        out.problem("dtype", message, tuple(names))
    if narrowed and not pretrained.allow_narrowing:
        message = (
            f"{len(narrowed)} tensors would be rounded to the model's dtype:\n"
            f"{listed((name, '') for name in narrowed)}\n"
            "  -> allow_narrowing=True, or build the model in the checkpoint's dtype"
        )
        out.problem("dtype", message, tuple(narrowed))
    elif narrowed:
        out.notes.append(f"{len(narrowed)} tensors are rounded to the model's dtype")


# The line that helps where names are another codebase's.
_INFER = "print(warmstart.suggest(model, source)), or `warmstart suggest SOURCE --model ...`, infers such rules"


def foreign(out: PartPlan, leftover: int, keys: int, entries: int) -> str:
    """The line that infers rules, where most keys and most entries have found no partner; else empty."""
    if 2 * leftover <= keys or 2 * (len(out.assigned) + len(out.mismatched)) >= entries:
        return ""
    return f"  -> if these are the same tensors by other names, rename= maps them;\n     {_INFER}"


def check_nothing(out: PartPlan, named: KeyShapes, shapes: Shapes) -> None:
    """Nothing fits at all: say what does not, and what would have."""
    if not shapes or out.assigned or any(problem.kind == "ambiguous" for problem in out.errors):
        return
    if not named:
        if out.part.pretrained.select:
            out.problem("nothing matched", f"select= leaves none of the {len(out.part.checkpoint)} keys; widen it")
        return
    if out.mismatched:
        message = (
            f"{len(out.mismatched)} names fit, but every key has another shape than its entry; is it the right file, or "
            "the right size of the model?"
        )
        out.problem("nothing matched", message)
        return
    keys = "\n".join(f"    {printable(key)}  {shape or ''}".rstrip() for key, shape in list(named.items())[:4])
    entries = "\n".join(f"    {name}  {shape}" for name, shape in list(shapes.items())[:4])
    by_hand = "  -> rename={regex: replacement} maps the first onto the second, if it is the right file at all;"
    fix = out.hint or f"{by_hand}\n     {_INFER}"
    message = (
        f"none of the {len(named)} keys fits any of the {len(shapes)} model entries in scope\n"
        f"  the checkpoint has keys such as\n{keys}\n  the model has entries such as\n{entries}\n{fix}"
    )
    out.problem("nothing matched", message)


def better_prefix(plain: KeyShapes, shapes: Shapes, pretrained: Pretrained, assigned: int) -> str:
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
