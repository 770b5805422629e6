"""Opening what a command is given."""

from __future__ import annotations

import re

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import CheckpointError
from warmstart.mapping.pretrained import Pretrained
from warmstart.mapping.sources import open_source

# A source of several trees is refused with the choices, each on a line of its own.
_CHOICE = re.compile(r'^  checkpoint_key="(.*)"', re.MULTILINE)


def opened(pretrained: Pretrained, checkpoint_key: str | None = None) -> Checkpoint:
    """The source of these rules.

    Raises:
        CheckpointError: It cannot be read, or has another SHA-256 than was asked for.
    """
    checkpoint = open_source(pretrained, checkpoint_key)
    checkpoint.check_sha256(pretrained.sha256)
    return checkpoint


def opened_whole(pretrained: Pretrained) -> tuple[Checkpoint, list[Checkpoint]]:
    """The tree that is asked for, or the only one; of several, all of them as one, and each by itself.

    Raises:
        CheckpointError: As `opened`, but not for want of a choice.
    """
    try:
        return opened(pretrained), []
    except CheckpointError as error:
        keys = [key.replace('\\"', '"') for key in _CHOICE.findall(str(error))]
        if pretrained.checkpoint_key is not None or not keys:
            raise
    return opened(pretrained, ""), [opened(pretrained, key) for key in keys if key]
