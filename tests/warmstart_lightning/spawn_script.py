"""Run by test_spawn.py: one fit whose processes come from this one; each rank writes what it saw to its own file."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart_lightning import WarmStart

warnings.simplefilter("ignore")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)), nn.Linear(5, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.encoder(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)


class Look(Callback):
    def __init__(self, folder: Path, warm: WarmStart) -> None:
        self.folder, self.warm = folder, warm

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.start = {name: value.tolist() for name, value in pl_module.encoder.state_dict().items()}

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        seen = {"start": self.start, "status": self.warm.state_dict()["status"], "process": os.getpid()}
        seen["end"] = {name: value.tolist() for name, value in pl_module.state_dict().items()}
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))


def fit(strategy: str, source: Path, folder: Path, epochs: int, **options: Any) -> dict[str, Any]:
    """What each rank saw, and what this process holds afterwards."""
    folder.mkdir()
    warm, module = WarmStart(source, into="encoder", freeze=["encoder.0", "encoder.1"]), Module()
    saving = ModelCheckpoint(dirpath=folder, save_last=True)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[warm, saving, Look(folder, warm)],
    )  # fmt: skip
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4), **options)
    return {
        "ranks": [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)],
        "here": {name: value.tolist() for name, value in module.state_dict().items()},
        "process": os.getpid(),
    }


if __name__ == "__main__":
    name, at = sys.argv[1], Path(sys.argv[2])
    faulthandler.dump_traceback_later(float(sys.argv[3]), exit=True)
    found = {"fit": fit(name, at / "source.pt", at / "fit", 1)}
    if name != "ddp_spawn":  # whose processes import everything anew for each fit
        found["resume"] = fit(name, at / "gone.pt", at / "resume", 2, ckpt_path=at / "fit" / "last.ckpt")
    (at / "found.json").write_text(json.dumps(found))
