"""Shared by all tests: offline hubs, a quiet Lightning, the examples on the path, and a hash of a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read when the libraries are imported, so set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent / "support"))

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def state_hash(model: nn.Module) -> dict[str, bytes]:
    """Every entry's bits, and whether it trains: equal hashes mean an untouched model."""
    out = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        out[name] = words.numpy().tobytes() + bytes([tensor.requires_grad])
    return out


@pytest.fixture
def fingerprint():
    """`state_hash` as a fixture."""
    return state_hash
