"""Lightning's own DeepSpeedStrategy, its check for CUDA included. DeepSpeed keeps its process group: it is not taken down."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart_lightning import WarmStart

from .conftest import Classifier

deepspeed = pytest.importorskip("deepspeed")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()
        self.net.encoder.again = nn.Identity()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x).float(), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Look(Callback):
    def on_train_start(self, trainer, pl_module):
        self.start = whole(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.end = whole(pl_module)


def whole(module: Module) -> dict[str, torch.Tensor]:
    out = {}
    for name, parameter in module.net.encoder.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            out[name] = parameter.detach().cpu().clone()
    return out


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
@pytest.mark.filterwarnings("ignore")
def test_training_starts_from_the_file(tmp_path, encoder_file, encoder_state, stage, precision, dtype):
    look = Look()
    callback = WarmStart(encoder_file, into="net.encoder", freeze="net.encoder.words", log=False)
    x = torch.randint(0, 11, (32, 3), generator=torch.Generator().manual_seed(1))
    Trainer(
        default_root_dir=tmp_path, accelerator="gpu", devices=1, strategy=DeepSpeedStrategy(stage=stage), max_epochs=2,
        precision=precision, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, look],
    ).fit(Module(), DataLoader(TensorDataset(x, x.sum(1) % 2), batch_size=8))  # fmt: skip
    assert look.start.keys() == {n for n in encoder_state if n.endswith(("weight", "bias"))}
    for name, value in look.start.items():
        assert torch.equal(value.to(dtype), encoder_state[name].to(dtype)), name
    assert torch.equal(look.end["words.weight"], look.start["words.weight"])
    assert not torch.equal(look.end["up.weight"], look.start["up.weight"])
    assert callback.report.status == "applied"
