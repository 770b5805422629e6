"""What runs of all kinds do to a warm start, and what is left of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import Plain, bert, equal, weights
from transformers import TrainerCallback

from warmstart import MappingError
from warmstart_transformers import WarmStartCallback


class Start(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.values = weights(model)


def test_one_callback_given_twice_is_one(make_trainer, plain_source, tmp_path):
    callback, start = WarmStartCallback(plain_source, into="encoder", freeze=True), Start()
    model = Plain()
    make_trainer(model, callback, callback, start).train()
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))
    assert callback.report.status == "applied"
    assert (tmp_path / "run" / "warmstart.json").exists()


def test_two_of_one_name_are_refused(make_trainer, plain_source):
    """Their parts of a checkpoint's manifest would be one."""
    tree = {f"head.{name}": value for name, value in Plain().head.state_dict().items()}
    base = {f"encoder.{name}": value for name, value in torch.load(plain_source, weights_only=True).items()}
    first = WarmStartCallback(base, include="encoder")
    with pytest.raises(
        MappingError, match=r"two warm starts of this Trainer are WarmStartCallback\[\] in its checkpoints"
    ):
        make_trainer(Plain(), first, WarmStartCallback(tree, include="head"))
    make_trainer(
        Plain(), WarmStartCallback(base, include="encoder"), WarmStartCallback(tree, include="head", name="head")
    )


def test_the_best_model_is_loaded_at_the_end_and_old_checkpoints_go(make_trainer, bert_source, tmp_path):
    model = bert()
    callback = WarmStartCallback(bert_source, freeze="bert.encoder")
    trainer = make_trainer(
        model, callback, num_train_epochs=3, save_strategy="epoch", eval_strategy="epoch", save_total_limit=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert equal(weights(model), best)
    source = load_file(bert_source)
    assert all(torch.equal(best[f"bert.{n}"], v) for n, v in source.items() if n.startswith("encoder."))
    assert (tmp_path / "run" / "warmstart.json").exists()


def test_a_run_is_resumed_into_another_folder(make_trainer, plain_source, tmp_path):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", freeze=True), save_strategy="epoch").train()
    callback, start = WarmStartCallback(plain_source, into="encoder", freeze=True), Start()
    trainer = make_trainer(Plain(), callback, start, num_train_epochs=2, save_strategy="epoch")
    trainer.args.output_dir = str(tmp_path / "other")
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert equal(start.values, load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"))
    manifest = json.loads((tmp_path / "other" / "checkpoint-8" / "warmstart.json").read_text())
    assert len(manifest["WarmStartCallback[encoder]"]["frozen"]) == 9


def test_under_bf16_the_values_are_the_file_s(make_trainer, bert_source):
    model, start = bert(), Start()
    make_trainer(model, WarmStartCallback(bert_source), start, bf16=True).train()
    source = load_file(bert_source)
    loaded = {n.removeprefix("bert."): v for n, v in start.values.items() if n.startswith("bert.")}
    assert all(torch.equal(value, source[name]) for name, value in loaded.items())


@pytest.mark.parametrize("rules", [{"into": "encode"}, {"strip_prefix": "body"}, {"freeze": "encodr"}])
def test_a_typing_error_is_told_and_writes_nothing(make_trainer, plain_source, fingerprint, rules):
    model = Plain()
    before = fingerprint(model)
    with pytest.raises(MappingError):
        make_trainer(model, WarmStartCallback(plain_source, **{"into": "encoder", **rules}))
    assert fingerprint(model) == before
