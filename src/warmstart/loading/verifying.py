"""Verifying: values, bit for bit, right after writing and again when training starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from warmstart.errors import CheckpointError, VerificationError
from warmstart.loading.masters import is_stale
from warmstart.loading.moving import Mover
from warmstart.loading.values import Digests, Values, as_planned
from warmstart.mapping.grouping import listed, printable
from warmstart.mapping.model.targets import Live
from warmstart.mapping.plan.plan import Plan, Verify, together
from warmstart.shards import local_of, shard_of
from warmstart.tensors import bits_lost, non_finite, same_bits, sample


@dataclass(frozen=True, slots=True)
class Difference:
    """One entry that does not hold its planned value, and how so."""

    name: str
    what: str


def verify_written(plan: Plan, values: Values, verify: Verify, mover: Mover) -> list[str]:
    """Compare every entry with its source, right after writing; those that `mover` compared as it went are not read again.

    Returns:
        Notes on what was met: non-finite values.

    Raises:
        VerificationError: An entry holds another value, or a cast made a finite value infinite.
    """
    if verify == "off":
        return []
    wrong: list[Difference] = []
    odd: list[str] = []
    for assignment in plan.written:
        name = assignment.target
        target = plan.targets.entries[name]
        if name in mover.compared:
            if name in mover.different:
                wrong.append(Difference(name, "was written and reads back differently"))
            if name in mover.infinite and _non_finite(local_of(target.tensor)):
                odd.append(name)
            continue
        shard = shard_of(target.tensor)
        source = values.needed(assignment, shard)
        expected = as_planned(source, assignment, shard)
        for tied in plan.targets.groups.get(target.canonical, [name]):
            if not _same(local_of(plan.targets.entries[tied].tensor), expected, verify):
                wrong.append(Difference(tied, "was written and reads back differently"))
        if verify == "full" and (expected.is_floating_point() or expected.is_complex()) and _non_finite(expected):
            odd.append(name)
            cast = assignment.adapter is None and assignment.cast is not None
            if cast and _non_finite(expected) > _non_finite(source):
                wrong.append(Difference(name, "finite values became inf in the model's dtype"))
        del source, expected  # frees the whole tensor they may be parts of before there is another one
    raise_differences(wrong, "right after writing")
    if odd:
        shown = ", ".join(map(printable, odd[:4])) + (", ..." if len(odd) > 4 else "")
        return [f"{len(odd)} loaded tensors hold non-finite values: {shown}"]
    return []


def structure(plan: Plan, model: nn.Module) -> list[Difference]:
    """The entries that are no longer part of the model, or no longer tied as they were; reads no source."""
    live = Live(model)
    out: list[Difference] = []
    for assignment in plan.assignments:
        target = plan.targets.entries[assignment.target]
        tensor = live.tensor(target)
        if tensor is None:
            out.append(Difference(assignment.target, "is no longer part of the model"))
        elif target.alias_of is not None:
            first = plan.targets.entries[target.alias_of]
            other = live.tensor(first)
            if target.tensor is first.tensor and other is not None and other is not tensor:
                out.append(Difference(assignment.target, f"is no longer tied to {target.alias_of}"))
    return out


def differences(plan: Plan, model: nn.Module, digests: Digests, verify: Verify, buffers: bool) -> list[Difference]:
    """The entries that do not hold their planned value now, in the dtype they have now, and those of `structure`.

    Raises:
        CheckpointError: A source changed or is gone, so that there is nothing to compare with.
    """
    if verify == "off":
        return []
    out = structure(plan, model)
    gone = {difference.name for difference in out}
    for part in plan.parts:
        if part.checkpoint.files and (what := part.checkpoint.changed()):  # what came from memory may train by now
            raise CheckpointError(f"{what}; the model's values cannot be compared with it any more: put the file back")
    live = Live(model)
    values = Values(plan)
    mover = Mover(copy=False, verify=verify)
    keys = {a.target: a for a in plan.assignments}
    compared: set[int] = set()
    other: set[str] = set()
    with mover:
        for assignment in together(plan.assignments):
            name = assignment.target
            target = plan.targets.entries[name]
            tensor = live.tensor(target)
            if tensor is None or name in gone or id(tensor) in compared or (not buffers and target.kind == "buffer"):
                continue
            compared.add(id(tensor))
            source = keys[assignment.alias_of] if assignment.alias_of is not None else assignment
            if source.target in digests or target.canonical in digests:
                same = digests.equal(source.target if source.target in digests else target.canonical, local_of(tensor))
            else:
                shard = shard_of(tensor)
                place = None if is_stale(tensor) else values.place(source, shard)
                if place is not None:
                    mover.add(name, shard.local, place)
                    continue
                expected = values.planned(source, shard)
                if bits_lost(expected.dtype, tensor.dtype) and not plan.parts[source.part].pretrained.allow_narrowing:
                    out.append(Difference(name, f"was cast to {tensor.dtype}, which allow_narrowing=False forbids"))
                    continue
                same = _same(shard.local, expected, verify)
            if not same:
                other.add(name)
            elif is_stale(tensor):
                out.append(
                    Difference(
                        name, "is right, but the optimizer's fp32 copy of it is not, and its next step writes that"
                    )
                )
    other |= mover.different
    return out + [Difference(a.target, "has other values") for a in plan.assignments if a.target in other]


def raise_differences(wrong: list[Difference], when: str) -> None:
    """Raise for the entries found to differ, if any.

    Raises:
        VerificationError: There are some.
    """
    if wrong:
        raise VerificationError(
            f"{len(wrong)} loaded tensors do not hold the checkpoint's values {when}\n"
            f"{listed((d.name, d.what) for d in wrong)}\n"
            "  -> something initialised, replaced or overwrote them after the load; let the load come after it, or take "
            'these entries out with exclude=. verify="off" trains without this check',
            tensors=tuple(d.name for d in wrong),
        )


def _same(tensor: Tensor, expected: Tensor, verify: Verify) -> bool:
    if tensor.shape != expected.shape:
        return False
    if verify == "sample":
        tensor, expected = sample(tensor), sample(expected)
    return same_bits(tensor, expected.to(tensor.dtype))


def _non_finite(tensor: Tensor) -> int:
    # A finite sum has finite terms; only a sum that is not asks for the count.
    if tensor.dtype.itemsize > 1 and tensor.dtype != torch.complex32 and torch.isfinite(tensor.sum()):
        return 0
    return int(non_finite(tensor).sum())
