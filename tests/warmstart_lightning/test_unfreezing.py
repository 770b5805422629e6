"""Staged unfreezing in real Trainers: in the optimizer from the start, released on time, the same after a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, ModelSummary
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart import FrozenChangedError, MappingError, TimingError
from warmstart_lightning import WarmStart

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SCHEDULE = {1: "encoder.3", 2: ["encoder.0", "encoder.1"]}


def make_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = make_encoder(), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x)), y)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


EVERY = {name for name, _ in Module().named_parameters()}


class Watch(Callback):
    """What trains, what moved, and what the optimizer holds, at each step."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.trainable: list[set[str]] = []
        self.ends: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        ids = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.held = {n for n, p in pl_module.named_parameters() if id(p) in ids}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trainable.append({n for n, p in pl_module.named_parameters() if p.requires_grad})

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(copy.deepcopy(pl_module.encoder.state_dict()))


def data() -> DataLoader:
    """The same batch four times: a plain DataLoader begins anew where a run resumes amid an epoch."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(7)
    encoder = make_encoder()
    encoder(torch.randn(64, 4) * 3 + 1)
    torch.save(encoder.state_dict(), tmp_path / "source.pt")
    return tmp_path / "source.pt"


def trainer(tmp_path, *callbacks, **kwargs) -> Trainer:
    kwargs = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, **kwargs}
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **kwargs,
    )  # fmt: skip


def warm(source, **kwargs) -> WarmStart:
    return WarmStart(source, into="encoder", freeze=True, **{"unfreeze": SCHEDULE, **kwargs})


def starting(*prefixes: str) -> set[str]:
    return {n for n in EVERY if n.startswith(("head", *prefixes))}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_by_epoch(tmp_path, source):
    watch, callback = Watch(), warm(source)
    trainer(tmp_path, callback, watch).fit(Module(), data())
    assert watch.held == EVERY  # from the start, so that groups and schedulers never change shape
    assert watch.trainable == [starting()] * 4 + [starting("encoder.3")] * 4 + [EVERY] * 4
    pretrained = torch.load(source, weights_only=True)
    assert equal(watch.ends[0], pretrained)
    assert all(torch.equal(watch.ends[1][n], pretrained[n]) for n in pretrained if not n.startswith("3"))
    assert not torch.equal(watch.ends[1]["3.weight"], pretrained["3.weight"])
    assert not torch.equal(watch.ends[2]["0.weight"], pretrained["0.weight"])
    assert not torch.equal(watch.ends[2]["1.running_mean"], pretrained["1.running_mean"])  # its hold ended too
    assert callback.state_dict()["released"] == callback.state_dict()["frozen"]


def test_by_step_of_the_optimizer(tmp_path, source):
    watch = Watch()
    callback = warm(source, unfreeze={2: "encoder.3"}, unfreeze_unit="step")
    trainer(tmp_path, callback, watch, max_epochs=2, accumulate_grad_batches=2).fit(Module(), data())
    assert watch.trainable == [starting()] * 4 + [starting("encoder.3")] * 4


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 11])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_field_note_12_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, source, steps, unit):
    schedule = SCHEDULE if unit == "epoch" else {3: "encoder.3", 7: ["encoder.0", "encoder.1"]}

    def run(**kwargs):
        module, watch = Module(), Watch()
        saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callback = warm(source, unfreeze=schedule, unfreeze_unit=unit)
        trainer(tmp_path, callback, watch, saving, enable_checkpointing=True).fit(module, data(), **kwargs)
        return module, watch

    whole, watched = run()
    resumed, watched_again = run(ckpt_path=tmp_path / "ckpt" / f"step={steps}.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())
    assert watched_again.trainable == watched.trainable[steps:]
    assert watched_again.held == EVERY


def test_another_schedule_on_resume_is_told_before_the_optimizer_state_is_read(tmp_path, source):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, warm(source), saving, max_epochs=1, enable_checkpointing=True).fit(Module(), data())
    path = tmp_path / "ckpt" / "last.ckpt"
    with pytest.raises(FrozenChangedError, match=r"was to release 9 frozen tensors, this one 0(.|\n)*give unfreeze="):
        trainer(tmp_path, warm(source, unfreeze=None)).fit(Module(), data(), ckpt_path=path)


def test_a_second_fit_goes_on_with_the_schedule_of_its_own_epochs(tmp_path, source):
    callback, module, watch = warm(source), Module(), Watch()
    trainer(tmp_path, callback, max_epochs=1).fit(module, data())
    trainer(tmp_path, callback, watch, max_epochs=2).fit(module, data())
    assert watch.trainable == [starting()] * 4 + [starting("encoder.3")] * 4


def test_a_learning_rate_finder_s_steps_release_nothing(tmp_path, source):
    watch, module = Watch(), Module()
    module.lr = 0.01
    callback = warm(source, unfreeze={1: "encoder"}, unfreeze_unit="step")
    finder = LearningRateFinder(num_training_steps=4)
    trainer(tmp_path, callback, finder, watch, max_epochs=1).fit(module, data())
    assert watch.trainable == [starting()] + [EVERY] * 3


def test_the_model_summary_shows_the_freeze(tmp_path, source):
    class Summary(ModelSummary):
        trainable: int

        def summarize(self, summary_data, total_parameters, trainable_parameters, *args, **kwargs):
            Summary.trainable = trainable_parameters

    trainer(tmp_path, warm(source), Summary(), max_epochs=1).fit(Module(), data())
    assert Summary.trainable == 8 * 2 + 2  # the head's


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"unfreeze": {0: "encoder"}}, "a whole number from 1 on"),
        ({"unfreeze": {1: "encodr"}}, r"unfreeze='encodr' matches nothing that freeze= freezes"),
        ({"unfreeze_unit": "minute"}, "unfreeze_unit='minute': one of 'epoch', 'step'"),
        ({"stages": "validate"}, 'stages=.*: "fit", and any of'),
        ({"stages": ("fit", "sanity")}, 'stages=.*: "fit", and any of'),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, source, fingerprint, fields, match):
    module = Module()
    before = fingerprint(module)
    with pytest.raises(MappingError, match=match):
        trainer(tmp_path, warm(source, **fields)).fit(module, data())
    assert fingerprint(module) == before


def test_numbers_that_yaml_made_strings_are_numbers(source):
    assert warm(source, unfreeze={"2": ["a"]})._life.told.schedule.stages == {2: ["a"]}


class TwoOptimizers(Module):
    """One for what is released later, one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.encoder, self.head)]


def test_an_optimizer_of_its_own_for_what_is_released_later_is_no_alarm(tmp_path, source):
    module, before = TwoOptimizers(), torch.load(source, weights_only=True)
    trainer(tmp_path, WarmStart(source, into="encoder", freeze=True, unfreeze={1: "encoder"})).fit(module, data())
    assert not torch.equal(module.encoder[0].weight, before["0.weight"])
    with pytest.raises(TimingError, match="SGD holds none of the model's 2 trainable parameters"):
        trainer(tmp_path, WarmStart(source, into="encoder", freeze=True)).fit(TwoOptimizers(), data())
