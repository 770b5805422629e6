"""A model that is fitted again: after a try that failed, or under another freeze."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart import CheckpointError, MappingError, VerificationError
from warmstart_lightning import WarmStart

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def make_backbone() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))


class Module(LightningModule):
    started: dict[str, torch.Tensor]
    typo = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = make_backbone(), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        if self.typo:
            raise AttributeError("a typo")
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)

    def on_train_start(self) -> None:
        self.started = copy.deepcopy(self.backbone.state_dict())


class Reinitialise(Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.backbone[0].reset_parameters()


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(7)
    backbone = make_backbone()
    backbone(torch.randn(64, 4) * 3 + 1)
    torch.save(backbone.state_dict(), tmp_path / "source.pt")
    return tmp_path / "source.pt"


def fit(module: Module, *callbacks: Callback, epochs: int = 1) -> None:
    Trainer(
        accelerator="cpu", callbacks=list(callbacks), max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("same", [True, False], ids=["same callback", "new callback"])
@pytest.mark.parametrize("unfreeze", [{}, {1: "backbone"}], ids=["frozen", "staged"])
def test_a_try_that_was_stopped_because_of_its_values_is_loaded_anew(source, same, unfreeze):
    module, warm = Module(), WarmStart(source, into="backbone", freeze=True, unfreeze=unfreeze)
    with pytest.raises(VerificationError, match=r"backbone\.0"):
        fit(module, warm, Reinitialise())
    warm = warm if same else WarmStart(source, into="backbone", freeze=True, unfreeze=unfreeze)
    fit(module, warm, epochs=2)
    assert equal(module.started, torch.load(source, weights_only=True))
    assert warm.report.status == "applied"
    moved = not torch.equal(module.backbone[0].weight, module.started["0.weight"])
    assert moved is bool(unfreeze)


def test_a_try_that_never_came_to_train_does_not_count(source):
    module = Module()
    module.typo = True
    with pytest.raises(AttributeError, match="a typo"):
        fit(module, WarmStart(source, into="backbone"))
    module.typo = False
    module.backbone[0].reset_parameters()  # to begin anew, in a notebook
    fit(module, WarmStart(source, into="backbone"))
    assert equal(module.started, torch.load(source, weights_only=True))


def test_what_a_first_run_froze_trains_in_a_second_that_freezes_nothing(source, caplog):
    module = Module()
    fit(module, WarmStart(source, into="backbone", freeze=True))
    assert not module.backbone.training
    source.unlink()  # there is nothing to take from it any more
    caplog.clear()
    caplog.set_level(logging.INFO, "lightning.pytorch")  # a script that another test imports makes it quieter
    fit(module, WarmStart(source, into="backbone"))
    assert "an earlier run has loaded this model; it goes on from what it was trained to" in caplog.text
    assert module.backbone.training
    assert module.backbone[1].training
    assert not torch.equal(module.backbone[0].weight, module.started["0.weight"])
    assert not torch.equal(module.backbone[1].running_mean, module.started["1.running_mean"])


def test_what_a_first_run_trained_is_frozen_as_it_is_by_a_second(source):
    module = Module()
    fit(module, WarmStart(source, into="backbone"))
    trained = copy.deepcopy(module.backbone.state_dict())
    second = WarmStart(source, into="backbone", freeze=True)
    fit(module, second)
    assert equal(module.backbone.state_dict(), trained)
    assert set(second.state_dict()["frozen"]) == {f"backbone.{name}" for name in trained}
    fit(module, WarmStart(source, into="backbone", freeze=["backbone.0"], unfreeze={1: "backbone.0"}), epochs=2)
    assert not torch.equal(module.backbone[0].weight, trained["0.weight"])
    assert not torch.equal(module.backbone[3].weight, trained["3.weight"])


def test_another_freeze_is_planned_as_the_first_was(source):
    module = Module()
    fit(module, WarmStart(source, into="backbone"))
    with pytest.raises(MappingError, match="matches no model entry"):
        fit(module, WarmStart(source, into="backbone", freeze=["backbon"]))
    source.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        fit(module, WarmStart(source, into="backbone", freeze=True))
