"""The source that rules name, opened."""

from __future__ import annotations

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.mapping.pretrained import Pretrained


def open_source(part: Pretrained, checkpoint_key: str | None = None) -> Checkpoint:
    """The source of these rules, or another tree of it.

    Raises:
        CheckpointError: It cannot be opened.
    """
    return open_checkpoint(
        part.source,
        checkpoint_key=part.checkpoint_key if checkpoint_key is None else checkpoint_key,
        revision=part.revision,
        subfolder=part.subfolder,
        trust_pickle=part.trust_pickle,
    )
