"""Preflight: read only what can still refuse, before the first write."""

from __future__ import annotations

import torch

from warmstart.errors import CheckpointError, MappingError, TimingError
from warmstart.loading.values import Values, as_planned, duplicates, live_tensor, written
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.plan import Plan
from warmstart.tensors import dtype_name, range_lost, same_bits


def preflight(plan: Plan, values: Values) -> None:
    """Refuse what can be refused before anything is written; the model is untouched.

    Raises:
        CheckpointError: A file changed since it was planned, or has another SHA-256 than was asked for.
        MappingError: Values do not survive their cast, or a tied tensor would get two values.
        TimingError: The model changed since it was planned, or is wrapped already and is to be frozen.
    """
    _unchanged(plan)
    _right_file(plan)
    problems = [*_lost(plan, values), *_two_values(plan, values)]
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        head = f"the plan for {plan.model_name} cannot be carried out: {count}, nothing was written"
        raise MappingError("\n\n".join([head, *problems]), plan=plan)


def _unchanged(plan: Plan) -> None:
    for part in plan.parts:
        if what := part.checkpoint.changed():
            raise CheckpointError(f"{what}; plan again, with the file at rest")
    for assignment in plan.assignments:
        target = plan.targets.entries[assignment.target]
        tensor = live_tensor(target)
        if tensor is None or tensor is not target.tensor or tuple(tensor.shape) != assignment.shape:
            raise TimingError(
                f"'{assignment.target}' is not the tensor that was planned for; call warmstart.plan(model, ...) again "
                "after the model was changed"
            )
        if tensor.is_inference():
            raise TimingError(
                f"'{assignment.target}' was made under torch.inference_mode() and cannot be written to; build the model "
                "outside of it"
            )
    if plan.freeze and "DistributedDataParallel" in plan.targets.wrapped:
        raise TimingError(
            "the model is wrapped in DistributedDataParallel, whose reducer would wait for the frozen parameters; load "
            "and freeze first, then wrap: warmstart.load(model, ..., freeze=...); model = DistributedDataParallel(model)"
        )


def _right_file(plan: Plan) -> None:
    for part in plan.parts:
        wanted = part.pretrained.sha256
        if wanted is not None and (found := part.checkpoint.sha256()) != wanted.lower():
            raise CheckpointError(
                f"{part.checkpoint.location}: its SHA-256 is {found}, not the {wanted.lower()} asked for; get the right "
                f'file, or write sha256="{found}" if this is the one you mean'
            )


def _lost(plan: Plan, values: Values) -> list[str]:
    lost: list[tuple[str, str]] = []
    for assignment in written(plan):
        if assignment.cast is None or not range_lost(*assignment.cast):
            continue
        source = values.source(assignment)
        cast = as_planned(source, assignment)
        if cast.is_floating_point() or cast.is_complex():
            count = int((torch.isfinite(source) & ~torch.isfinite(cast)).sum())
            what = f"{count} finite values become inf"
        else:
            count = int((cast.to(torch.int64) != source.to(torch.int64)).sum())
            what = f"{count} values do not fit"
        if count:
            a, b = map(dtype_name, assignment.cast)
            lost.append((assignment.target, f"{a} to {b}: {what}"))
    if not lost:
        return []
    message = f"dtype: {len(lost)} tensors hold values that the model's dtype cannot\n{listed(lost)}\n"
    return [message + '  -> build the model in a wider dtype, or take the checkpoint\'s: dtype="checkpoint"']


def _two_values(plan: Plan, values: Values) -> list[str]:
    out = []
    for first, second in duplicates(plan):
        if not same_bits(as_planned(values.source(first), first), as_planned(values.source(second), second)):
            a, b = printable(first.sources[0]), printable(second.sources[0])
            out.append(
                f"collision: '{first.target}' and '{second.target}' are one tied tensor, but the checkpoint's '{a}' and "
                f"'{b}' differ\n"
                f"  -> choose one: exclude=[\"{second.target}\"] keeps '{a}', exclude=[\"{first.target}\"] keeps '{b}'; or "
                "build the model untied"
            )
    return out
