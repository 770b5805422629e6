"""Loops as people write them, over tiny models: the same one for one process, two, and a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart import Report
from warmstart_accelerate import warm_start


class Net(nn.Module):
    """An encoder that has everything that moves when it should not, and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.LayerNorm(width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Smooth(nn.Module):
    """Without statistics and chance: two processes that average their gradients are one with all of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def fresh() -> None:
    """Forget the process' accelerator, which is one for all."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained_encoder(kind: type[nn.Module] = Net) -> dict[str, Tensor]:
    """Weights and statistics that no fresh model has."""
    torch.manual_seed(7)
    encoder = kind().encoder
    encoder(torch.randn(64, 4) * 3 + 1)
    with torch.no_grad():
        encoder[-1].weight.normal_()
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def batches(size: int = 8, of: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(of, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=size)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Looked:
    """What a loop saw."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.losses: list[float] = []
        self.report: Report | None = None
        self.model: nn.Module | None = None
        self.prepared: nn.Module | None = None
        self.accelerator: Accelerator | None = None


def train(
    source: Any,
    *,
    folder: Path | None = None,
    seed: int = 0,
    kind: type[nn.Module] = Net,
    model: nn.Module | None = None,
    load: Callable[[nn.Module], object] | None = None,
    resume: Path | None = None,
    save: Path | None = None,
    steps: int = 4,
    skip: int = 0,
    size: int = 8,
    accelerator: Accelerator | None = None,
    each_step: Callable[[int, nn.Module, Any], object] = lambda step, model, optimizer: None,
    **options: Any,
) -> Looked:
    """One run: load, optimizer, prepare, perhaps restore, train, perhaps save, end."""
    seen = Looked()
    torch.manual_seed(seed)
    accelerator = accelerator or Accelerator(cpu=True, project_dir=folder)
    bare = model if model is not None else kind()
    if load is not None:
        load(bare)
    else:
        seen.report = warm_start(accelerator, bare, source, **{"into": "encoder", **options})
    optimizer = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    model, optimizer, data = accelerator.prepare(bare, optimizer, batches(size))
    seen.model, seen.prepared, seen.accelerator = bare, model, accelerator
    if resume is not None:
        accelerator.load_state(resume)
        data = accelerator.skip_first_batches(data, skip)
    model.train()
    for step, (x, y) in enumerate(data):
        if step == steps:
            break
        with accelerator.accumulate(model):
            output = model(x)
            if not seen.start:
                seen.start = weights(bare)
            loss = nn.functional.cross_entropy(output, y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        seen.losses.append(float(loss.detach()))
        each_step(step + 1, bare, optimizer)
    if save is not None:
        accelerator.save_state(save)
    return seen
