"""A pretrained file for the tiny model, and an accelerator that no other test has seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import loops


@pytest.fixture(autouse=True)
def _fresh():
    loops.fresh()
    yield
    loops.fresh()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(loops.trained_encoder(), tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt"


@pytest.fixture
def smooth(tmp_path: Path) -> Path:
    torch.save(loops.trained_encoder(loops.Smooth), tmp_path / "smooth.pt")
    return tmp_path / "smooth.pt"
