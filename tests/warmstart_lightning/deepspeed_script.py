"""Run by test_deepspeed.py under torchrun: Lightning's DeepSpeedStrategy in two processes; each writes what it saw."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart import MapRows
from warmstart.shards import local_of
from warmstart_lightning import WarmStart

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; else a kernel is compiled first

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])


class OnCPUs(DeepSpeedStrategy):
    """Lightning's own strategy, but for the line that asks for CUDA, and the numbers that CUDA's devices have."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Module(LightningModule):
    """A stage of 3 makes configure_model's layers under deepspeed.zero.Init."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)

    def configure_model(self) -> None:
        if not hasattr(self, "encoder"):
            self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def whole(model: nn.Module) -> dict[str, Any]:
    out = {}
    for name, tensor in model.named_parameters():
        with deepspeed.zero.GatheredParameters([tensor]):
            out[name] = tensor.detach().tolist()
    return out


class Look(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = whole(pl_module)
        self.made = sorted({hasattr(p, "ds_id") for p in pl_module.encoder.parameters()})


class Write(Callback):
    def __init__(self, write: Any) -> None:
        self.write = write

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if rank == 1:
            self.write(pl_module.encoder[2].weight)


def fit(name: str, stage: int, *callbacks: Callback, seed: int = 0, epochs: int = 1, **options: Any) -> dict[str, Any]:
    torch.manual_seed(100 * seed + rank)
    look, saving = Look(), ModelCheckpoint(dirpath=folder / name, save_last=True)
    strategy = OnCPUs(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=4)
    trainer = Trainer(
        default_root_dir=folder / "run", accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, look, saving],
    )  # fmt: skip
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4), **options)
    (warm,) = (c for c in callbacks if isinstance(c, WarmStart))
    status = warm.report.status if warm.report is not None else None
    return {"start": look.start, "end": whole(module), "made": look.made, "status": status}


def warm(**fields: Any) -> WarmStart:
    return WarmStart(folder / "encoder.pt", into="encoder", log=False, **fields)


def zero_values(weight: Tensor) -> None:
    local_of(weight).zero_()


def zero_copy(weight: Any) -> None:
    weight._z3_optimizer.get_local_fp32_param(weight).detach().zero_()


def rows() -> WarmStart:
    return warm(adapt={"encoder.2.weight": MapRows(old=list("abcde"), new=list("abcde"), freeze_old=True)})


CASES = {
    "frozen 3": lambda: fit("frozen 3", 3, warm(freeze="encoder.0")),
    "frozen 2": lambda: fit("frozen 2", 2, warm(freeze="encoder.0")),
    "resumed 3": lambda: fit("r3", 3, warm(freeze="encoder.0"), seed=2, epochs=2, ckpt_path=folder / "frozen 3" / "last.ckpt"),
    "resumed 2": lambda: fit("r2", 2, warm(freeze="encoder.0"), seed=2, epochs=2, ckpt_path=folder / "frozen 2" / "last.ckpt"),
    "other values": lambda: fit("o1", 3, warm(), Write(zero_values)),
    "other copies": lambda: fit("o2", 3, warm(), Write(zero_copy)),
    "unfreeze": lambda: fit("u", 2, warm(freeze=True, unfreeze={1: "encoder.2"})),
    "rows": lambda: fit("h", 2, rows()),
}  # fmt: skip

if __name__ == "__main__":
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        print(name, flush=True)
        try:
            found[name] = case()
        except Exception as error:
            found[name] = {
                "error": type(error).__name__, "message": str(error), "trace": traceback.format_exc(),
            }  # fmt: skip
        (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
