"""Resuming: the run's own weights, without the pretrained file too, and never silently with nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import Plain, bert, equal, numbers, weights
from transformers import TrainerCallback

from warmstart import CheckpointError, FrozenChangedError
from warmstart_transformers import WarmStartCallback

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EPOCHS = {"save_strategy": "epoch", "num_train_epochs": 2}


class Start(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.values = weights(model)
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}


def rename_keys(path: Path, tree: dict[str, torch.Tensor]) -> None:
    save_file({f"foo.{name}": value for name, value in tree.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("shape", ["plain", "bin", "sharded", "peft", "adapters"])
def test_field_note_1_a_checkpoint_that_matches_nothing_is_an_error(make_trainer, bert_source, tmp_path, shape):
    """transformers reports missing and unexpected keys in a log line, and trains on."""

    def make():
        model = bert()
        if shape in ("peft", "adapters"):
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
        if shape == "adapters":
            model.add_adapter("other", LoraConfig(r=2, target_modules=["key"]))
        return model

    make_trainer(make(), WarmStartCallback(bert_source), save_strategy="epoch").train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    if shape == "sharded":
        model = bert()
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="8KB")
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        index["weight_map"] = {f"foo.{name}": file for name, file in index["weight_map"].items()}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in checkpoint.rglob("*model*.safetensors"):
        rename_keys(path, load_file(path))
    if shape == "bin":
        torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
        (checkpoint / "model.safetensors").unlink()
    for gone in (False, True):
        if gone:
            bert_source.unlink()
        trainer = make_trainer(make(), WarmStartCallback(bert_source), num_train_epochs=2)
        with pytest.raises(CheckpointError, match="matches none of the"):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_it_is_found_in_a_second_training_too(make_trainer, bert_source, tmp_path):
    trainer = make_trainer(bert(), WarmStartCallback(bert_source), **EPOCHS)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    rename_keys(checkpoint / "model.safetensors", load_file(checkpoint / "model.safetensors"))
    with pytest.raises(CheckpointError, match="matches none of the"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("freeze", [False, True, "encoder", "encoder.0"])
def test_the_pretrained_file_may_be_gone(make_trainer, plain_source, tmp_path, freeze, attached):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze=freeze), **EPOCHS).train()
    plain_source.unlink()
    start, callback = Start(), WarmStartCallback(plain_source, into="encoder", freeze=freeze)
    trainer = make_trainer(Plain(), callback, start, **(EPOCHS | {"num_train_epochs": 3}))
    if attached:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    saved = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    assert equal(start.values, saved)
    frozen = {False: set(), "encoder.0": {"encoder.0.weight", "encoder.0.bias"}}.get(
        freeze, {name for name, _ in Plain().named_parameters() if name.startswith("encoder")}
    )
    assert start.trainable == {name for name, _ in Plain().named_parameters()} - frozen
    assert callback.report is None
    # the lineage goes on, although its source is gone
    first, last = (json.loads((tmp_path / "run" / f"checkpoint-{n}" / "warmstart.json").read_text()) for n in (8, 12))
    key = "WarmStartCallback[encoder]"
    assert last[key]["lineage"] == first[key]["lineage"]
    assert last[key]["status"] == "superseded-by-resume"
    assert set(last[key]["frozen"]) == set(first[key]["frozen"])


def test_without_a_resume_a_file_that_is_gone_is_an_error(make_trainer, plain_source):
    plain_source.unlink()
    trainer = make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"))
    with pytest.raises(CheckpointError, match=r"encoder\.pt"):
        trainer.train()


@pytest.mark.parametrize("score", ["evaluate", "predict"])
def test_a_file_that_is_gone_gives_no_scores_until_other_weights_are_loaded(make_trainer, plain_source, score):
    trained = Plain()
    trainer = make_trainer(trained, WarmStartCallback(plain_source, into="encoder"), save_strategy="epoch")
    trainer.train()
    plain_source.rename(plain_source.with_name("encoders.pt"))

    def scores(model, load=lambda trainer: None):
        trainer = make_trainer(model, WarmStartCallback(plain_source, into="encoder"), num_train_epochs=2)
        load(trainer)
        return (
            trainer.evaluate()["eval_loss"] if score == "evaluate" else trainer.predict(numbers()).metrics["test_loss"]
        )

    with pytest.raises(CheckpointError, match=r"encoder\.pt: there is no such file \(did you mean 'encoders\.pt'"):
        scores(Plain())
    expected = make_trainer(trained).evaluate()["eval_loss"]
    assert scores(Plain(), lambda trainer: trainer.model.load_state_dict(trained.state_dict())) == expected
    resumed = Plain()
    after = scores(resumed, lambda trainer: trainer.train(resume_from_checkpoint=True))
    assert after == make_trainer(resumed).evaluate()["eval_loss"]


def test_an_adapter_s_checkpoint_cannot_stand_in_for_the_base(make_trainer, bert_source):
    def make():
        return get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]))

    make_trainer(make(), WarmStartCallback(bert_source), **EPOCHS).train()
    bert_source.unlink()
    trainer = make_trainer(make(), WarmStartCallback(bert_source), num_train_epochs=3)
    with pytest.raises(CheckpointError, match="cannot stand in for it: it lacks"):
        trainer.train(resume_from_checkpoint=True)


def test_what_was_frozen_must_be_known(make_trainer, plain_source, tmp_path):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze=True), **EPOCHS).train()
    for manifest in (tmp_path / "run").glob("*/warmstart.json"):
        manifest.unlink()
    plain_source.unlink()
    trainer = make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze=True), num_train_epochs=3)
    with pytest.raises((CheckpointError, ValueError), match=r"what to freeze|parameter group"):
        trainer.train(resume_from_checkpoint=True)


def test_field_note_13_another_freeze_is_told_in_words(make_trainer, plain_source):
    """Instead of torch's "loaded state dict contains a parameter group that doesn't match the size"."""
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze=True), **EPOCHS).train()
    callback = WarmStartCallback(plain_source, into="encoder", freeze="encoder.0")
    trainer = make_trainer(Plain(), callback, num_train_epochs=3)
    callback.attach(trainer)
    with pytest.raises(FrozenChangedError, match=r"had 9 frozen tensors, this one has 2") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "was frozen, trains now" in str(caught.value)
    assert "encoder.3.weight" in caught.value.tensors


def test_without_attach_it_is_a_warning_before_torch_s_words(make_trainer, plain_source):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze=True), **EPOCHS).train()
    callback = WarmStartCallback(plain_source, into="encoder", freeze="encoder.0")
    trainer = make_trainer(Plain(), callback, num_train_epochs=3)
    with (
        pytest.warns(UserWarning, match="had 9 frozen tensors, this run has 2"),
        pytest.raises(ValueError, match="parameter group"),
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_change_of_equal_size_passes_torch_and_not_us(make_trainer, plain_source):
    """Optimizer state goes by position: of two biases of one shape torch sees no difference."""
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze="encoder.1.bias"), **EPOCHS).train()
    callback = WarmStartCallback(plain_source, into="encoder", freeze="encoder.3.bias")
    trainer = make_trainer(Plain(), callback, num_train_epochs=3)
    with pytest.warns(UserWarning, match="does not fit"), pytest.raises(FrozenChangedError):
        trainer.train(resume_from_checkpoint=True)


def test_a_manifest_that_is_none_is_an_error_with_its_path(make_trainer, plain_source, tmp_path):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"), **EPOCHS).train()
    (tmp_path / "run" / "checkpoint-8" / "warmstart.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint-8/warmstart\.json"):
        make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"))


def test_a_checkpoint_from_before_the_callback_is_resumed(make_trainer, plain_source, tmp_path):
    """`ExportableState` would raise a KeyError at the next save."""
    make_trainer(Plain(), **EPOCHS).train()
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback, **(EPOCHS | {"num_train_epochs": 3}))
    trainer.train(resume_from_checkpoint=True)
    assert callback.report.status == "superseded-by-resume"
    assert (tmp_path / "run" / "checkpoint-12" / "warmstart.json").exists()


def test_a_moved_run_is_resumed_by_its_path(make_trainer, plain_source, tmp_path):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze=True), **EPOCHS).train()
    shutil.move(tmp_path / "run" / "checkpoint-4", tmp_path / "elsewhere")
    callback, start = WarmStartCallback(plain_source, into="encoder", freeze=True), Start()
    trainer = make_trainer(Plain(), callback, start, **EPOCHS)
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert equal(start.values, load_file(tmp_path / "elsewhere" / "model.safetensors"))
    assert callback.report.status == "applied"  # frozen values are the same in both
