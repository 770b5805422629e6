"""Full unpickling, only ever reached through `trust_pickle=True`: the file's code runs."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import torch
from torch import nn

from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import LeafCheckpoint
from warmstart.checkpoints.memory import open_memory
from warmstart.errors import CheckpointError

NOTE = "opened with trust_pickle=True: whatever code the file's pickle names was run"


def load_trusted(file: MappedFile, format: str, checkpoint_key: str | None) -> LeafCheckpoint:
    """Load a file the way torch, numpy or pickle does, running what it says.

    Raises:
        CheckpointError: Loading raised anything, or what was loaded holds no single tree of weights.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = _load(file, format)
    # The file's own code may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{file.path}: loading it with trust_pickle=True failed ({type(error).__name__}: {error}); "
            "leave trust_pickle out to read only its tensors"
        ) from error
    if not isinstance(content, (dict, nn.Module)):
        content = {file.path.stem: content}
    held = open_memory(
        content,
        checkpoint_key=checkpoint_key,
        location=str(file.path),
        format=format,
        files=[file.stamp],
        notes=[NOTE],
    )
    held.callbacks = content.get("callbacks") if isinstance(content, dict) else None
    return held


def _load(file: MappedFile, format: str) -> object:
    if format == "numpy npy":
        content = np.load(file.path, allow_pickle=True)
        return content.item() if content.shape == () else content
    if format == "pickle":
        with file.path.open("rb") as stream:
            return pickle.load(stream)
    return torch.load(file.path, map_location="cpu", weights_only=False, mmap=True if format == "torch zip" else None)
