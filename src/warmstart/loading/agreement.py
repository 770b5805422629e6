"""Agreement between ranks: they do the same with the same, and what one of them finds is raised on all."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from warmstart.errors import CheckpointError, MappingError, WarmStartError
from warmstart.loading.fingerprint import SECTIONS, details, fingerprint
from warmstart.loading.meeting import Ranks, is_shared
from warmstart.mapping.grouping import listed
from warmstart.mapping.plan.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextlib.contextmanager
def raised_on_all(step: str = "warm start", group: ProcessGroup | None = None, hint: str = "") -> Iterator[None]:
    """Raise on every rank what was raised on one, with the rank in the message; a plain block without process group.

    Every rank must enter and leave the block: its end is a meeting. A meeting inside it, or another such block, may be
    where the others learn of an error: then nothing is exchanged twice.

    Raises:
        WarmStartError: Of the type that was raised on the first rank that failed; other kinds of error come as
            `WarmStartError`, unless all ranks raised the same.
        TimingError: A rank did not come.
    """
    with failing_on_all(step, group, hint):
        yield
    all_here(step, group)


@contextlib.contextmanager
def failing_on_all(step: str, group: ProcessGroup | None = None, hint: str = "") -> Iterator[None]:
    """As `raised_on_all`, but without a meeting at the end: the block has one in it that an error here takes the place of."""
    ranks = Ranks.of(group)
    if ranks is None:
        yield
        return
    try:
        with ranks.at_work():
            yield
    except Exception as error:
        if is_shared(error):
            raise
        ranks.meet(step, own=error, hint=hint)
        raise  # not reached: a meeting with an error raises


def all_here(step: str, group: ProcessGroup | None = None) -> None:
    """Wait for every rank, before anything that would hang without one of them.

    Raises:
        TimingError: A rank did not come.
    """
    ranks = Ranks.of(group)
    if ranks is not None:
        ranks.meet(step)


def agree(plan: Plan, group: ProcessGroup | None, **call: str) -> None:
    """Make sure that all ranks have the same plan, model and checkpoint before anything is written.

    They exchange one digest; only where it differs, two of them also say what they have.

    Args:
        plan: This rank's plan.
        group: The ranks that must agree.
        **call: What else must be the same on all of them.

    Raises:
        MappingError: Models, plans or arguments differ; the message says where, and on which ranks.
        CheckpointError: The checkpoints differ, in their headers or in their sampled bytes.
    """
    ranks = Ranks.of(group)
    if ranks is None:
        return
    found = ranks.meet("load", fingerprint(plan, call), _compared)
    if found is None:
        return
    section, usual, odd = found["section"], found["usual"], found["odd"]
    asked = ranks.index in (usual[0], odd[0])
    said = details(plan, call, section) if asked else None

    def refuse(words: list[Any]) -> None:
        raise _disagreement(section, words[usual[0]], words[odd[0]], ranks.named(usual), ranks.named(odd))

    ranks.meet("load", said, refuse)


def raised_unless_alike(
    error: CheckpointError | None, step: str, group: ProcessGroup | None = None, hint: str = ""
) -> None:
    """Raise on all ranks an error that some ranks have and others have not; what all have is left to the caller.

    Args:
        error: What this rank has.
        step: What the ranks are about to do.
        group: The ranks.
        hint: What else can be done about a checkpoint that only some ranks cannot read.

    Raises:
        CheckpointError: Some have it.
    """
    ranks = Ranks.of(group)
    if ranks is None:
        return

    def refuse(words: list[str | None]) -> None:
        found = {i: word for i, word in enumerate(words) if word is not None}
        if found and len(found) < len(words):
            fix = f"\n  -> {hint}" if hint else ""
            raise CheckpointError(f"on {ranks.named(list(found))} of {len(words)}: {next(iter(found.values()))}{fix}")

    ranks.meet(step, None if error is None else str(error), refuse)


def _compared(words: list[dict[str, str]]) -> dict[str, Any] | None:
    """The first section that differs, the ranks that have what most have (or the first has), and those that do not."""
    for section in SECTIONS:
        values = {place: word[section] for place, word in enumerate(words) if section in word}
        (usual, _), *others = Counter(values.values()).most_common()
        if others:
            return {
                "section": section,
                "usual": [i for i, value in values.items() if value == usual],
                "odd": [i for i, value in values.items() if value != usual],
            }
    return None


def _disagreement(section: str, ours: dict[str, str], theirs: dict[str, str], these: str, those: str) -> WarmStartError:
    head, fix, kind = _WORDS[section]
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    values = [(name, "" if section == "bytes" else f"{ours.get(name)} | {theirs.get(name)}") for name in names]
    rows = listed(values) if values else "    the order of the entries"
    return kind(f"nothing was written: {head.format(these=these, those=those)}\n{rows}\n  -> {fix}")


_SAME_FILE = "give every rank the same file: copy it anew to the node of those that differ"
_WORDS: dict[str, tuple[str, str, type[WarmStartError]]] = {
    "call": (
        "{these} and {those} called with other arguments",
        "call with the same arguments on every rank",
        MappingError,
    ),
    "header": ("{these} and {those} opened other checkpoints", _SAME_FILE, CheckpointError),
    "model": (
        "{these} and {those} have other models",
        "build the same model on every rank, or give each pipeline stage its own process group: load(..., group=stage)",
        MappingError,
    ),
    "plan": ("{these} and {those} planned otherwise", "give every rank the same rules", MappingError),
    "bytes": (
        "{these} and {those} read other values under the same names, so a copy is stale",
        _SAME_FILE,
        CheckpointError,
    ),
}
