"""Run by test_ddp.py: two gloo processes, one fit and one resume; each rank writes what it saw to its own file."""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart_lightning import WarmStart

folder = Path(sys.argv[1])


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def configure_model(self):
        if not hasattr(self, "encoder"):
            self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def training_step(self, batch, batch_idx):
        return self.head(self.encoder(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)


class Look(Callback):
    def __init__(self, name):
        self.name, self.start = name, {}

    def on_train_start(self, trainer, pl_module):
        self.start = {k: v.tolist() for k, v in pl_module.encoder.state_dict().items()}

    def on_train_end(self, trainer, pl_module):
        end = {k: v.tolist() for k, v in pl_module.encoder.state_dict().items()}
        warm = next(c for c in trainer.callbacks if isinstance(c, WarmStart))
        found = {"start": self.start, "end": end, "status": warm.report.status}
        (folder / f"{self.name}-{trainer.global_rank}.json").write_text(json.dumps(found))


def fit(name, freeze, **kwargs):
    torch.manual_seed(0)
    saving = ModelCheckpoint(dirpath=folder / name, save_last=True)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=2, strategy="ddp", max_epochs=2 if kwargs else 1, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[WarmStart(folder / "source.pt", into="encoder", freeze=freeze), saving, Look(name)],
    )  # fmt: skip
    data = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)))
    trainer.fit(Module(), DataLoader(data, batch_size=4), **kwargs)


if __name__ == "__main__":
    fit("frozen", True)
    fit("trained", False)
    fit("resumed", False, ckpt_path=folder / "trained" / "last.ckpt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
