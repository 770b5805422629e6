"""A resumed run keeps its own weights, whatever names the checkpoint, and says where it came from all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart import CheckpointError, FrozenChangedError, VerificationError
from warmstart_lightning import WarmStart

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Module(LightningModule):
    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.every = every  # whether the optimizer holds the frozen as well
        self.encoder, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.head(self.encoder(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.encoder(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad or self.every], lr=0.1)

    def on_train_start(self) -> None:
        self.start = copy.deepcopy(self.encoder.state_dict())


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 4, generator=torch.Generator().manual_seed(1))), batch_size=8)


@pytest.fixture
def source(tmp_path):
    torch.save({"weight": torch.eye(4) * 7, "bias": torch.full((4,), 7.0)}, tmp_path / "source.pt")
    return tmp_path / "source.pt"


def trainer(tmp_path, *callbacks, **kwargs) -> Trainer:
    kwargs = {"max_epochs": 1, "logger": False, **kwargs}
    return Trainer(
        default_root_dir=tmp_path / "run", accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **kwargs,
    )  # fmt: skip


def saving(tmp_path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, filename="only")


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("gone", [False, True], ids=["source", "no source"])
@pytest.mark.parametrize("path", ["file", "last", "best", "hpc", "requeued"])
def test_field_note_3_the_checkpoint_wins_by_whatever_name(tmp_path, source, path, gone, monkeypatch):
    first, warm = Module(), WarmStart(source, into="encoder")
    run = trainer(tmp_path, warm, saving(tmp_path))
    run.fit(first, data())
    lineage = warm.report.lineage
    if gone:
        source.unlink()

    second, resumed = Module(), WarmStart(source, into="encoder")
    ckpt_path = {"file": str(tmp_path / "ckpt" / "only.ckpt"), "requeued": None}.get(path, path)
    if path == "best":  # known to the trainer that saved it alone
        resumed = warm
        run.fit_loop.max_epochs = 2
    else:
        run = trainer(tmp_path, resumed, saving(tmp_path), max_epochs=2)
    if path in ("hpc", "requeued"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "ckpt" / "only.ckpt").rename(tmp_path / "run" / "hpc_ckpt_1.ckpt")
    if path == "requeued":
        monkeypatch.setenv("SLURM_NTASKS", "1")
        monkeypatch.setenv("SLURM_JOB_NAME", "train")
    run.fit(second, data(), ckpt_path=ckpt_path)
    assert equal(second.start, first.encoder.state_dict())
    assert run.current_epoch == 2
    state = resumed.state_dict()
    assert state["status"] == "superseded-by-resume"
    assert state["lineage"] == lineage
    if not gone:
        assert "superseded" in resumed.report.verdict()
        assert "source.pt" in resumed.report.verdict()


def test_field_note_12_another_freeze_on_purpose_goes_on_where_the_optimizer_holds_everything(tmp_path, source):
    """`on_freeze_change="allow"`; without it the error comes before the optimizer's state is read."""
    run = trainer(tmp_path, WarmStart(source, into="encoder", freeze=True), saving(tmp_path))
    run.fit(Module(every=True), data())
    path = str(tmp_path / "ckpt" / "only.ckpt")
    with pytest.raises(FrozenChangedError, match="was frozen, trains now"):
        trainer(tmp_path, WarmStart(source, into="encoder"), max_epochs=2).fit(Module(), data(), ckpt_path=path)
    module, warm = Module(every=True), WarmStart(source, into="encoder", on_freeze_change="allow")
    trainer(tmp_path, warm, max_epochs=2).fit(module, data(), ckpt_path=path)
    assert torch.equal(module.start["weight"], torch.eye(4) * 7)
    assert not torch.equal(module.encoder.weight, module.start["weight"])


def test_a_run_that_began_without_a_warm_start_goes_on_with_its_own_weights(tmp_path, source):
    first = Module()
    trainer(tmp_path, saving(tmp_path)).fit(first, data())
    module, warm = Module(), WarmStart(source, into="encoder")
    trainer(tmp_path, warm, max_epochs=2).fit(module, data(), ckpt_path=str(tmp_path / "ckpt" / "only.ckpt"))
    assert equal(module.start, first.encoder.state_dict())
    assert warm.report.status == "superseded-by-resume"


@pytest.mark.parametrize("norm", [False, True])
def test_a_checkpoint_whose_every_key_is_spelled_otherwise_is_no_resume(tmp_path, source, norm):
    """With `strict_loading=False` Lightning passes it over; torch itself fills in a BatchNorm's counter in such a file."""

    def new():
        module = Module(every=True)
        module.strict_loading = False
        if norm:
            module.norm = nn.BatchNorm1d(2)
        return module

    trainer(tmp_path, saving(tmp_path)).fit(new(), data())
    path = tmp_path / "ckpt" / "only.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {f"model.{key}": value for key, value in saved["state_dict"].items()}
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"matches none of the \d+ entries of Module"):
        trainer(tmp_path, WarmStart(source, into="encoder"), max_epochs=2).fit(new(), data(), ckpt_path=str(path))


def test_load_from_checkpoint_needs_neither_the_callback_nor_the_source(tmp_path, source):
    module = Module()
    trainer(tmp_path, WarmStart(source, into="encoder", freeze=True), saving(tmp_path)).fit(module, data())
    source.unlink()
    loaded = Module.load_from_checkpoint(tmp_path / "ckpt" / "only.ckpt")
    assert equal(loaded.state_dict(), module.state_dict())
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_descendant_of_a_descendant_names_its_own_ancestor_and_theirs(tmp_path, source):
    """Fine-tuned from a run's checkpoint, the new run's lineage is that checkpoint, which holds the first lineage."""
    trainer(tmp_path, WarmStart(source, into="encoder"), saving(tmp_path)).fit(Module(), data())
    path = tmp_path / "ckpt" / "only.ckpt"
    warm = WarmStart(path)
    trainer(tmp_path, warm).fit(Module(), data())
    (own,) = warm.report.lineage["sources"]
    assert own["location"] == str(path)
    (saved,) = [s for s in torch.load(path, weights_only=True)["callbacks"].values() if "lineage" in s]
    assert saved["lineage"]["sources"][0]["location"] == str(source)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_that_is_asked_for_loads_and_the_fit_after_it_goes_on_from_there(tmp_path, source, stage):
    module, warm = Module(), WarmStart(source, into="encoder", freeze=True, stages=("fit", stage))
    run = trainer(tmp_path, warm, enable_checkpointing=False)
    getattr(run, stage)(module, data())
    assert torch.equal(module.encoder.weight, torch.eye(4) * 7)
    assert warm.report.status == "applied"
    run.fit(module, data())
    assert torch.equal(module.start["weight"], torch.eye(4) * 7)
    assert warm.report.status == "applied"
    assert not module.encoder.weight.requires_grad


def test_a_stage_after_the_fit_scores_what_was_trained(tmp_path, source):
    module, warm = Module(), WarmStart(source, into="encoder", stages=("fit", "validate"))
    run = trainer(tmp_path, warm, enable_checkpointing=False)
    run.fit(module, data())
    trained = copy.deepcopy(module.encoder.state_dict())
    run.validate(module, data(), verbose=False)
    assert equal(module.encoder.state_dict(), trained)


def test_a_stage_with_a_checkpoint_of_its_own_scores_that(tmp_path, source):
    first = Module()
    trainer(tmp_path, saving(tmp_path)).fit(first, data())
    module, warm = Module(), WarmStart(source, into="encoder", stages=("fit", "validate"))
    run = trainer(tmp_path, warm, enable_checkpointing=False)
    run.validate(module, data(), ckpt_path=str(tmp_path / "ckpt" / "only.ckpt"), verbose=False)
    assert equal(module.encoder.state_dict(), first.encoder.state_dict())
    assert warm.report.status == "superseded-by-resume"


class Tuned(Module):
    lr, batch_size = 0.1, 2

    def train_dataloader(self):
        return DataLoader(data().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("gone", [False, True], ids=["source", "no source"])
@pytest.mark.parametrize(
    "finder",
    [LearningRateFinder(num_training_steps=4, update_attr=False), BatchSizeFinder(max_trials=1, steps_per_trial=1)],
    ids=["learning rate", "batch size"],
)
def test_a_tuner_s_own_checkpoint_does_not_hide_the_one_that_was_resumed(tmp_path, source, finder, gone):
    """It takes its trial run back by a checkpoint, whose path the trainer then shows in the place of the other's."""
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.eye(4) * 5, "bias": torch.full((4,), 5.0)}, other)
    first, warm = Tuned(), WarmStart(other, into="encoder", freeze=["encoder.bias"])
    trainer(tmp_path, warm, saving(tmp_path)).fit(first)
    ancestor = warm.report.lineage
    if gone:
        source.unlink()

    second, resumed = Tuned(), WarmStart(source, into="encoder", freeze=["encoder.bias"])
    trainer(tmp_path, resumed, finder, max_epochs=2).fit(second, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert equal(second.start, first.encoder.state_dict())
    assert resumed.state_dict()["status"] == "superseded-by-resume"
    assert resumed.state_dict()["lineage"] == ancestor

    if not gone:  # and none was resumed where it shows its own alone
        fresh, anew = Tuned(), WarmStart(source, into="encoder")
        trainer(tmp_path, anew, finder).fit(fresh)
        assert anew.report.status == "applied"


class Reinitialise(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, module, *args: module.encoder.reset_parameters())


@pytest.mark.parametrize("gone", [False, True], ids=["source", "no source"])
@pytest.mark.parametrize(
    ("hook", "when"),
    [
        ("on_fit_start", "when training starts"),
        ("on_train_start", "before the first training batch"),
        ("on_train_batch_start", "before the first training batch"),
    ],
)
def test_field_note_10_what_was_resumed_is_not_to_be_overwritten_either(tmp_path, source, hook, when, gone):
    trainer(tmp_path, WarmStart(source, into="encoder"), saving(tmp_path)).fit(Module(), data())
    if gone:
        source.unlink()
    warm = WarmStart(source, into="encoder")
    with pytest.raises(VerificationError, match=rf"2 tensors do not hold what the resumed checkpoint gave them {when}"):
        trainer(tmp_path, warm, Reinitialise(hook), max_epochs=2).fit(
            Module(), data(), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
        )
    trainer(tmp_path, WarmStart(source, into="encoder", verify="off"), Reinitialise(hook), max_epochs=2).fit(
        Module(), data(), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
    )


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_a_resumed_run_that_casts_the_model_raises_no_false_alarm(tmp_path, source, precision):
    class Cast(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].to(self.head.weight.dtype)], batch_idx)

    trainer(tmp_path, WarmStart(source, into="encoder"), saving(tmp_path), precision=precision).fit(Cast(), data())
    warm, path = WarmStart(source, into="encoder"), tmp_path / "ckpt" / "last.ckpt"
    trainer(tmp_path, warm, precision=precision, max_epochs=2).fit(Cast(), data(), ckpt_path=path)
    assert warm.report.status == "superseded-by-resume"
