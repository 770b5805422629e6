"""The models that loads are measured on, and their checkpoints in every format that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 1024
BLOCKS = 24
VOCABULARY = 70_000


class Block(nn.Module):
    """A transformer's block, as far as its tensors go: 16 of them, 12.6 million elements at a width of 1024."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("query", "key", "value", "out"):
            self.add_module(name, nn.Linear(width, width))
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)


class Transformer(nn.Module):
    """388 tensors and 1.5 GB of float32: 24 blocks of 1024, two embeddings, a norm."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY * blocks // BLOCKS, WIDTH)
        self.positions = nn.Embedding(512, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)


class Many(nn.Module):
    """20,000 small tensors."""

    def __init__(self, layers: int = 10_000) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Modules that are built inside hold memory that was never written."""
    own = {cls: cls.reset_parameters for cls in (nn.Linear, nn.Embedding, nn.LayerNorm)}
    try:
        for cls in own:
            cls.reset_parameters = lambda self: None
        yield
    finally:
        for cls, method in own.items():
            cls.reset_parameters = method


def initialised(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model as training has it before a load: every page of it has been written to."""
    with without_initialisation():
        model = build().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def weights(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict of cheap values that differ."""
    table = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)).to(dtype)
    state = {}
    for name, entry in on_meta(build).state_dict().items():
        count = entry.numel()
        values = table.repeat(-(-count // table.numel()))[:count]
        values[0] = len(state)
        state[name] = values.view(entry.shape)
    return state


def write_safetensors(path: Path, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> None:
    save_file(weights(build, dtype), path)


def write_torch(path: Path, build: Callable[[], nn.Module]) -> None:
    torch.save(weights(build), path)


def write_numpy(path: Path, build: Callable[[], nn.Module]) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in weights(build).items()})


def write_lightning(path: Path, build: Callable[[], nn.Module]) -> None:
    """What Lightning's `Trainer` saves: the weights under a prefix, and Adam's state of twice their size."""
    state = weights(build)
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": tensor, "exp_avg_sq": tensor.square()}
        for i, tensor in enumerate(tensor.clone() for tensor in state.values())
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(moments)}]
    checkpoint = {
        "epoch": 1,
        "global_step": 100,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "loops": {},
        "callbacks": {},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-3},
    }
    torch.save(checkpoint, path)
