"""What a `WarmStart` costs each step of training: pairs of fits with and without it, in turn, on steps of about 1 ms."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from warmstart_lightning import WarmStart

STEPS, PAIRS, WIDTH = 1000, 7, 256
BUDGET = 0.01


class Module(LightningModule):
    """An encoder to load, and work of about a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.head = nn.Linear(WIDTH, 2)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.head(self.encoder(batch[0])).square().mean()
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Stopwatch(Callback):
    """Seconds from the second batch to the last: the first one is where everything is compared once more."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 1:
            self.started = time.perf_counter()
        elif trainer.global_step == STEPS:
            self.seconds = time.perf_counter() - self.started


def step(source: dict[str, Tensor], *, frozen: bool, warm: bool) -> float:
    """Seconds of one step."""
    watch = Stopwatch()
    own = [WarmStart(source, into="encoder", freeze=frozen, log=False)] if warm else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder, max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[*own, watch],
        )  # fmt: skip
        torch.manual_seed(0)
        model = Module()
        model.encoder.requires_grad_(not frozen)
        trainer.fit(model, DataLoader(TensorDataset(torch.randn(1, 32, WIDTH).expand(STEPS, -1, -1)), batch_size=None))
    return watch.seconds / (STEPS - 1)


def main() -> None:
    """Print the table and end with an error over budget."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    source = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))).state_dict()
    print("| | without | with | difference | share |\n| --- | --- | --- | --- | --- |")
    over = []
    for name, frozen in (("loaded", False), ("loaded, frozen", True)):
        pairs = []
        for number in range(PAIRS):  # whichever goes first gains or loses by it: it alternates
            order = (False, True) if number % 2 else (True, False)
            found = {warm: step(source, frozen=frozen, warm=warm) for warm in order}
            pairs.append((found[False], found[True]))
        without, with_ = (statistics.median(side) for side in zip(*pairs, strict=True))
        difference = statistics.median(b - a for a, b in pairs)
        share = difference / without
        print(f"| {name} | {without * 1e3:.3f} ms | {with_ * 1e3:.3f} ms | {difference * 1e6:+.1f} us | {share:+.2%} |")
        if share > BUDGET:
            over.append(name)
    if over:
        sys.exit(f"more than {BUDGET:.0%} of a step: {', '.join(over)}")


if __name__ == "__main__":
    main()
