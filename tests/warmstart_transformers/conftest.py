"""Pretrained files for tiny models, and a Trainer in a folder of the test's own."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).parent))

import tiny


@pytest.fixture
def plain_source(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    encoder = tiny.Plain().encoder
    encoder(torch.randn(64, 4) * 3 + 1)  # statistics that no fresh BatchNorm has
    with torch.no_grad():
        encoder[3].weight.normal_()
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt"


@pytest.fixture
def bert_source(tmp_path: Path) -> Path:
    """A base model's file, as the hub has them: no prefix, no head, an old buffer."""
    torch.manual_seed(7)
    tree = {name: value.contiguous() for name, value in BertModel(tiny.bert_config()).state_dict().items()}
    path = tmp_path / "bert.safetensors"
    save_file({**tree, "embeddings.position_ids": torch.arange(16)[None]}, path)
    return path


@pytest.fixture
def make_trainer(tmp_path: Path):
    return functools.partial(tiny.make_trainer, tmp_path / "run")
