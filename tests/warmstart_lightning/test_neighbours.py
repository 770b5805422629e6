"""Beside callbacks that average, finetune, prune and tune: values over two epochs and a resume, or a typed error at setup."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart import FrozenChangedError, TimingError
from warmstart_lightning import WarmStart

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def make_backbone() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))


class Module(LightningModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr, self.batch_size = 0.1, batch_size
        self.backbone, self.head = make_backbone(), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.1)

    def train_dataloader(self):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=self.batch_size)


class InSetup(Module):
    def setup(self, stage: str) -> None:
        pass


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(7)
    backbone = make_backbone()
    backbone(torch.randn(64, 4) * 3 + 1)
    torch.save(backbone.state_dict(), tmp_path / "source.pt")
    return tmp_path / "source.pt"


def pretrained(source) -> dict[str, torch.Tensor]:
    return torch.load(source, weights_only=True)


def loaded_by_hand(source) -> Module:
    module = Module()
    module.backbone.load_state_dict(pretrained(source))
    return module


def trainer(tmp_path, *callbacks: Callback, **kwargs) -> Trainer:
    kwargs = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **kwargs}
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **kwargs,
    )  # fmt: skip


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class AtStart(Callback):
    state: dict[str, torch.Tensor]

    def on_train_start(self, trainer, pl_module):
        AtStart.state = copy.deepcopy(pl_module.state_dict())


def finetunings():
    def scheduler():
        fts = pytest.importorskip("finetuning_scheduler")
        return fts.FinetuningScheduler(gen_ft_sched_only=False)

    backbone = lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0, verbose=False)
    return [pytest.param(backbone, id="BackboneFinetuning"), pytest.param(scheduler, id="FinetuningScheduler")]


@pytest.mark.parametrize("make", finetunings())
def test_field_note_35_a_finetuning_callback_that_is_told_to_freeze_as_well_is_refused(tmp_path, source, make):
    module, other = Module(), make()
    with pytest.raises(TimingError, match=rf"{type(other).__name__} freezes and unfreezes by itself(.|\n)*unfreeze="):
        trainer(tmp_path, WarmStart(source, into="backbone", freeze=True), other).fit(module)


@pytest.mark.parametrize("resume", [False, True])
def test_field_note_35_backbone_finetuning_gets_what_was_loaded_and_is_left_to_itself(tmp_path, source, resume):
    """Value by value the same run as one whose module loaded by hand, over two epochs and resumed after the first."""
    runs = []
    for name, module, own in (
        ("warm", Module(), [WarmStart(source, into="backbone")]),
        ("by hand", loaded_by_hand(source), []),
    ):
        make = lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
        saving = ModelCheckpoint(dirpath=tmp_path / name, save_last=True)
        if resume:
            trainer(tmp_path, *own, make(), saving, max_epochs=1, enable_checkpointing=True).fit(copy.deepcopy(module))
            trainer(tmp_path, *own, make()).fit(module, ckpt_path=tmp_path / name / "last.ckpt")
        else:
            trainer(tmp_path, *own, make()).fit(module)
        runs.append(module.state_dict())
    assert equal(*runs)
    assert not torch.equal(runs[0]["backbone.0.weight"], pretrained(source)["0.weight"])


@pytest.mark.parametrize(
    "averaging",
    [
        EMAWeightAveraging(decay=0.9),
        EMAWeightAveraging(decay=0.9, use_buffers=False),
        WeightAveraging(avg_fn=lambda average, value, count: average * 0.7 + value * 0.3),
    ],
    ids=["ema", "ema of parameters", "own"],
)
def test_an_average_starts_from_what_was_loaded_and_what_it_rounds_of_the_frozen_is_a_note(tmp_path, source, averaging):
    module, callback = Module(), WarmStart(source, into="backbone", freeze=True)
    trainer(tmp_path, callback, averaging).fit(module)
    before, after = pretrained(source), module.backbone.state_dict()
    distance = {n: float((after[n].double() - before[n].double()).abs().max()) for n in before}
    worst = max(distance, key=lambda n: distance[n])
    assert distance.pop("1.num_batches_tracked") <= 1  # an integer is cut
    assert all(d < 1e-6 for d in distance.values())
    (note,) = [note for note in callback.report.notes if "rounded" in note]
    moved = sum(not torch.equal(before[n], after[n]) for n in before)
    assert note.startswith(f"{type(averaging).__name__} rounded {moved} frozen tensors in its average")
    assert note.endswith(f"of backbone.{worst}")


def test_statistics_that_swa_resets_are_an_error_before_training(tmp_path, source):
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    with pytest.raises(FrozenChangedError, match=r"StochasticWeightAveraging resets the statistics") as caught:
        trainer(tmp_path, WarmStart(source, into="backbone", freeze=True), averaging).fit(Module())
    assert set(caught.value.tensors) == {
        f"backbone.1.{leaf}" for leaf in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_swa_averages_beside_a_freeze_without_statistics(tmp_path, source):
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    callback, module = WarmStart(source, into="backbone", freeze=["backbone.0", "backbone.3"]), Module()
    trainer(tmp_path, callback, averaging, max_epochs=3).fit(module)
    before = pretrained(source)
    for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
        assert torch.equal(module.backbone.state_dict()[name], before[name])
    assert not torch.equal(module.backbone[1].weight, before["1.weight"])


def pruning(*layers: nn.Module, **kwargs) -> ModelPruning:
    return ModelPruning(
        "l1_unstructured", parameters_to_prune=[(layer, "weight") for layer in layers], amount=0.5, **kwargs
    )


def test_pruning_goes_back_to_the_pretrained_values(tmp_path, source):
    """Its lottery tickets are a copy of the model at setup: of what was loaded, if we stand first."""
    module, before = Module(), pretrained(source)
    trainer(tmp_path, WarmStart(source, into="backbone"), pruning(module.backbone[0]), max_epochs=1).fit(module)
    kept = module.backbone[0].weight != 0
    assert int(kept.sum()) == 16
    assert torch.equal(module.backbone[0].weight[kept], before["0.weight"][kept])
    assert not torch.equal(module.backbone[3].weight, before["3.weight"])


def test_pruning_in_the_wrong_place_or_of_what_is_frozen_is_refused(tmp_path, source):
    module = Module()
    with pytest.raises(
        TimingError, match="ModelPruning stands before WarmStart and puts back, as its lottery tickets,"
    ):
        trainer(tmp_path, pruning(module.backbone[0]), WarmStart(source, into="backbone")).fit(module)
    module = InSetup()
    with pytest.raises(
        TimingError, match=r"before InSetup\.setup has run, .* make the layers in __init__ instead of setup"
    ):
        trainer(tmp_path, WarmStart(source, into="backbone"), pruning(module.backbone[0])).fit(module)
    module, warm = Module(), WarmStart(source, into="backbone", freeze=True)
    with pytest.raises(FrozenChangedError, match=r"ModelPruning would prune 1 frozen parameters: backbone\.0\.weight"):
        trainer(tmp_path, warm, pruning(module.backbone[0], module.head)).fit(module)


def test_pruning_of_a_new_head_leaves_the_frozen_alone(tmp_path, source):
    module = Module()
    warm = WarmStart(source, into="backbone", freeze=True)
    trainer(tmp_path, warm, pruning(module.head, use_lottery_ticket_hypothesis=False)).fit(module)
    assert equal(module.backbone.state_dict(), pretrained(source))
    assert int((module.head.weight == 0).sum()) >= 8


def test_the_tuner_puts_its_own_state_back_and_the_fit_after_it_starts_from_what_was_loaded(tmp_path, source):
    module, warm = Module(batch_size=2), WarmStart(source, into="backbone", freeze=True)
    run = trainer(tmp_path, warm, AtStart(), max_epochs=1)
    Tuner(run).lr_find(module, num_training=5)
    Tuner(run).scale_batch_size(module, max_trials=2, steps_per_trial=2)
    assert module.batch_size > 2
    run.fit(module)
    assert equal(
        {k.removeprefix("backbone."): v for k, v in AtStart.state.items() if k.startswith("b")}, pretrained(source)
    )
    assert equal(module.backbone.state_dict(), pretrained(source))
    assert warm.report.status == "applied"


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "submodule"])
def test_compiled_before_fit(tmp_path, source, whole, freeze):
    module = Module()
    if not whole:
        module.backbone = torch.compile(module.backbone, backend="eager")
    warm = WarmStart(source, into="backbone", freeze=freeze)
    trainer(tmp_path, warm, AtStart(), max_epochs=1).fit(torch.compile(module, backend="eager") if whole else module)
    start = {k.removeprefix("backbone.").removeprefix("_orig_mod."): v for k, v in AtStart.state.items() if k[0] == "b"}
    assert equal(start, pretrained(source))
    moved = not torch.equal(
        module.backbone.state_dict()["0.weight" if whole else "_orig_mod.0.weight"], start["0.weight"]
    )
    assert moved is not freeze


@pytest.mark.parametrize("options", [{"overfit_batches": 1}, {"enable_checkpointing": False}, {"fast_dev_run": True}])
def test_options_that_shorten_a_run(tmp_path, source, options):
    trainer(tmp_path, WarmStart(source, into="backbone"), AtStart(), **options).fit(Module())
    assert torch.equal(AtStart.state["backbone.0.weight"], pretrained(source)["0.weight"])


def test_made_without_memory_of_its_own(tmp_path, source):
    """`init_module(empty_init=True)` leaves parameters as the memory was; the load gives every one of them its value."""
    run = trainer(tmp_path, WarmStart(source, into="backbone"), AtStart(), max_epochs=1)
    with run.init_module(empty_init=True):
        module = Module()
    nn.init.zeros_(module.head.weight)
    nn.init.zeros_(module.head.bias)
    run.fit(module)
    assert torch.equal(AtStart.state["backbone.3.weight"], pretrained(source)["3.weight"])
