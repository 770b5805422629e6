"""Preflight: read only what can still refuse, before the first write."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from warmstart.errors import CheckpointError, MappingError, TimingError
from warmstart.freezing import refuse_wrapped
from warmstart.loading.masters import has_master
from warmstart.loading.materialising import Unborn, uninitialisable
from warmstart.loading.values import Values, as_planned, duplicates, loaded_here, span
from warmstart.mapping.buckets import Assignment
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.model.targets import Live
from warmstart.mapping.plan.plan import Plan
from warmstart.shards import Shard, full_shape, is_partition, is_sharded, local_of, shard_of
from warmstart.tensors import dtype_name, non_finite, range_lost, same_bits


def preflight(plan: Plan, values: Values, unborn: Unborn) -> None:
    """Refuse what can be refused before anything is written; the model is untouched.

    Raises:
        CheckpointError: A file changed since it was planned, or has another SHA-256 than was asked for.
        MappingError: Values do not survive their cast, or a tied tensor would get two values.
        TimingError: The model changed since it was planned, or is wrapped already and is to be frozen.
    """
    _unchanged(plan)
    for part in plan.parts:
        if part.checkpoint.at_hand is not None:
            part.checkpoint.at_hand.check_sha256(part.pretrained.sha256)
    problems = [*uninitialisable(plan, unborn), *_entangled(plan), *_unlike_shards(plan)]
    problems += _value_dependent(plan, values) or [*_lost(plan, values), *_two_values(plan, values)]
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        head = f"the plan for {plan.model_name} cannot be carried out: {count}, nothing was written"
        raise MappingError("\n\n".join([head, *problems]), plan=plan)


def _unchanged(plan: Plan) -> None:
    for part in plan.parts:
        if what := part.checkpoint.changed():
            raise CheckpointError(f"{what}; plan again, with the file at rest")
    live = Live(plan.model)
    for assignment in plan.assignments:
        target = plan.targets.entries[assignment.target]
        tensor = live.tensor(target)
        if (
            tensor is None
            or tensor is not target.tensor
            or (not assignment.reshapes and full_shape(tensor) != assignment.shape)
        ):
            raise TimingError(
                f"'{assignment.target}' is not the tensor that was planned for; call warmstart.plan(model, ...) again "
                "after the model was changed"
            )
        if has_master(tensor):
            raise TimingError(
                f"'{assignment.target}' is in a DeepSpeed optimizer, whose own copy would overwrite what is loaded at its "
                "first step; load before deepspeed.initialize(model=...)"
            )
        if not target.lazy and tensor.is_inference():
            raise TimingError(
                f"'{assignment.target}' was made under torch.inference_mode() and cannot be written to; build the model "
                "outside of it"
            )
    if plan.freeze:
        refuse_wrapped(plan.targets)


def _entangled(plan: Plan) -> list[str]:
    """Entries that share some of their memory, but not all: writing one would change the other."""
    written = {a.target: local_of(plan.targets.entries[a.target].tensor) for a in plan.written}
    if _apart(written.values()):
        return []
    storages: dict[int, dict[str, Tensor]] = {}
    for name, tensor in written.items():
        if span(tensor)[1]:
            storages.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
    shared: list[tuple[str, str]] = []
    for tensors in storages.values():
        if _apart(tensors.values()):
            continue
        # Spans that meet may still interleave, as columns of one matrix do: mark every byte.
        taken = torch.zeros(next(iter(tensors.values())).untyped_storage().nbytes(), dtype=torch.bool)
        for name, tensor in tensors.items():
            size = tensor.element_size()
            shape = [1 if step == 0 else n for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
            stride = [step * size for step in tensor.stride()]
            mine = torch.as_strided(taken, (*shape, size), (*stride, 1), tensor.storage_offset() * size)
            if bool(mine.any()):
                shared.append((name, "shares memory with an entry before it"))
            mine.fill_(True)
    if not shared:
        return []
    message = f"memory: {len(shared)} entries overlap others without being tied to them\n{listed(shared)}\n"
    return [f'{message}  -> give them memory of their own, or leave them out: exclude=["{printable(shared[0][0])}"]']


def _apart(tensors: Iterable[Tensor]) -> bool:
    spans = sorted(each for each in map(span, tensors) if each[1])
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def _unlike_shards(plan: Plan) -> list[str]:
    """Sharded entries that would change their dtype or shape, or be held in part, which their engine does not allow."""
    unlike = []
    for assignment in plan.written:
        target = plan.targets.entries[assignment.target]
        if is_sharded(target.tensor) and (assignment.dtype != target.dtype or assignment.shape != target.shape):
            has, gets = (
                (dtype_name(d), s) for d, s in ((target.dtype, target.shape), (assignment.dtype, assignment.shape))
            )
            unlike.append((assignment.target, f"{has[0]} {has[1]} would become {gets[0]} {gets[1]}"))
    for name in plan.held_rows:
        if is_partition(plan.targets.entries[name].tensor):
            unlike.append(
                (name, "freeze_old=True cannot hold rows of a ZeRO-3 parameter, whose optimizer has a copy of it")
            )
    if not unlike:
        return []
    message = f"shards: {len(unlike)} sharded entries cannot be what is asked for\n{listed(unlike)}\n"
    return [f"{message}  -> build the model that way before it is sharded, or load before that"]


def _lost(plan: Plan, values: Values) -> list[str]:
    lost: list[tuple[str, str]] = []
    for assignment in plan.written:
        if assignment.adapter is not None and assignment.adapter.computes(assignment.source_shape, assignment.shape):
            lost += _overflown(plan, values, assignment)
        if assignment.cast is None or not range_lost(*assignment.cast):
            continue
        source = values.needed(assignment, _current(plan, assignment))
        cast = source.to(assignment.dtype)
        if cast.is_floating_point() or cast.is_complex():
            # Some types overflow to inf or NaN, others to their largest value.
            limit = torch.finfo(cast.dtype).max * (1 + torch.finfo(cast.dtype).eps)
            beyond = non_finite(cast) | (
                source.to(torch.complex128 if source.is_complex() else torch.float64).abs() > limit
            )
            count = int((beyond & ~non_finite(source)).sum())
            what = f"{count} values are beyond its range"
        else:
            # Seen as int64 both have the same bits where only the sign changed its meaning.
            wrapped = (source.to(torch.int64) < 0) & ((source.dtype == torch.uint64) != (cast.dtype == torch.uint64))
            count = int(((cast.to(torch.int64) != source.to(torch.int64)) | wrapped).sum())
            what = f"{count} values do not fit"
        if count:
            a, b = map(dtype_name, assignment.cast)
            lost.append((assignment.target, f"{a} to {b}: {what}"))
    if not lost:
        return []
    message = f"dtype: {len(lost)} tensors hold values that the model's dtype cannot\n{listed(lost)}\n"
    return [message + '  -> build the model in a wider dtype, or take the checkpoint\'s: dtype="checkpoint"']


def _overflown(plan: Plan, values: Values, assignment: Assignment) -> list[tuple[str, str]]:
    """What an adapter computes of finite values (the sum of channels, say) may be beyond the range of the entry's dtype."""
    source = values.source(assignment)
    if not source.is_floating_point() or not assignment.dtype.is_floating_point:
        return []
    finite = source.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    current = _current(plan, assignment)
    made, mask = non_finite(as_planned(finite, assignment, current)), loaded_here(assignment, current)
    count = int((made if mask is None else made & mask).sum())
    name = type(assignment.adapter).__name__
    return [(assignment.target, f"{name} makes {count} values beyond {dtype_name(assignment.dtype)}")] if count else []


def _current(plan: Plan, assignment: Assignment) -> Shard:
    """What the entry holds; of one that has no memory yet, something of its shape."""
    tensor = plan.targets.entries[assignment.target].tensor
    if is_lazy(tensor):
        return shard_of(torch.zeros(assignment.shape, dtype=assignment.dtype))
    shard = shard_of(tensor)
    return shard._replace(local=torch.zeros(shard.local.shape, dtype=assignment.dtype)) if tensor.is_meta else shard


def _value_dependent(plan: Plan, values: Values) -> list[str]:
    """Functions and parametrizations that can refuse values are tried on them."""
    refused: dict[int, str] = {}
    for assignment in plan.written:
        made = assignment.conversion
        if made is not None and made.may_refuse and id(made) not in refused:
            refused[id(made)] = ""
            try:
                values.source(assignment)
            except MappingError as error:
                refused[id(made)] = f"conversion: {error}"
    return [message for message in refused.values() if message]


def _two_values(plan: Plan, values: Values) -> list[str]:
    out = []
    for first, second in duplicates(plan):
        current = _current(plan, first)
        if not same_bits(values.planned(first, current), values.planned(second, current)):
            a, b = (", ".join(map(printable, each.sources[:4])) or f"constant {each.fill}" for each in (first, second))
            out.append(
                f"collision: '{first.target}' and '{second.target}' are one tied tensor, but the checkpoint's '{a}' and "
                f"'{b}' differ\n"
                f"  -> choose one: exclude=[\"{second.target}\"] keeps '{a}', exclude=[\"{first.target}\"] keeps '{b}'; or "
                "build the model untied"
            )
    return out
