"""On a real accelerator; elsewhere each of these tests is skipped. `CUDA_VISIBLE_DEVICES=0 pytest tests/gpu` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="no CUDA device, or CUDA_VISIBLE_DEVICES hides it"))


class Encoder(nn.Module):
    """What a load meets: matrices, a table of rows, statistics of batches with an integer, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 6)
        self.again = nn.Linear(6, 11, bias=False)
        self.again.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.norm(self.up(self.words(x).mean(1))).relu())
        return out


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


@pytest.fixture
def encoder_state() -> dict[str, Tensor]:
    """A trained encoder's tensors, on the CPU."""
    generator = torch.Generator().manual_seed(5)
    state = {
        name: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t + 41
        for name, t in Encoder().state_dict().items()
        if name != "again.weight"
    }
    state["norm.running_var"].abs_()
    return state


@pytest.fixture
def encoder_file(tmp_path, encoder_state):
    save_file(encoder_state, tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


@pytest.fixture
def ended_groups() -> Iterator[None]:
    """Takes down the process group that a test's strategy has set up."""
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
