"""Verifying: values, bit for bit, right after writing and again when training starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from warmstart.errors import VerificationError
from warmstart.loading.values import Digests, Values, as_planned, live_tensor, written
from warmstart.mapping.grouping import listed
from warmstart.mapping.plan import Plan, Verify
from warmstart.tensors import bits_lost, same_bits, sample


@dataclass(frozen=True, slots=True)
class Difference:
    """One entry that does not hold its planned value, and how so."""

    name: str
    what: str


def verify_written(plan: Plan, values: Values, verify: Verify) -> list[str]:
    """Compare every entry with its source, right after writing.

    Returns:
        Notes on what was met: non-finite values.

    Raises:
        VerificationError: An entry holds another value, or a cast made a finite value infinite.
    """
    if verify == "off":
        return []
    wrong: list[Difference] = []
    odd: list[str] = []
    for assignment in written(plan):
        source = values.source(assignment)
        expected = as_planned(source, assignment)
        if not _same(plan.targets.entries[assignment.target].tensor, expected, verify):
            wrong.append(Difference(assignment.target, "was written and reads back differently"))
        if verify == "full" and (expected.is_floating_point() or expected.is_complex()) and _non_finite(expected):
            odd.append(assignment.target)
            if assignment.cast is not None and _non_finite(expected) > _non_finite(source):
                wrong.append(Difference(assignment.target, "finite values became inf in the model's dtype"))
    raise_differences(wrong, "right after writing")
    if odd:
        shown = ", ".join(odd[:4]) + (", ..." if len(odd) > 4 else "")
        return [f"{len(odd)} loaded tensors hold non-finite values: {shown}"]
    return []


def differences(plan: Plan, model: nn.Module, digests: Digests, verify: Verify, buffers: bool) -> list[Difference]:
    """The entries that do not hold their planned value now, in the dtype they have now.

    Entries are found by the module that owns them, not by name: surgery that keeps the modules is healthy, a replaced
    submodule is not. Ties that were there when the plan was made are checked as well.

    Raises:
        CheckpointError: A source cannot be read any more.
    """
    if verify == "off":
        return []
    alive = {id(module) for module in model.modules()}
    out: list[Difference] = []
    for assignment in plan.assignments:
        target = plan.targets.entries[assignment.target]
        tensor = live_tensor(target) if id(target.owner) in alive else None
        if tensor is None:
            out.append(Difference(assignment.target, "is no longer part of the model"))
            continue
        if target.alias_of is not None:
            first = plan.targets.entries[target.alias_of]
            if id(first.owner) in alive and target.tensor is first.tensor and live_tensor(first) is not tensor:
                out.append(Difference(assignment.target, f"is no longer tied to {target.alias_of}"))
    planned = {a.target: a for a in written(plan)}
    gone = {difference.name for difference in out}
    for part in plan.parts:
        if part.checkpoint.files and (what := part.checkpoint.changed()):
            out.append(Difference(part.checkpoint.location, f"cannot be compared with: {what}"))
    if any(difference.name not in gone for difference in out):
        return out
    for name, assignment in planned.items():
        if name in gone or (not buffers and plan.targets.entries[name].kind == "buffer"):
            continue
        tensor = live_tensor(plan.targets.entries[name])
        assert tensor is not None
        if name in digests:
            same = digests.equal(name, tensor)
        else:
            part = plan.parts[assignment.part]
            expected = as_planned(part.checkpoint.read(assignment.sources[0]), assignment)
            if bits_lost(expected.dtype, tensor.dtype) and not part.pretrained.allow_narrowing:
                out.append(Difference(name, f"was cast to {tensor.dtype}, which allow_narrowing=False forbids"))
                continue
            same = _same(tensor, expected, verify)
        if not same:
            out.append(Difference(name, "has other values"))
    return out


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
    if torch.isfinite(tensor.sum()):
        return 0
    return int((~torch.isfinite(tensor)).sum())
