"""WarmStart in real Trainers: the right moment, once, resume wins, frozen stays frozen."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import warmstart
from warmstart import (
    CheckpointError,
    FrozenChangedError,
    MappingError,
    Pretrained,
    TimingError,
    VerificationError,
)
from warmstart_lightning import WarmStart

# Lightning advises about workers, loggers and short epochs; none of it is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PLACES = ("init", "setup", "configure_model")


def make_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))


class Module(LightningModule):
    """An encoder built in one of three places, and a head; remembers what its hooks saw."""

    def __init__(self, place: str = "init", lr: float = 0.1) -> None:
        super().__init__()
        self.place, self.lr = place, lr
        self.seen: dict[str, object] = {}
        if place == "init":
            self.build()
        self.head = nn.Linear(8, 2)

    def build(self) -> None:
        self.encoder = make_encoder()

    def setup(self, stage: str) -> None:
        if self.place == "setup" and not hasattr(self, "encoder"):
            self.build()

    def configure_model(self) -> None:
        if self.place == "configure_model" and not hasattr(self, "encoder"):
            self.build()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x)), y)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    test_step = validation_step

    def configure_optimizers(self):
        self.seen["trainable"] = {n for n, p in self.named_parameters() if p.requires_grad}
        self.seen["at_optimizer"] = copy.deepcopy(self.encoder.state_dict())
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.1)

    def on_train_start(self) -> None:
        self.seen["at_train_start"] = copy.deepcopy(self.encoder.state_dict())


class InitOnly(LightningModule):
    """Overrides neither `setup` nor `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = make_encoder(), nn.Linear(8, 2)

    training_step = Module.training_step
    configure_optimizers = Module.configure_optimizers
    on_train_start = Module.on_train_start
    seen: dict[str, object]
    lr = 0.1

    def setup_seen(self) -> InitOnly:
        self.seen = {}
        return self


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    encoder = make_encoder()
    encoder(torch.randn(64, 4) * 3 + 1)  # statistics that no fresh BatchNorm has
    path = tmp_path / "pretrained.pt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in encoder.state_dict().items()}}, path)
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    tree = torch.load(path, weights_only=True)["state_dict"]
    return {key.removeprefix("model."): value for key, value in tree.items()}


def trainer(tmp_path: Path, *callbacks: Callback, **kwargs) -> Trainer:
    kwargs = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **kwargs}
    return Trainer(
        default_root_dir=tmp_path / "run", accelerator="cpu", devices=1, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("place", PLACES)
def test_field_note_4_layers_load_wherever_they_are_made(tmp_path, source, place):
    callback, module = WarmStart(source, into="encoder", freeze=True), Module(place)
    trainer(tmp_path, callback).fit(module, data())
    expected = weights(source)
    assert equal(module.seen["at_optimizer"], expected)
    assert equal(module.seen["at_train_start"], expected)
    assert module.seen["trainable"] == {"head.weight", "head.bias"}
    # field note 11: neither parameters nor statistics moved in two epochs with weight decay
    assert equal(module.encoder.state_dict(), expected)
    assert callback.report.status == "applied"
    assert callback.report.coverage == 1


def test_layers_made_in_init_alone(tmp_path, source):
    module = InitOnly().setup_seen()
    trainer(tmp_path, WarmStart(source, into="encoder", freeze=True)).fit(module, data())
    assert equal(module.seen["at_train_start"], weights(source))


def test_layers_mixed_over_two_places(tmp_path, source):
    class Mixed(Module):
        def build(self) -> None:
            self.encoder = make_encoder()[:2]

        def configure_model(self) -> None:
            if len(self.encoder) == 2:
                self.encoder = nn.Sequential(*self.encoder, *make_encoder()[2:])

    module = Mixed("init")
    trainer(tmp_path, WarmStart(source, into="encoder")).fit(module, data())
    assert equal(module.seen["at_train_start"], weights(source))


def test_without_freeze_the_loaded_weights_train(tmp_path, source):
    module = Module()
    trainer(tmp_path, WarmStart(source, into="encoder")).fit(module, data())
    assert equal(module.seen["at_train_start"], weights(source))
    assert not torch.equal(module.encoder[0].weight, weights(source)["0.weight"])


def test_frozen_part_s_training_output_equals_its_eval_output(tmp_path, source):
    """field_note_11: normalises by its statistics and drops nothing out, whatever train() is called."""

    class Probe(Callback):
        outputs: tuple[torch.Tensor, torch.Tensor]

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.train()
            assert pl_module.head.training
            before = pl_module.encoder(batch[0])
            reference = make_encoder().eval()
            reference.load_state_dict(weights(source))
            Probe.outputs = (before, reference(batch[0]))

    trainer(tmp_path, WarmStart(source, into="encoder", freeze=True), Probe()).fit(Module(), data())
    assert torch.equal(*Probe.outputs)


@pytest.mark.parametrize("place", PLACES)
def test_field_note_3_a_resumed_run_keeps_its_own_weights(tmp_path, source, place):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    first = Module(place)
    trainer(tmp_path, WarmStart(source, into="encoder"), saving, max_epochs=1, enable_checkpointing=True).fit(
        first, data()
    )
    trained = copy.deepcopy(first.encoder.state_dict())

    callback, second = WarmStart(source, into="encoder"), Module(place)
    trainer(tmp_path, callback).fit(second, data(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert equal(second.seen["at_train_start"], trained)
    assert callback.report.status == "superseded-by-resume"
    assert "superseded" in callback.report.verdict()
    assert not equal(trained, weights(source))


@pytest.mark.parametrize("freeze", [True, ["encoder"], False])
def test_field_note_43_resume_without_the_pretrained_file(tmp_path, source, freeze):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    first, before = Module(), WarmStart(source, into="encoder", freeze=freeze)
    trainer(tmp_path, before, saving, max_epochs=1, enable_checkpointing=True).fit(first, data())
    lineage = before.state_dict()["lineage"]
    source.unlink()

    callback, second = WarmStart(source, into="encoder", freeze=freeze), Module()
    trainer(tmp_path, callback).fit(second, data(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    trainable = {"head.weight", "head.bias"} if freeze else {n for n, _ in second.named_parameters()}
    assert second.seen["trainable"] == trainable
    assert callback.state_dict()["lineage"] == lineage
    if freeze:
        assert equal(second.encoder.state_dict(), first.encoder.state_dict())

    with pytest.raises(CheckpointError, match=r"pretrained\.pt"):
        trainer(tmp_path, WarmStart(source, into="encoder", freeze=freeze)).fit(Module(), data())


def test_a_resumed_checkpoint_that_lacks_what_only_the_source_has(tmp_path, source):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    run = trainer(tmp_path, WarmStart(source, into="encoder"), saving, max_epochs=1, enable_checkpointing=True)
    run.fit(Module(), data())
    path, expected = tmp_path / "ckpt" / "last.ckpt", weights(source)
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if not k.startswith("encoder")}
    torch.save(saved, path)

    module = Module()
    module.strict_loading = False
    callback = WarmStart(source, into="encoder")
    trainer(tmp_path, callback).fit(module, data(), ckpt_path=path)  # the source gives what the checkpoint lacks
    assert equal(module.seen["at_train_start"], expected)
    assert callback.report.status == "applied"

    source.unlink()
    module = Module()
    module.strict_loading = False
    with pytest.raises(CheckpointError, match=r"no such file(.|\n)*it lacks 8 of the model's entries"):
        trainer(tmp_path, WarmStart(source, into="encoder")).fit(module, data(), ckpt_path=path)


def test_field_note_12_another_freeze_set_on_resume_is_an_error_in_words(tmp_path, source):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    run = trainer(
        tmp_path, WarmStart(source, into="encoder", freeze=True), saving, max_epochs=1, enable_checkpointing=True
    )
    run.fit(Module(), data())
    path = tmp_path / "ckpt" / "last.ckpt"
    with pytest.raises(FrozenChangedError, match=r"was frozen, trains now(.|\n)*on_freeze_change"):
        trainer(tmp_path, WarmStart(source, into="encoder")).fit(Module(), data(), ckpt_path=path)


def test_field_note_9_validate_alone_and_after_fit_never_load(tmp_path, source):
    callback, module = WarmStart(source, into="encoder"), Module()
    fresh = copy.deepcopy(module.encoder.state_dict())
    run = trainer(tmp_path, callback)
    run.validate(module, data(), verbose=False)
    assert torch.equal(module.encoder[0].weight, fresh["0.weight"])
    assert callback.report is None

    run.fit(module, data())
    trained = copy.deepcopy(module.encoder.state_dict())
    run.validate(module, data(), verbose=False)
    run.test(module, data(), verbose=False)
    assert torch.equal(module.encoder[0].weight, trained["0.weight"])


def test_field_note_9_a_second_fit_goes_on_from_the_trained_weights(tmp_path, source):
    callback, module = WarmStart(source, into="encoder"), Module()
    trainer(tmp_path, callback).fit(module, data())
    trained = copy.deepcopy(module.encoder.state_dict())
    trainer(tmp_path, callback).fit(module, data())
    assert equal(module.seen["at_train_start"], trained)
    assert callback.report.status == "already-applied"

    other = Module()  # a new model is loaded anew
    trainer(tmp_path, callback).fit(other, data())
    assert equal(other.seen["at_train_start"], weights(source))
    assert callback.report.status == "applied"

    trained = copy.deepcopy(module.encoder.state_dict())
    trainer(tmp_path, callback).fit(module, data())  # and the first is still known
    assert equal(module.seen["at_train_start"], trained)


def test_sanity_validation_moves_nothing_and_is_checked_before(tmp_path, source):
    module = Module()
    trainer(tmp_path, WarmStart(source, into="encoder"), num_sanity_val_steps=2).fit(module, data(), data())
    assert equal(module.seen["at_train_start"], weights(source))


class Overwrite(Callback):
    """Does in one hook what a strategy, a callback or a module might do to loaded weights."""

    def __init__(self, hook: str, act) -> None:
        setattr(self, hook, lambda trainer, module, *args, **kwargs: act(module))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_epoch_start", "on_train_start"])
def test_field_note_10_a_hook_that_overwrites_what_was_loaded_stops_the_run(tmp_path, source, hook):
    callback, module = WarmStart(source, into="encoder"), Module()
    spoil = Overwrite(hook, lambda m: m.encoder[0].reset_parameters())
    with pytest.raises(VerificationError, match=r"encoder\.0\.\{bias,weight\}") as caught:
        trainer(tmp_path, callback, spoil).fit(module, data())
    assert set(caught.value.tensors) == {"encoder.0.weight", "encoder.0.bias"}
    assert callback.report.status == "failed"


@pytest.mark.parametrize("place", ["callback", "module"])
def test_field_note_10_up_to_the_first_batch_s_own_hook(tmp_path, source, place):
    """Lightning calls the module's hook after all callbacks'."""

    class Spoils(Module):
        def on_train_batch_start(self, batch, batch_idx):
            if place == "module":
                self.encoder[0].reset_parameters()

    spoil = Overwrite("on_train_batch_start", lambda m: m.encoder[0].reset_parameters())
    module, more = Spoils(), [spoil] if place == "callback" else []
    head = copy.deepcopy(module.head.state_dict())
    with pytest.raises(VerificationError, match=r"before the first training batch(.|\n)*encoder\.0\.\{bias,weight\}"):
        trainer(tmp_path, WarmStart(source, into="encoder"), *more).fit(module, data())
    assert equal(module.head.state_dict(), head)
    assert "on_train_batch_start" not in module.__dict__


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_end"])
def test_a_callback_that_comes_when_training_has_begun_is_an_error(tmp_path, source, hook):
    class Adds(Callback):
        pass

    def add(trainer, *args):
        if not any(isinstance(c, WarmStart) for c in trainer.callbacks):
            trainer.callbacks.append(WarmStart(source, into="encoder"))

    adds = Adds()
    setattr(adds, hook, add)
    with pytest.raises(TimingError, match="see to it that the callback is in place when the model is set up"):
        trainer(tmp_path, adds).fit(Module(), data())


def test_a_replaced_submodule_is_found_by_identity(tmp_path, source):
    def replace(module):
        module.encoder = copy.deepcopy(module.encoder)

    with pytest.raises(VerificationError, match="no longer part of the model"):
        trainer(tmp_path, WarmStart(source, into="encoder"), Overwrite("on_fit_start", replace)).fit(Module(), data())


def test_field_note_32_a_later_unfreeze_is_found(tmp_path, source):
    thaw = Overwrite("on_fit_start", lambda m: m.encoder[0].weight.requires_grad_(True))
    with pytest.raises(FrozenChangedError, match="requires_grad=True again"):
        trainer(tmp_path, WarmStart(source, into="encoder", freeze=True), thaw).fit(Module(), data())


def test_a_frozen_tensor_that_moves_in_training_is_named_at_the_epoch_s_end(tmp_path, source):
    def nudge(module):
        with torch.no_grad():
            module.encoder[3].weight += 1

    spoil = Overwrite("on_train_batch_end", nudge)
    with pytest.raises(FrozenChangedError, match=r"encoder\.3\.weight") as caught:
        trainer(tmp_path, WarmStart(source, into="encoder", freeze=True), spoil).fit(Module(), data())
    assert caught.value.tensors == ("encoder.3.weight",)


class Checkpointed(Module):
    """Keeps no activation of its encoder."""

    use_reentrant = False

    def training_step(self, batch, batch_idx):
        x = batch[0]
        for layer in self.encoder:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return nn.functional.cross_entropy(self.head(x), batch[1])


def test_field_note_22_gradient_checkpointing_reaches_the_first_layer_that_trains_past_frozen_ones(tmp_path, source):
    module = Checkpointed()
    trainer(tmp_path, WarmStart(source, into="encoder", freeze=["encoder.0", "encoder.1"])).fit(module, data())
    before, after = weights(source), module.encoder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("3"))
    assert not torch.equal(after["3.weight"], before["3.weight"])
    assert not torch.equal(after["3.bias"], before["3.bias"])


def test_field_note_22_reentrant_checkpointing_past_frozen_layers_is_an_error_before_the_first_step(tmp_path, source):
    module = Checkpointed()
    module.use_reentrant = True
    before = copy.deepcopy(module.head.state_dict())
    warm = WarmStart(source, into="encoder", freeze=["encoder.0", "encoder.1"])
    # The sanity check validates by the same path, and is no alarm.
    with pytest.raises(TimingError, match=r"^encoder\.3 runs in reentrant(.|\n)*use_reentrant=False"):
        trainer(tmp_path, warm, num_sanity_val_steps=1).fit(module, data(), data())
    assert equal(module.head.state_dict(), before)


class Own(WarmStart):
    """A user's subclass with a hook of its own."""

    batches = 0

    def on_after_backward(self, trainer, pl_module):
        super().on_after_backward(trainer, pl_module)
        self.batches += 1


@pytest.mark.parametrize("end", [None, KeyboardInterrupt])
def test_after_the_first_batch_lightning_finds_no_hook_of_a_batch_but_a_subclass_s_own(tmp_path, source, end):
    """Each that it finds costs some microseconds at every batch, also one that does nothing."""
    hooks = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
    found = []

    def look(module):
        found.append([name for name in hooks if callable(getattr(callback, name))])
        if end is not None:
            raise end

    callback = Own(source, into="encoder", freeze=True)
    run = trainer(tmp_path, callback, Overwrite("on_train_batch_end", look), max_epochs=1)
    with pytest.raises(SystemExit) if end else contextlib.nullcontext():
        run.fit(Module(), data())
    assert found == [["on_after_backward"]] * (1 if end else 4)
    assert callback.batches == len(found)
    assert all(callable(getattr(callback, name)) for name in hooks)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "64-true"])
@pytest.mark.parametrize("memory", [False, True], ids=["file", "memory"])
def test_precisions_that_cast_the_model_raise_no_false_alarm(tmp_path, source, precision, memory):
    class Cast(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].to(self.head.weight.dtype), batch[1]), batch_idx)

    callback = WarmStart(weights(source) if memory else source, into="encoder", freeze=True)
    module = Cast()
    trainer(tmp_path, callback, precision=precision).fit(module, data())
    assert callback.report.status == "applied"
    dtype = module.encoder[0].weight.dtype
    assert torch.equal(module.encoder[0].weight, weights(source)["0.weight"].to(dtype))


def test_errors_come_at_setup_and_leave_the_model_untouched(tmp_path, source, fingerprint):
    module = Module()
    before = fingerprint(module)
    with pytest.raises(MappingError, match=r"did you mean 'encoder'"):
        trainer(tmp_path, WarmStart(source, into="encodr")).fit(module, data())
    assert fingerprint(module) == before
    assert "setup" not in module.__dict__
    assert "configure_model" not in module.__dict__
    pickle.dumps(module)


def test_lightning_does_not_warn_of_the_eval_mode_that_is_held_on_purpose(tmp_path, source):
    def eval_warnings(module):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, WarmStart(source, into="encoder", freeze=True)).fit(module, data())
        return [str(w.message) for w in caught if "in eval mode" in str(w.message)]

    assert eval_warnings(Module()) == []
    surprising = Module()
    surprising.head.eval()
    assert len(eval_warnings(surprising)) == 1


def test_two_warm_starts_in_one_trainer(tmp_path, source):
    head = {"weight": torch.full((2, 8), 2.0), "bias": torch.full((2,), 3.0)}
    one, two = WarmStart(source, into="encoder"), WarmStart(head, into="head")
    seen = {}
    look = Overwrite("on_train_start", lambda m: seen.update(copy.deepcopy(m.state_dict())))
    trainer(tmp_path, one, two, look).fit(Module(), data())
    assert torch.equal(seen["head.weight"], head["weight"])
    assert torch.equal(seen["encoder.0.weight"], weights(source)["0.weight"])
    assert one.state_key != two.state_key


def test_two_warm_starts_that_write_the_same_entry_are_refused(tmp_path, source):
    two = (WarmStart(source, into="encoder"), WarmStart(weights(source), into="encoder", name="again"))
    with pytest.raises(MappingError, match=r"two warm starts write 9 of the same entries"):
        trainer(tmp_path, *two).fit(Module(), data())


def test_lineage_survives_in_the_run_s_checkpoint_as_plain_types(tmp_path, source):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    callback = WarmStart(source, into="encoder", freeze=True)
    trainer(tmp_path, callback, saving, max_epochs=1, enable_checkpointing=True).fit(Module(), data())
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    state = saved["callbacks"][callback.state_key]
    assert state == json.loads(json.dumps(state))
    assert state["lineage"]["sources"][0]["location"] == str(source)
    assert state["lineage"]["sources"][0]["checkpoint_key"] == "state_dict"
    assert state["frozen"] == sorted(f"encoder.{k}" for k in weights(source))
    assert str(tmp_path) not in callback.state_key
    Module.load_from_checkpoint(tmp_path / "ckpt" / "last.ckpt", place="init")


def test_the_callback_pickles_and_deep_copies(source):
    callback = WarmStart(Pretrained(source, into="encoder", freeze=True), verify="sample")
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert twin.state_key == callback.state_key
        assert twin.pretrained[0].into == "encoder"
        assert twin.report is None


def test_it_pickles_and_deep_copies_in_the_middle_of_a_run_too(tmp_path, source):
    twins = []

    def copied(module):
        twins.extend([pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)])

    callback = WarmStart(source, into="encoder", freeze=True)
    each = [Overwrite(hook, copied) for hook in ("setup", "on_train_start", "on_train_batch_end")]
    trainer(tmp_path, callback, *each, max_epochs=1).fit(Module("setup"), data())
    assert len(twins) == 2 * (1 + 1 + 4)
    for twin in twins:
        module = Module("setup")
        trainer(tmp_path, twin, fast_dev_run=1).fit(module, data())
        assert equal(module.seen["at_train_start"], weights(source))


@pytest.mark.parametrize("planned", [False, True], ids=["report", "plan"])
def test_field_note_49_groups_for_configure_optimizers(tmp_path, source, planned):
    """What the callback loaded trains slower than the new head; also from a plan, which needs no callback."""

    class Grouped(Module):
        def configure_optimizers(self):
            given = warmstart.plan(self, source, into="encoder") if planned else callback.report
            return torch.optim.AdamW(warmstart.param_groups(self, given, lr=0.1, loaded_lr_scale=0.5, weight_decay=0.1))

    rates = {}

    def look(module):
        (optimizer,) = module.trainer.optimizers
        for group in optimizer.param_groups:
            rates.update({id(p): (group["lr"], group["weight_decay"]) for p in group["params"]})

    callback, module = WarmStart(source, into="encoder", freeze="encoder.0"), Grouped()
    trainer(tmp_path, callback, Overwrite("on_train_start", look), max_epochs=1).fit(module, data())
    assert {name: rates[id(p)] for name, p in module.named_parameters() if id(p) in rates} == {
        "encoder.1.weight": (0.05, 0.0),
        "encoder.1.bias": (0.05, 0.0),
        "encoder.3.weight": (0.05, 0.1),
        "encoder.3.bias": (0.05, 0.0),
        "head.weight": (0.1, 0.1),
        "head.bias": (0.1, 0.0),
    }


@pytest.mark.parametrize(("field", "value"), [("verify", "some"), ("held", "off"), ("on_freeze_change", "ignore")])
def test_a_value_that_cannot_be_meant_names_the_choices(source, field, value):
    with pytest.raises(MappingError, match=f"{field}='{value}': one of"):
        WarmStart(source, **{field: value})
    with pytest.raises(MappingError, match=r"unfreeze=\['encoder'\]: when, and what"):
        WarmStart(source, freeze=True, unfreeze=["encoder"])


def test_fast_dev_run_and_barebones(tmp_path, source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Module()
        trainer(tmp_path, WarmStart(source, into="encoder"), fast_dev_run=2).fit(module, data())
        assert equal(module.seen["at_train_start"], weights(source))
        bare = Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=WarmStart(source, into="encoder"))
        module = Module()
        bare.fit(module, data())
        assert equal(module.seen["at_train_start"], weights(source))


class Rebuilds(Module):
    """Makes its encoder anew every time `setup` runs, as many modules do."""

    def setup(self, stage: str) -> None:
        self.build()


def test_layers_that_a_second_fit_makes_anew_are_loaded_and_frozen_anew(tmp_path, source):
    callback, module = WarmStart(source, into="encoder", freeze=True), Rebuilds("setup")
    for _ in range(2):
        trainer(tmp_path, callback).fit(module, data())
        assert equal(module.seen["at_train_start"], weights(source))
        assert equal(module.encoder.state_dict(), weights(source))
        assert module.seen["trainable"] == {"head.weight", "head.bias"}
        assert callback.report.status == "applied"


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda c: WarmStart(c.pretrained, name="encoder")], ids=["copy", "new"]
)
def test_a_copy_of_the_callback_does_not_load_over_trained_weights(tmp_path, source, twin):
    callback, module = WarmStart(source, into="encoder"), Module()
    trainer(tmp_path, callback).fit(module, data())
    trained = copy.deepcopy(module.encoder.state_dict())
    trainer(tmp_path, twin(callback)).fit(module, data())
    assert equal(module.seen["at_train_start"], trained)


def test_callbacks_made_by_the_module_for_every_fit_load_once(tmp_path, source):
    class Configures(Module):
        def configure_callbacks(self):
            return [WarmStart(source, into="encoder")]

    module = Configures()
    trainer(tmp_path).fit(module, data())
    trained = copy.deepcopy(module.encoder.state_dict())
    trainer(tmp_path).fit(module, data())
    assert equal(module.seen["at_train_start"], trained)


def test_two_models_in_turn_keep_their_freeze_their_lineage_and_their_guard(tmp_path, source):
    callback, first, second = WarmStart(source, into="encoder", freeze=True), Module(), Module()
    trainer(tmp_path, callback).fit(first, data())
    state = callback.state_dict()
    trainer(tmp_path, callback).fit(second, data())
    trainer(tmp_path, callback).fit(first, data())
    again = callback.state_dict()
    assert again["frozen"] == state["frozen"]
    assert again["lineage"] == state["lineage"]
    assert again["status"] == "already-applied"

    def nudge(module):
        with torch.no_grad():
            module.encoder[3].weight += 1

    with pytest.raises(FrozenChangedError, match=r"encoder\.3\.weight"):
        trainer(tmp_path, callback, Overwrite("on_train_batch_end", nudge)).fit(first, data())


def test_a_module_replaced_in_training_is_found_at_the_epoch_s_end(tmp_path, source):
    def replace(module):
        module.encoder = copy.deepcopy(module.encoder)

    with pytest.raises(FrozenChangedError, match="no longer part of the model"):
        trainer(tmp_path, WarmStart(source, into="encoder", freeze=True), Overwrite("on_train_batch_end", replace)).fit(
            Module(), data()
        )


def test_field_note_5_an_optimizer_that_holds_replaced_parameters_is_an_error(tmp_path, source):
    def orphan(module):
        for layer in (module.encoder[0], module.encoder[3]):
            layer.weight = nn.Parameter(layer.weight.detach().clone())

    with pytest.raises(TimingError, match=r"the optimizer holds 2 loaded parameters that the model has replaced"):
        trainer(tmp_path, WarmStart(source, into="encoder"), Overwrite("on_fit_start", orphan)).fit(Module(), data())


def test_the_file_may_come_after_a_first_try(tmp_path, source):
    moved = source.rename(tmp_path / "elsewhere.pt")
    callback, module = WarmStart(source, into="encoder"), Module()
    with pytest.raises(CheckpointError, match="no such file"):
        trainer(tmp_path, callback).fit(module, data())
    moved.rename(source)
    trainer(tmp_path, callback).fit(module, data())
    assert equal(module.seen["at_train_start"], weights(source))


def test_a_first_fit_that_failed_leaves_the_checks_armed(tmp_path, source):
    class FailsOnce(Module):
        failed = False

        def on_train_start(self) -> None:
            super().on_train_start()
            if not self.failed:
                self.failed = True
                raise RuntimeError("a first try")

    callback, module = WarmStart(source, into="encoder"), FailsOnce()
    with pytest.raises(RuntimeError, match="a first try"):
        trainer(tmp_path, callback).fit(module, data())
    spoil = Overwrite("on_train_epoch_start", lambda m: m.encoder[0].reset_parameters())
    with pytest.raises(VerificationError, match="before the first training batch"):
        trainer(tmp_path, callback, spoil).fit(module, data())


def test_a_learning_rate_finder_does_not_use_up_the_checks(tmp_path, source):
    class Armed(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            pl_module.found = True

    finder = Armed(num_training_steps=4, update_attr=True)
    module = Module(lr=0.01)
    trainer(tmp_path, WarmStart(source, into="encoder"), finder).fit(module, data())
    assert equal(module.seen["at_train_start"], weights(source))

    spoil = Overwrite("on_train_start", lambda m: m.encoder[0].reset_parameters() if hasattr(m, "found") else None)
    with pytest.raises(VerificationError, match=r"encoder\.0"):
        trainer(tmp_path, WarmStart(source, into="encoder"), finder, spoil).fit(Module(lr=0.01), data())


def test_averaging_copies_what_was_loaded_or_is_refused(tmp_path, source):
    module = InitOnly().setup_seen()
    averaging = EMAWeightAveraging(update_starting_at_step=1000)
    with pytest.raises(TimingError, match=r"callbacks=\[WarmStart\(\.\.\.\), EMAWeightAveraging\(\.\.\.\)\]"):
        trainer(tmp_path, averaging, WarmStart(source, into="encoder")).fit(module, data())
    with pytest.raises(TimingError, match=r"make the layers in __init__ or configure_model"):
        trainer(tmp_path, WarmStart(source, into="encoder"), averaging).fit(Module(), data())
    module = InitOnly().setup_seen()
    averaging = EMAWeightAveraging(update_starting_at_step=1000)
    trainer(tmp_path, WarmStart(source, into="encoder"), averaging).fit(module, data())
    assert equal(module.encoder.state_dict(), weights(source))  # never updated: the average is the first copy


def test_an_error_in_one_of_two_warm_starts_leaves_the_model_untouched(tmp_path, source, fingerprint):
    module = Module()
    before = fingerprint(module)
    wrong = WarmStart({"weight": torch.zeros(3, 3)}, into="head")
    with pytest.raises(MappingError, match="head"):
        trainer(tmp_path, WarmStart(source, into="encoder"), wrong).fit(module, data())
    assert fingerprint(module) == before
    assert not {"setup", "configure_model"} & module.__dict__.keys()


def test_what_was_released_stays_released_on_resume(tmp_path, source):
    saving = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    callback, first = WarmStart(source, into="encoder", freeze=True), Module()
    release = Overwrite("on_train_epoch_end", lambda m: callback.report.frozen.release("encoder.3"))
    run = trainer(tmp_path, callback, release, saving, max_epochs=1, enable_checkpointing=True)
    run.fit(first, data())
    again, second = WarmStart(source, into="encoder", freeze=True), Module()
    trainer(tmp_path, again).fit(second, data(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert not any(name.startswith("encoder.3") for name in again.report.frozen.names)
    assert len(again.report.frozen.names) == 7


def test_a_report_that_cannot_be_written_costs_the_file_and_not_the_run(tmp_path, source):
    (tmp_path / "run").write_text("a file where the folder should be")
    callback = WarmStart(source, into="encoder")
    with pytest.warns(UserWarning, match="could not be written"):
        trainer(tmp_path, callback).fit(Module(), data())
    assert callback.report.status == "applied"


def test_a_method_that_the_user_set_on_the_instance_is_there_afterwards(tmp_path, source):
    module = InitOnly().setup_seen()
    calls = []
    own = lambda stage: calls.append(stage)
    module.setup = own
    trainer(tmp_path, WarmStart(source, into="encoder")).fit(module, data())
    assert calls
    assert module.__dict__["setup"] is own


def test_a_module_pickles_while_one_of_its_methods_is_waited_for(tmp_path, source):
    twins = []
    pickled = lambda module: twins.append(pickle.loads(pickle.dumps(module)))
    each = [Overwrite(hook, pickled) for hook in ("setup", "on_train_epoch_start")]
    trainer(tmp_path, WarmStart(source, into="encoder"), *each, max_epochs=1).fit(Module("init"), data())
    assert len(twins) == 2
    trainer(tmp_path, WarmStart(source, into="encoder"), max_epochs=1).fit(twins[1], data())
    assert equal(twins[1].seen["at_train_start"], weights(source))


def test_the_other_package_s_trainer_is_refused_with_the_line_to_type(tmp_path, source):
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        encoder = make_encoder()
        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

    run = other.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[WarmStart(source, into="encoder")], logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"this Trainer is of pytorch_lightning.*\n?.*from lightning\.pytorch import"):
        run.fit(Other(), data())


def test_what_the_optimizer_leaves_out_or_holds_in_vain_is_a_note(tmp_path, source):
    class Chosen(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters() if self.only_head else self.parameters(), lr=0.1)

    for only_head, freeze, note in (
        (True, False, "6 parameters, such as encoder.0.weight: trainable, but in no group of an optimizer"),
        (False, True, "6 parameters, such as encoder.0.weight: frozen, and in a group of an optimizer"),
        (True, True, None),
        (False, False, None),
    ):
        module, callback = Chosen(), WarmStart(source, into="encoder", freeze=freeze)
        module.only_head = only_head
        trainer(tmp_path, callback, max_epochs=1).fit(module, data())
        found = [n for n in callback.report.notes if "optimizer" in n]
        assert len(found) == (note is not None)
        assert note is None or found[0].startswith(note)
    staged = WarmStart(source, into="encoder", freeze=True, unfreeze={1: "encoder"})
    module = Chosen()
    module.only_head = False
    trainer(tmp_path, staged, max_epochs=1).fit(module, data())
    assert not any("optimizer" in n for n in staged.report.notes)


def test_a_freeze_of_everything_is_told_before_torch_s_own_error(tmp_path, source):
    whole = {name: torch.zeros_like(value) for name, value in InitOnly().state_dict().items()}
    run = trainer(tmp_path, WarmStart(whole, freeze=True))
    with (
        pytest.warns(UserWarning, match="no parameter of InitOnly trains"),
        pytest.raises(ValueError, match="empty parameter"),
    ):
        run.fit(InitOnly().setup_seen(), data())
