"""Opening what a command is given."""

from __future__ import annotations

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.mapping.pretrained import Pretrained


def opened(pretrained: Pretrained) -> Checkpoint:
    """The source of these rules.

    Raises:
        CheckpointError: It cannot be read, or has another SHA-256 than was asked for.
    """
    checkpoint = open_checkpoint(
        pretrained.source,
        checkpoint_key=pretrained.checkpoint_key,
        revision=pretrained.revision,
        subfolder=pretrained.subfolder,
        trust_pickle=pretrained.trust_pickle,
    )
    wanted = pretrained.sha256
    if wanted is not None and (found := checkpoint.sha256()) != wanted.lower():
        raise CheckpointError(
            f"{checkpoint.location}: its SHA-256 is {found}, not the {wanted.lower()} asked for; get the right file"
        )
    return checkpoint
