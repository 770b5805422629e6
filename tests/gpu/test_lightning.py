"""Lightning's Trainer on a GPU: precisions, strategies that want one, and resumed runs."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from warmstart import VerificationError
from warmstart.shards import gathered
from warmstart_lightning import WarmStart

from .conftest import Classifier

pytestmark = [pytest.mark.usefixtures("ended_groups"), pytest.mark.filterwarnings("ignore")]


class Module(LightningModule):
    def __init__(self, meta: bool = False) -> None:
        super().__init__()
        self.meta = meta
        if not meta:
            self.net = Classifier()

    def configure_model(self) -> None:
        if self.meta and not hasattr(self, "net"):
            with torch.device("meta"):
                self.net = Classifier()
                self.net.encoder.again = nn.Identity()  # FSDP2 shards a tie as two
            fully_shard(self.net.encoder, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net.head, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x).float(), y)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)


class Look(Callback):
    """What the encoder holds when training starts, and at its end: on the CPU."""

    def on_train_start(self, trainer, pl_module):
        assert all(p.is_cuda for p in pl_module.parameters())
        self.start = held(pl_module)
        self.synchronised = isinstance(pl_module.net.encoder.norm, nn.SyncBatchNorm)  # until the fit is over

    def on_train_end(self, trainer, pl_module):
        self.end = held(pl_module)


def held(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: gathered(t).detach().cpu().clone() for name, t in module.net.encoder.state_dict().items()}


def data() -> DataLoader:
    x = torch.randint(0, 11, (32, 3), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1) % 2), batch_size=8)


def trainer(tmp_path, *callbacks, **options) -> Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "devices": 1, **options}
    return Trainer(
        default_root_dir=tmp_path, accelerator="gpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def warm(source, **fields) -> WarmStart:
    return WarmStart(source, into="net.encoder", log=False, **fields)


def assert_holds(seen, state, dtype=None):
    for name, value in state.items():
        expected = value.to(dtype) if dtype and value.is_floating_point() else value
        assert torch.equal(seen[name], expected), name


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_every_precision_starts_from_the_file_and_keeps_what_is_frozen(
    tmp_path, encoder_file, encoder_state, precision
):
    look, callback = Look(), warm(encoder_file, freeze=True)
    trainer(tmp_path, callback, look, precision=precision).fit(Module(), data())
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(precision)
    assert_holds(look.start, encoder_state, dtype)
    assert_holds(look.end, encoder_state, dtype)
    assert callback.report.status == "applied"


def test_an_overwritten_tensor_stops_the_run(tmp_path, encoder_file):
    class Overwrite(Callback):
        def on_fit_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.net.encoder.up.weight.zero_()

    with pytest.raises(VerificationError, match=r"net\.encoder\.up\.weight"):
        trainer(tmp_path, warm(encoder_file), Overwrite()).fit(Module(), data())


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, encoder_file):
    ends = []
    for name, epochs, path in (("whole", 3, None), ("half", 1, None), ("half", 3, "half/last.ckpt")):
        torch.manual_seed(0)
        saving = ModelCheckpoint(dirpath=tmp_path / name, save_last=True)
        callback = warm(encoder_file, freeze=True, unfreeze={1: "net.encoder.down", 2: "net.encoder"})
        look = Look()
        trainer(tmp_path, callback, look, saving, max_epochs=epochs, enable_checkpointing=True).fit(
            Module(), data(), ckpt_path=path and tmp_path / path
        )
        ends.append(look.end)
    assert ends[0].keys() == ends[2].keys()
    for name, value in ends[0].items():
        assert torch.equal(ends[2][name], value), name


@pytest.mark.parametrize("sync_batchnorm", [False, True])
def test_ddp_over_nccl(tmp_path, encoder_file, encoder_state, sync_batchnorm):
    look, callback = Look(), warm(encoder_file, freeze=True)
    trainer(tmp_path, callback, look, strategy=DDPStrategy(), sync_batchnorm=sync_batchnorm).fit(Module(), data())
    assert look.synchronised == sync_batchnorm
    assert_holds(look.start, encoder_state)
    assert_holds(look.end, encoder_state)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fsdp2_over_nccl_from_a_model_on_meta(tmp_path, encoder_file, encoder_state, precision):
    look, callback = Look(), warm(encoder_file, freeze="net.encoder.words")
    trainer(tmp_path, callback, look, strategy=ModelParallelStrategy(1, 1), precision=precision).fit(
        Module(meta=True), data()
    )
    assert_holds(look.start, encoder_state, torch.bfloat16 if precision == "bf16-true" else None)
    assert torch.equal(look.end["words.weight"], look.start["words.weight"])
    assert not torch.equal(look.end["up.weight"], look.start["up.weight"])


def test_a_compiled_module(tmp_path, encoder_file, encoder_state):
    look, callback = Look(), warm(encoder_file, freeze=True)
    module = Module()
    module.net = torch.compile(module.net)
    trainer(tmp_path, callback, look, precision="bf16-mixed").fit(module, data())
    assert_holds(look.start, encoder_state)
    assert_holds(look.end, encoder_state)
