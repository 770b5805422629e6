"""Agreement between ranks: what one of them finds is raised on all, so that none waits for it in a collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from warmstart.errors import WarmStartError


@contextlib.contextmanager
def raised_on_all() -> Iterator[None]:
    """Raise on every rank what was raised on one, with the rank in the message; a plain block without process group.

    Every rank must enter and leave the block: its end is one small collective.

    Raises:
        WarmStartError: Of the type that was raised on the first rank that failed; other kinds of error come as
            `WarmStartError` on the ranks that did not raise them.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    found: list[tuple[type[WarmStartError], str, dict[str, Any]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _portable(own) if own is not None else None)
    failed = [(rank, what) for rank, what in enumerate(found) if what is not None]
    if not failed:
        return
    if own is not None and not isinstance(own, WarmStartError):
        raise own
    kind, message, facts = failed[0][1]
    if len(failed) < len(found):
        ranks = ", ".join(str(rank) for rank, _ in failed)
        message = f"on rank {ranks} of {len(found)}: {message}"
    raised = kind(message)
    vars(raised).update(facts)
    raise raised from own


def _portable(error: Exception) -> tuple[type[WarmStartError], str, dict[str, Any]]:
    """What another process can be told of an error: no plan and no model."""
    if not isinstance(error, WarmStartError):
        return WarmStartError, f"{type(error).__name__}: {error}", {}
    return type(error), str(error), {k: v for k, v in vars(error).items() if k in ("tensors", "written")}
