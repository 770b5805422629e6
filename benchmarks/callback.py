"""What a `WarmStart` costs each step of training: in one fit, steps with it, without, and with a callback that does nothing.

The trainer's list of callbacks is another one at every step, in an order drawn anew for each three steps, so that the model,
its memory and the machine are the same for all. Seconds are of the processor, on one thread. A cost is the median of the
differences inside the threes; its error is half the width of the interval that holds the true median with 95 % (of the order
statistics). That nothing but hooks of the callback can cost anything is looked at too: no module or tensor has a hook left.
"""

from __future__ import annotations

import logging
import math
import random
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

THREES, UNCOUNTED = 6000, 20
WIDTH, ROWS = 256, 24
BUDGET = 10e-6  # of a step of a millisecond: 1 %


def make_encoder() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))


class Module(LightningModule):
    """An encoder to load, and work of about a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = make_encoder(), nn.Linear(WIDTH, 2)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.head(self.encoder(batch[0])).square().mean()
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Turns(Callback):
    """Stands last; at the end of each step notes its seconds, and gives the trainer the callbacks of the next one."""

    def __init__(self, warm: WarmStart) -> None:
        self.lists: dict[str, list[Callback]] = {"nothing": [], "does nothing": [Callback()], "warm": [warm]}
        self.order: list[str] = []
        self.now = ""
        self.started = 0.0
        self.threes: list[dict[str, float]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        taken = time.thread_time() - self.started
        if self.now:
            self.threes[-1][self.now] = taken
        if trainer.global_step >= UNCOUNTED:
            if not self.order:
                self.order = random.sample(list(self.lists), 3)
                self.threes.append({})
            self.now = self.order.pop()
            trainer.callbacks = [*self.lists[self.now], self]  # type: ignore[attr-defined]
        self.started = time.thread_time()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        modules = list(pl_module.modules())
        hooks = (h for m in modules for h in vars(m) if "hooks" in h and vars(m)[h] and m is not pl_module)
        left = [*hooks, *(p._backward_hooks for p in pl_module.parameters() if p._backward_hooks)]
        assert not left, left
        del self.threes[-1]  # the last one may lack a step


def measure(warm: WarmStart) -> list[dict[str, float]]:
    """Seconds of the steps of each three."""
    turns = Turns(warm)
    steps = UNCOUNTED + 3 * THREES
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder, max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[warm, turns],
        )  # fmt: skip
        data = TensorDataset(torch.randn(1, ROWS, WIDTH).expand(steps, -1, -1))
        trainer.fit(Module(), DataLoader(data, batch_size=None))
    return turns.threes


def median(values: list[float]) -> tuple[float, float]:
    """A median and its error."""
    ordered, reach = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = (ordered[round(len(values) / 2 + sign * reach)] for sign in (-1, 1))
    return statistics.median(ordered), (high - low) / 2


def main() -> None:
    """Print the table and end with an error over budget."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    source = make_encoder().state_dict()
    print("| | a step without | with | of a step of 1 ms |\n| --- | --- | --- | --- |")
    over = []
    for name, freeze in (("WarmStart", False), ("WarmStart, frozen", True)):
        threes = measure(WarmStart(source, into="encoder", freeze=freeze, log=False))
        usual = statistics.median(three["nothing"] for three in threes)
        for row, key in (("a callback that does nothing", "does nothing"), (name, "warm")):
            added, error = median([three[key] - three["nothing"] for three in threes])
            print(
                f"| {row} | {usual * 1e3:.3f} ms | {added * 1e6:+.1f} ± {error * 1e6:.1f} us | {added / 1e-3:+.2%} |",
                flush=True,
            )
            if key == "warm" and added + error > BUDGET:
                over.append(name)
    if over:
        sys.exit(f"more than 1 % of a step of 1 ms: {', '.join(over)}")


if __name__ == "__main__":
    main()
