"""The verbs, a few lines each."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn
from typing_extensions import Unpack

from warmstart.checkpoints.places import is_gone
from warmstart.errors import CheckpointError, MappingError, VerificationError
from warmstart.freezing import Frozen, Held, freeze_entries, freeze_patterns, refuse_wrapped
from warmstart.lineage import lineage
from warmstart.loading.agreement import agree, failing_on_all, raised_on_all
from warmstart.loading.relaying import relayed, shared_reading
from warmstart.loading.writing import Written, write
from warmstart.mapping.model.targets import Targets
from warmstart.mapping.plan.lock import compare
from warmstart.mapping.plan.plan import Plan, Read, Verify
from warmstart.mapping.planning.planning import make_plan
from warmstart.mapping.pretrained import Pretrained, PretrainedFields, Source, as_parts
from warmstart.mapping.sources import open_source
from warmstart.mapping.suggesting.suggestion import Suggestion
from warmstart.patterns import Patterns
from warmstart.report import Report
from warmstart.version import __version__

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OTHER_MODE = {  # what can be done where only some ranks cannot read
    "local": 'or let one rank of each node read for the others, on files that one rank has: read="broadcast"',
    "broadcast": 'or let every rank read for itself: read="local"',
}

Sources = Pretrained | Sequence[Pretrained | Source] | Source


def load(
    model: nn.Module,
    pretrained: Sources,
    /,
    *,
    verify: Verify = "full",
    lock: str | os.PathLike[str] | None = None,
    read: Read = "local",
    group: ProcessGroup | None = None,
    **fields: Unpack[PretrainedFields],
) -> Report:
    """Put pretrained weights into a model: plan, preflight, write in place, verify by value, freeze.

    In a run of several processes every rank calls it: they agree before anything is written, and an error on one of them
    is raised on all.

    Args:
        model: The model; on any error before the first write it is bit-for-bit untouched.
        pretrained: A path, a state dict, a module, a `Pretrained`, or a list of them.
        verify: `"full"` compares every element after writing, `"sample"` a fixed sample, `"off"` nothing.
        lock: A lock file, as `Plan.to_yaml` gives it: a plan that came out different is refused.
        read: `"local"`: every rank reads what it holds of the model. `"broadcast"`: one rank of each node reads, and passes
            every tensor on to the others; ranks that have no file need none.
        group: The process group whose ranks must agree; None: all ranks. Give each pipeline stage its own, since their
            models differ.
        **fields: `Pretrained`'s fields, for a single bare source.

    Returns:
        The report; `print(report)` shows the verdict and a grouped table.

    Raises:
        CheckpointError: The source cannot be read, or is not the same on all ranks.
        MappingError: Something is not accounted for; the message lists everything, each with the line to type.
        VerificationError: The model does not hold what was written.
        TimingError: The model is wrapped already, or changed since it was planned; or a rank did not come within
            `WARMSTART_TIMEOUT` seconds (600, or half of the group's own timeout).

    Example:
        >>> report = warmstart.load(model, "bert.safetensors", into="encoder", freeze=True)
        >>> print(report.verdict())
    """
    _model_first(model)
    with failing_on_all("load", group, OTHER_MODE.get(read, "")):
        made = plan_together(model, as_parts(pretrained, fields), lock=lock, read=read, group=group)
        return apply(made, verify=verify, read=read, group=group, shared=True)


def plan(
    model: nn.Module,
    pretrained: Sources,
    /,
    *,
    lock: str | os.PathLike[str] | None = None,
    **fields: Unpack[PretrainedFields],
) -> Plan[Report]:
    """Decide what goes where, from names, shapes and dtypes alone; no tensor is read and the model is untouched.

    A plan with errors is returned all the same, to be looked at; `Plan.apply()` raises them.

    Raises:
        CheckpointError: The source cannot be opened.
        MappingError: The model has entries of which this process holds a shard only; or `lock` is no lock file.
    """
    _model_first(model)
    return plan_together(model, as_parts(pretrained, fields), lock=lock)


def plan_together(
    model: nn.Module,
    parts: Sequence[Pretrained],
    *,
    lock: str | os.PathLike[str] | None = None,
    read: Read = "local",
    group: ProcessGroup | None = None,
) -> Plan[Report]:
    """`plan`, of checkpoints that with `read="broadcast"` one rank of each node opens and all ranks ask for."""
    openers = [functools.partial(open_source, part) for part in parts]
    if read == "broadcast":
        checkpoints = relayed(openers, any(is_gone(part.source) for part in parts), group)
    else:
        checkpoints = [opener() for opener in openers]
    made = make_plan(model, list(zip(parts, checkpoints, strict=True)), apply, _page)
    if lock is not None and (changed := compare(made, lock)):
        made = dataclasses.replace(made, errors=(*made.errors, *changed))
    return made


def _model_first(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model comes first and the source second: load(model, source), not a {type(model).__name__} first"
        )


def suggest(
    model: nn.Module,
    source: Source | Pretrained,
    /,
    *,
    accept: Patterns = (),
    vocabulary: bool = True,
    evidence: Literal["names", "values"] = "names",
    **fields: Unpack[PretrainedFields],
) -> Suggestion:
    """Infer the rules by which a checkpoint goes into a model, from names, shapes and tree structure alone.

    Args:
        model: The model; it is not touched, and may be on the meta device.
        source: The checkpoint, or a `Pretrained` without rules (`checkpoint_key`, `select`, `into`, ... are respected).
        accept: Patterns of model entries whose proposals are applied as well, in their first reading.
        vocabulary: Whether the declared synonyms of known codebases are used.
        evidence: `"values"` lets a bounded sample of the checkpoint's tensors refute proposals; `"names"` reads no tensor.
        **fields: `Pretrained`'s fields but its rules, for a bare source.

    Returns:
        What is sure (`.pretrained`, ready for `load`), what is proposed, and what is unexplained.

    Raises:
        CheckpointError: The source cannot be opened.
        MappingError: Both have too little in common; the message has the best partial explanation.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        raise TypeError("suggest takes one source; ask for each of several alone, with into= or select=")
    from warmstart.mapping.suggesting.suggesting import suggest_rules  # much code that a load does not need

    (pretrained,) = as_parts(source, fields)
    return suggest_rules(
        model, pretrained, open_source(pretrained), accept=accept, vocabulary=vocabulary, evidence=evidence
    )


def apply(
    plan: Plan[Report],
    *,
    verify: Verify = "full",
    held: Held = "eval",
    read: Read = "local",
    group: ProcessGroup | None = None,
    shared: bool = False,
) -> Report:
    """Carry a plan out; `Plan.apply` with the choice of how frozen modules are held, for the hosts.

    With `shared` the plan is one of `plan_together`: the ranks have settled already which of them read.
    """
    written: Written | None = None
    try:
        with raised_on_all("load", group, OTHER_MODE["broadcast"] if read == "broadcast" else ""):
            if verify not in ("full", "sample", "off"):
                raise MappingError(f"verify={verify!r}: one of 'full', 'sample', 'off'")
            if read not in ("local", "broadcast"):
                raise MappingError(f"read={read!r}: 'local' or 'broadcast'")
            plan.raise_errors()
            agree(plan, group, verify=verify, held=held, read=read)
            plan = plan if read == "local" or shared else shared_reading(plan, group)
            written = write(plan, verify, group)
            rows, entries = plan.held_rows, plan.targets
            frozen = freeze_entries(plan.model, plan.freeze, entries, held, rows=rows) if plan.freeze or rows else None
    except (CheckpointError, VerificationError) as error:
        written = error.report or written
        if written is not None:  # writing had begun
            error.report = Report(plan, written, lineage(plan, __version__), None)
            error.report.status = "failed"
        raise
    return Report(plan, written, lineage(plan, __version__), frozen)


def _page(path: str | os.PathLike[str], plan: Plan[Report]) -> Path:
    from warmstart.rendering.page import write_page

    return write_page(path, plan)


def freeze(model: nn.Module, patterns_or_report: Patterns | Report) -> Frozen:
    """Freeze parameters and buffers so that they stay bit-for-bit what they are.

    Call it before the optimizer is made and before the model is wrapped. Modules that are frozen as a whole are held in
    eval mode, whatever `.train()` is called.

    Args:
        model: The model that the patterns name entries of.
        patterns_or_report: Patterns, or a report: then exactly what it loaded.

    Raises:
        MappingError: A pattern matches nothing.
        TimingError: The model is wrapped in DistributedDataParallel already.
    """
    targets = Targets.of(model)
    refuse_wrapped(targets)
    if isinstance(patterns_or_report, Report):
        plan = patterns_or_report.plan
        names = [a.target for a in plan.assignments]
        if lost := [name for name in names if name not in targets.entries]:
            raise MappingError(
                f"'{lost[0]}' (one of {len(lost)}) was loaded and is no entry of this model; freeze by pattern"
            )
        return freeze_entries(model, names, targets)
    return freeze_patterns(model, patterns_or_report)
