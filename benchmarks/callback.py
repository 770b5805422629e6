"""What a `WarmStart` costs each step of training: two fits at once, with and without it, that take turns at every step.

Seconds are of the processor, on one thread for each fit, so that other work on the machine costs little of the measure; and
each step is compared with the one of the other fit beside it, a millisecond away. A round's difference is the median of
those. The fit that was made first is some 20 us a step faster or slower, whichever it is, so a round has both orders.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from threading import Semaphore, Thread
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from warmstart_lightning import WarmStart

ROUNDS, STEPS, UNCOUNTED = 3, 500, 50
WIDTH, ROWS = 256, 24
BUDGET = 0.01


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
    """The seconds of each step; after each it is the other fit's turn."""

    def __init__(self, own: Semaphore, other: Semaphore) -> None:
        self.own, self.other = own, other
        self.started = 0.0
        self.seconds: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.own.acquire()
        self.started = time.thread_time()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.thread_time() - self.started)
        self.other.release()
        self.own.acquire()
        self.started = time.thread_time()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.other.release()


def fit(turns: Turns, own: list[Callback], frozen: bool) -> None:
    """All steps of one fit."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder, max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[*own, turns],
        )  # fmt: skip
        model = Module()
        model.encoder.requires_grad_(not frozen)
        data = TensorDataset(torch.randn(1, ROWS, WIDTH).expand(STEPS, -1, -1))
        trainer.fit(model, DataLoader(data, batch_size=None))


def measure(callback: Callback, frozen: bool, first: bool) -> tuple[float, float]:
    """Seconds of a step without the callback, and what it adds; `first`: whether the fit with it has the first turn."""
    one, two = Semaphore(1), Semaphore(0)
    with_, without = (Turns(one, two), Turns(two, one)) if first else (Turns(two, one), Turns(one, two))
    threads = [Thread(target=fit, args=(turns, own, frozen)) for turns, own in ((with_, [callback]), (without, []))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = list(zip(without.seconds, with_.seconds, strict=True))[UNCOUNTED:]
    return statistics.median(a for a, _ in pairs), statistics.median(b - a for a, b in pairs)


def main() -> None:
    """Print the table and end with an error over budget."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| | a step without | with | share |\n| --- | --- | --- | --- |")
    over = []
    source = make_encoder().state_dict()
    cases: list[tuple[str, Callable[[], Callback], bool]] = [
        ("a callback that does nothing", Callback, False),
        ("WarmStart", lambda: WarmStart(source, into="encoder", log=False), False),
        ("WarmStart, frozen", lambda: WarmStart(source, into="encoder", freeze=True, log=False), True),
    ]
    for name, make, frozen in cases:
        rounds = [[measure(make(), frozen, first) for first in (True, False)] for _ in range(ROUNDS)]
        without = statistics.median(usual for both in rounds for usual, _ in both)
        added = statistics.median(statistics.mean(more for _, more in both) for both in rounds)
        print(f"| {name} | {without * 1e3:.3f} ms | {added * 1e6:+.1f} us | {added / without:+.2%} |", flush=True)
        if added > BUDGET * without:
            over.append(name)
    if over:
        sys.exit(f"more than {BUDGET:.0%} of a step: {', '.join(over)}")


if __name__ == "__main__":
    main()
