"""Run by test_matrix.py: every cell of some strategies in one launch; each rank writes what it saw to its own files."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from warmstart import WarmStartError
from warmstart_lightning import WarmStart

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

STRATEGIES, ROOT, LIMIT = sys.argv[1].split(","), Path(sys.argv[2]), float(sys.argv[3])
SOURCE = ROOT / "source.pt"
STRATEGY, FOLDER, SHARDED = "", ROOT, False  # of the one that runs at present


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
        self.place, self.sharded, self.lr = place, False, 0.1
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
                styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
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
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.1)


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


class Overwrite(Callback):
    """The last rank writes to what was loaded, in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, module, *args: self.act(trainer, module))

    def act(self, trainer: Trainer, module: Module) -> None:
        weight = module.encoder.down.weight.detach()
        if trainer.global_rank == trainer.world_size - 1:
            (weight.to_local() if isinstance(weight, DTensor) else weight).add_(1)


def trainer(
    name: str, warm: WarmStart, look: Look, epochs: int, *more: Callback, unused: bool = False, folder: bool = True
) -> Trainer:
    strategy: Any = {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(find_unused_parameters=unused),
        "fsdp2": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=folder),
        "tp": lambda: ModelParallelStrategy(1, 2, save_distributed_checkpoint=folder),
    }[STRATEGY]()
    saving = ModelCheckpoint(dirpath=FOLDER / name, save_last=True, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    return Trainer(
        default_root_dir=FOLDER / "run", accelerator="cpu", devices=1 if STRATEGY == "single" else 2, strategy=strategy,
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[warm, look, saving, *more],
    )  # fmt: skip


def data() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)


def warm_start(source: Path = SOURCE, **fields: Any) -> WarmStart:
    if STRATEGY == "tp":
        fields["allow_unexpected"] = "norm"
    return WarmStart(source, into="encoder", log=False, **fields)


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
    found: dict[str, Any] = {}
    for name, path in (("whole", None), ("1", "epoch=0.ckpt"), ("2", "epoch=1.ckpt")):
        warm, look = warm_start(freeze=True, unfreeze={1: "encoder.down", 2: "encoder"}), Look()
        of = trainer(
            name, warm, look, 3, unused=True, folder=STRATEGY != "tp"
        )  # one reads a folder, the other one file
        path = None if path is None else FOLDER / "whole" / path
        error = told(lambda of=of, path=path: of.fit(new("configure_model"), data(), ckpt_path=path))
        found[name] = error or look.seen
    return found


def told(act: Callable[[], object]) -> str:
    """The error that stops it."""
    try:
        act()
    except WarmStartError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused() -> dict[str, str]:
    """What stops, in words."""

    def fit(name: str, *more: Callback, **fields: Any) -> str:
        return told(lambda: trainer(name, warm_start(**fields), Look(), 1, *more).fit(new("configure_model"), data()))

    finder = trainer("tuner", warm_start(), Look(), 1)
    return {
        "unused": fit("unused", freeze=True, unfreeze={1: "encoder"}),
        "typo": fit("typo", freeze="encodr"),
        "tuner": told(lambda: Tuner(finder).lr_find(new("init"), data())) if SHARDED else "",
        **{f"overwritten in {hook}": fit(hook, Overwrite(hook)) for hook in ("on_fit_start", "on_train_start")},
    }


def gone() -> dict[str, Any]:
    """Resumed where the source is gone, from each form that the strategy saves a checkpoint in."""
    found: dict[str, Any] = {}
    for folder in (True, False) if SHARDED else (True,):
        name = "folder" if folder else "file"
        of = trainer(f"gone-{name}", warm_start(freeze="encoder.up"), first := Look(), 1, folder=folder)
        of.fit(new("configure_model"), data())
        path = FOLDER / f"gone-{name}" / "epoch=0.ckpt"
        for case, freeze, strict in (
            ("named", "encoder.up", True),
            ("loose", "encoder.up", False),
            ("all", True, True),
        ):
            warm, look, module = warm_start(FOLDER / "moved.pt", freeze=freeze), Look(), new("configure_model")
            module.strict_loading = strict
            of = trainer(f"gone-{name}-{case}", warm, look, 2, folder=folder)
            error = told(lambda of=of, module=module, path=path: of.fit(module, data(), ckpt_path=path))
            status = warm.state_dict()["status"]
            found[f"{name}, {case}"] = look.seen | {"before": first.seen["end"], "error": error, "status": status}
    return found


def read_by_one() -> dict[str, Any]:
    """The first rank alone has the file, and reads it for the others."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    warm, look = warm_start(SOURCE if first else FOLDER / "moved.pt", read="broadcast"), Look()
    trainer("read-by-one", warm, look, 1).fit(new("configure_model"), data())
    return look.seen


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    for STRATEGY in STRATEGIES:
        FOLDER, SHARDED = ROOT / STRATEGY, STRATEGY in ("fsdp2", "tp")
        places = ("configure_model",) if STRATEGY == "tp" else ("init", "setup", "configure_model")
        results: dict[str, Any] = {place: cells(place) for place in places}
        results |= {
            "frozen": frozen(),
            "staged": staged(),
            "refused": refused(),
            "gone": gone(),
            "read by one": read_by_one(),
        }
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (FOLDER / f"rank-{rank}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
