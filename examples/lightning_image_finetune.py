"""Fine-tune a pretrained MobileNetV2 on 400 handwritten digits with Lightning, and see what the warm start is worth.

Three arms, equal in everything but the callback: warm and frozen, warm and trained, from scratch. Prints accuracy per
epoch, the rules of the load and its report, writes TensorBoard logs and `curves.png`, and ends with PASS or what failed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import matplotlib as mpl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import warmstart
from mobilenetv2 import MobileNetV2
from real_weights import MOBILENETV2
from warmstart import WarmStartError
from warmstart_lightning import WarmStart

EPOCHS = 5
BATCH_SIZE = 20
LABELS = 400
ACCURACY = 0.88  # warm and frozen reaches this,
MARGIN = 0.10  # and is at least this far above from scratch

Batch = tuple[Tensor, Tensor]
Loader = DataLoader[tuple[Tensor, ...]]


class DigitClassifier(pl.LightningModule):
    """A backbone and a linear head."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.backbone = MobileNetV2()
        self.head = nn.Linear(MobileNetV2.features, 10)
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parts = [(self.head, 1e-2), (self.backbone, 1e-3)]
        trainable = [([p for p in part.parameters() if p.requires_grad], rate) for part, rate in parts]
        groups = [{"params": parameters, "lr": rate} for parameters, rate in trainable if parameters]
        optimizer = torch.optim.Adam(groups)
        peaks = [rate for parameters, rate in trainable if parameters]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Digits(pl.LightningDataModule):
    """The data of `digits()`, for a configuration file."""

    @override
    def setup(self, stage: str) -> None:
        self.loaders = digits()

    @override
    def train_dataloader(self) -> Loader:
        return self.loaders[0]

    @override
    def val_dataloader(self) -> Loader:
        return self.loaders[1]


class Curve(pl.Callback):
    """Keeps and prints the accuracy of every epoch."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accuracy.append(trainer.callback_metrics["accuracy"].item())
        print(f"  epoch {len(self.accuracy)}  accuracy {self.accuracy[-1]:.3f}", flush=True)


@dataclass(frozen=True, slots=True)
class Arm:
    """How one arm went."""

    name: str
    accuracy: list[float]
    seconds: float


def digits() -> tuple[Loader, Loader]:
    """400 labelled digits to train on and the rest to test on: 64x64, dark ink on white, normalised as ImageNet was."""
    data = load_digits()
    images = 1 - torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=64, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    images = (images - mean) / std
    labels = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), train_size=LABELS, stratify=labels, random_state=0)
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=256),
    )


def train(name: str, warm_start: WarmStart | None, loaders: tuple[Loader, Loader], seed: int, output: Path) -> Arm:
    """Train one arm from the same seed: a warm start moves no random draw, so all arms see the same head and batches."""
    print(f"\n{name}", flush=True)
    pl.seed_everything(seed, verbose=False)
    model = DigitClassifier(EPOCHS * len(loaders[0]))
    curve = Curve()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        devices=1,
        callbacks=[curve] if warm_start is None else [warm_start, curve],
        logger=TensorBoardLogger(output, name=name.replace(" ", "_")),
        log_every_n_steps=len(loaders[0]),
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    started = time.perf_counter()
    trainer.fit(model, *loaders)
    return Arm(name, curve.accuracy, time.perf_counter() - started)


def table(arms: list[Arm]) -> str:
    """Accuracy per epoch and seconds, one line per arm."""
    width = max(len(arm.name) for arm in arms)
    epochs = "".join(f"{f'epoch {i}':>9}" for i in range(1, EPOCHS + 1))
    lines = [f"{'accuracy':<{width}}{epochs}{'seconds':>9}"]
    for arm in arms:
        lines.append(f"{arm.name:<{width}}{''.join(f'{a:>9.3f}' for a in arm.accuracy)}{arm.seconds:>9.1f}")
    return "\n".join(lines)


def draw(arms: list[Arm], paths: list[Path]) -> None:
    """Accuracy over epochs, one line per arm, each labelled at its end."""
    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, EPOCHS + 1)
    heights = spread([arm.accuracy[-1] for arm in arms], 0.055)
    for arm, height, colour in zip(arms, heights, ["#1b6ca8", "#2a9d5c", "#8a8a8a"], strict=True):
        axes.plot(epochs, arm.accuracy, color=colour, linewidth=2.2, marker="o", markersize=5)
        axes.annotate(
            f"{arm.name}  {arm.accuracy[-1]:.2f}",
            (EPOCHS + 0.12, height),
            color=colour,
            va="center",
            annotation_clip=False,
        )
    axes.set_title(f"MobileNetV2 on {LABELS} handwritten digits", loc="left", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy")
    axes.set_xticks(epochs)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights for labels, moved apart upwards where they would overlap."""
    placed: dict[int, float] = {}
    floor = float("-inf")
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        placed[i] = floor = max(heights[i], floor + gap)
    return [placed[i] for i in range(len(heights))]


def failures(frozen: Arm, scratch: Arm) -> list[str]:
    """What was promised and not kept, in words."""
    ours, theirs = frozen.accuracy[-1], scratch.accuracy[-1]
    found = []
    if ours < ACCURACY:
        found.append(f"{frozen.name} ended at {ours:.3f}, below {ACCURACY}")
    if ours < theirs + MARGIN:
        found.append(f"{frozen.name} ended at {ours:.3f}, less than {MARGIN} above {scratch.name} at {theirs:.3f}")
    return found


def quiet() -> None:
    """One line per epoch is enough here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for known in ("does not have many workers", r"module\(s\) in eval mode", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{known}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning_image_finetune"), help="folder for logs")
    parser.add_argument("--figure", type=Path, help="also write the curves here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet()

    weights = MOBILENETV2.fetch()
    loaders = digits()
    suggestion = warmstart.suggest(MobileNetV2(), weights)  # the file numbers its layers, the network names them
    print(f"\n{suggestion}")
    rules = replace(suggestion.pretrained, into="backbone")
    frozen_start = WarmStart(replace(rules, freeze=True))
    frozen = train("warm and frozen", frozen_start, loaders, options.seed, options.output)
    found = []
    report = frozen_start.report
    assert report is not None
    assert report.frozen is not None
    print(f"\n{report}")
    try:
        report.frozen.check()
        print("After training the frozen backbone is bit for bit what was loaded.")
    except WarmStartError as error:
        found.append(str(error))

    trained_start = WarmStart(rules)
    trained = train("warm and trained", trained_start, loaders, options.seed, options.output)
    scratch = train("from scratch", None, loaders, options.seed, options.output)

    arms = [frozen, trained, scratch]
    curves = options.output / "curves.png"
    draw(arms, [curves, *([options.figure] if options.figure else [])])
    print(f"\n{table(arms)}\n\nCurves: {curves}   Logs: tensorboard --logdir {options.output}")
    found += failures(frozen, scratch)
    print("\n".join(f"FAIL: {failure}" for failure in found) or "PASS")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
