"""`Trainer(sync_batchnorm=True)`: other modules around the same parameters, from the strategy's setup to its end."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart_lightning import WarmStart

pytestmark = pytest.mark.filterwarnings("ignore")


class Shared(nn.BatchNorm1d):
    """What a SyncBatchNorm is without the GPUs that it insists on."""


class Sharing(TorchSyncBatchNorm):
    def apply(self, model):
        for path, norm in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)]:
            shared = Shared(norm.num_features)
            shared._parameters, shared._buffers, shared.training = (
                dict(norm._parameters),
                dict(norm._buffers),
                norm.training,
            )
            model.set_submodule(path, shared)
        return model

    def revert(self, model):
        for path, norm in [(p, m) for p, m in model.named_modules() if isinstance(m, Shared)]:
            own = nn.BatchNorm1d(norm.num_features)
            own._parameters, own._buffers, own.training = dict(norm._parameters), dict(norm._buffers), norm.training
            model.set_submodule(path, own)
        return model


class SharingNorms(SingleDeviceStrategy):
    """In the order of DDPStrategy, with `Trainer(sync_batchnorm=True)`: norms, cast, device, and back in the end."""

    def setup(self, trainer):
        Sharing().apply(self.model)
        for module in self.model.modules():  # as a move to a GPU does
            module._buffers = {leaf: buffer.clone() for leaf, buffer in module._buffers.items()}
        super().setup(trainer)

    def teardown(self):
        Sharing().revert(self.lightning_module)
        super().teardown()


class Normed(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        self.train()  # as some do
        assert type(self.encoder[1]) is Shared
        self.modes = [module.training for module in (self.encoder, self.encoder[1], self.encoder[2])]
        return self.head(self.encoder(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 4) * 3 + 1), batch_size=8)


@pytest.mark.parametrize("freeze", [True, ["encoder.1"], False], ids=["whole", "norm", "nothing"])
def test_norms_that_ranks_share_hold_what_was_loaded_and_stay_frozen(tmp_path, freeze):
    torch.manual_seed(7)
    encoder = Normed().encoder
    encoder(torch.randn(64, 4) * 3 + 1)
    torch.save(encoder.state_dict(), tmp_path / "source.pt")
    fit = lambda warm, module: Trainer(
        default_root_dir=tmp_path, accelerator="cpu", strategy=SharingNorms(device="cpu"), callbacks=[warm], max_epochs=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
    ).fit(module)  # fmt: skip

    module, warm = Normed(), WarmStart(tmp_path / "source.pt", into="encoder", freeze=freeze)
    for again in (warm, warm, WarmStart(tmp_path / "source.pt", into="encoder", freeze=freeze)):
        fit(again, module)
        assert module.modes == [freeze is not True, not freeze, freeze is not True]
        now, before = module.encoder.state_dict(), encoder.state_dict()
        assert torch.equal(now["0.weight"], before["0.weight"]) is (freeze is True)
        assert all(torch.equal(now[n], before[n]) for n in before if n[0] == "1") is bool(freeze)
        if freeze and again.report is not None:
            again.report.frozen.check()
