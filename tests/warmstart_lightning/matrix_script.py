"""Run by test_matrix.py: every cell of one strategy in one launch; each rank writes what it saw to its own file."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from warmstart import WarmStartError
from warmstart_lightning import WarmStart

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

STRATEGY, FOLDER = sys.argv[1], Path(sys.argv[2])
SOURCE = FOLDER / "source.pt"
SHARDED = STRATEGY in ("fsdp2", "tp")


class Encoder(nn.Module):
    """Weights of a size that two ranks cannot share evenly, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.norm(self.up(x)).relu())
        return out


class Module(LightningModule):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.sharded = place, False
        self.head = nn.Linear(5, 2)
        if place == "init":
            self.encoder = Encoder()

    def setup(self, stage: str) -> None:
        if self.place == "setup" and not hasattr(self, "encoder"):
            self.encoder = Encoder()

    def configure_model(self) -> None:
        if self.place == "configure_model" and not hasattr(self, "encoder"):
            with torch.device("meta" if SHARDED else "cpu"):
                self.encoder = Encoder()
        if SHARDED and not self.sharded:
            self.sharded = True
            mesh = self.device_mesh
            if STRATEGY == "tp":
                styles = {"up": ColwiseParallel(output_layouts=None), "down": RowwiseParallel()}
                styles["up"] = ColwiseParallel(use_local_output=True)
                self.encoder.norm = nn.Identity()  # what stands between the two sees a part of the columns
                parallelize_module(self.encoder, mesh["tensor_parallel"], styles)
            else:
                fully_shard(self.encoder, mesh=mesh["data_parallel"])
                fully_shard(self.head, mesh=mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)


def values(module: Module) -> dict[str, Any]:
    """Whole tensors; all ranks ask."""
    return {
        name: (v.full_tensor() if isinstance(v, DTensor) else v).tolist()
        for name, v in module.encoder.state_dict().items()
    }


class Look(Callback):
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.seen = {"start": values(pl_module), "meta": sum(p.is_meta for p in pl_module.parameters())}
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.seen["held"] = sorted(n for n, p in pl_module.named_parameters() if id(p) in held)
        self.seen["trainable"] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.seen["trainable"].append(sorted(n for n, p in pl_module.named_parameters() if p.requires_grad))

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.seen["end"] = values(pl_module)
        mode = pl_module.encoder.training
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            outputs = [pl_module.train(train).encoder(x).tolist() for train in (True, False)]
        self.seen["outputs"], pl_module.training = outputs, mode


def trainer(name: str, warm: WarmStart | None, look: Look, epochs: int, **options: Any) -> Trainer:
    strategy: Any = {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(find_unused_parameters=options.pop("unused", False)),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        "tp": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
    }[STRATEGY]()
    options.pop("unused", None)
    saving = ModelCheckpoint(dirpath=FOLDER / name, save_last=True, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    return Trainer(
        default_root_dir=FOLDER / "run", accelerator="cpu", devices=1 if STRATEGY == "single" else 2, strategy=strategy,
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[c for c in (warm, look, saving) if c is not None], **options,
    )  # fmt: skip


def data() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)


def warm_start(**fields: Any) -> WarmStart:
    if STRATEGY == "tp":
        fields["allow_unexpected"] = "norm"
    return WarmStart(SOURCE, into="encoder", log=False, **fields)


def new(place: str) -> Module:
    torch.manual_seed(0)
    return Module(place)


def cells(place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def run(name: str, module: Module, of: Trainer, warm: WarmStart, look: Look, **options: Any) -> None:
        of.fit(module, data(), **options)
        assert warm.report is not None
        found[name] = look.seen | {"status": warm.report.status}

    module, warm, look = new(place), warm_start(), Look()
    run("fit", module, trainer(place, warm, look, 1), warm, look)
    look = Look()
    run("second fit", module, trainer(f"{place}-2", warm, look, 1), warm, look)
    warm, look = warm_start(), Look()
    path = FOLDER / place / "epoch=0.ckpt"
    run("resume", new(place), trainer(f"{place}-3", warm, look, 2), warm, look, ckpt_path=path)
    warm, look = warm_start(), Look()
    run("last", new(place), trainer(place, warm, look, 2), warm, look, ckpt_path="last")
    module, warm, look = new(place), warm_start(), Look()
    of = trainer(f"{place}-4", warm, look, 1)
    of.validate(module, data(), verbose=False)
    validated = {"validated": values(module)}
    run("validate then fit", module, of, warm, look)
    found["validate then fit"] |= validated
    return found


def frozen() -> dict[str, Any]:
    """Three epochs with weight decay and statistics."""
    warm, look = warm_start(freeze=True), Look()
    trainer("frozen", warm, look, 3).fit(new("configure_model"), data())
    return look.seen


def staged() -> dict[str, Any]:
    """Released after one epoch; whole, and resumed at each epoch's end."""
    schedule = {1: "encoder.down", 2: "encoder"}
    found: dict[str, Any] = {}
    for name, options in (("whole", {}), ("1", {"ckpt_path": FOLDER / "whole" / "epoch=0.ckpt"}),
                          ("2", {"ckpt_path": FOLDER / "whole" / "epoch=1.ckpt"})):  # fmt: skip
        warm, look = warm_start(freeze=True, unfreeze=schedule), Look()
        trainer(name, warm, look, 3, unused=True).fit(new("configure_model"), data(), **options)
        found[name] = look.seen
    return found


def refused() -> dict[str, str]:
    """What stops, in words."""
    out = {}
    for name, fields in {"unused": {"freeze": True, "unfreeze": {1: "encoder"}}, "typo": {"freeze": "encodr"}}.items():
        try:
            trainer(f"refused-{name}", warm_start(**fields), Look(), 1).fit(new("configure_model"), data())
            out[name] = ""
        except WarmStartError as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out


if __name__ == "__main__":
    places = ("configure_model",) if STRATEGY == "tp" else ("init", "setup", "configure_model")
    import faulthandler

    faulthandler.dump_traceback_later(140, exit=True)
    results: dict[str, Any] = {place: cells(place) for place in places}
    results |= {"frozen": frozen(), "staged": staged(), "refused": refused()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (FOLDER / f"rank-{rank}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
