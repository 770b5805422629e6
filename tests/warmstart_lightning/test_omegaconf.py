"""The callback from Hydra: what arrives are DictConfig and ListConfig, what is kept are plain types."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart_lightning import WarmStart

omegaconf = pytest.importorskip("omegaconf")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.encoder(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def config(path):
    return omegaconf.OmegaConf.create(
        {
            "_target_": "warmstart_lightning.WarmStart",
            "pretrained": str(path),
            "into": "encoder",
            "rename": [{"first": "0"}, {"second": "1"}],
            "allow_unexpected": ["extra"],
            "freeze": ["encoder"],
            "unfreeze": {1: ["encoder.1"]},
            "stages": ["fit", "validate"],
        }
    )


def instantiated(path) -> WarmStart:
    fields = config(path)
    target = fields.pop("_target_")
    assert target == "warmstart_lightning.WarmStart"
    return WarmStart(**fields)


def test_a_dictconfig_trains_pickles_and_leaves_a_checkpoint_of_plain_types(tmp_path):
    layers = {"first.weight": torch.eye(3), "first.bias": torch.ones(3)}
    layers |= {"second.weight": torch.eye(3), "second.bias": torch.ones(3), "extra": torch.ones(1)}
    torch.save(layers, tmp_path / "source.pt")
    callback, module = instantiated(tmp_path / "source.pt"), Module()
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert twin.state_key == callback.state_key
        assert twin.pretrained[0].rename == callback.pretrained[0].rename
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, saving],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2))
    assert torch.equal(module.encoder[0].weight, torch.eye(3))
    assert not torch.equal(module.encoder[1].weight, torch.eye(3))
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state["released"] == ["encoder.1.bias", "encoder.1.weight"]
    kept = [callback.pretrained[0].rename, callback.pretrained[0].freeze, callback._life.told.schedule.stages]
    assert not any(type(part).__module__.startswith("omegaconf") for part in kept)


def test_sources_with_rules_of_their_own_are_dicts_of_their_fields():
    """As LightningCLI takes them, and with the same word for a typo."""
    one = {"source": "a.pt", "into": "encoder", "rename": {"first": "0"}}
    for written in (one, [one, "b.pt"]):
        first, *rest = WarmStart(omegaconf.OmegaConf.create({"pretrained": written}).pretrained).pretrained
        assert (first.source, first.into, first.rename) == ("a.pt", "encoder", {"first": "0"})
        assert [part.source for part in rest] == ["b.pt"] * (written is not one)
    with pytest.raises(TypeError, match=r"unknown field itno; the fields are adapt, .* into,"):
        WarmStart({"source": "a.pt", "itno": "encoder"})
    with pytest.raises(TypeError, match="cannot be given beside a Pretrained"):
        WarmStart(one, freeze=True)


def test_hydra_makes_it(tmp_path):
    hydra = pytest.importorskip("hydra.utils")
    torch.save({}, tmp_path / "source.pt")
    callback = hydra.instantiate(config(tmp_path / "source.pt"))
    assert isinstance(callback, WarmStart)
    assert callback._life.told.schedule.stages == {1: ["encoder.1"]}
