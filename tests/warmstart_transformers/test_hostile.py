"""What runs of all kinds do to a warm start, and what is left of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BEFORE_5, Plain, bert, equal, numbers, texts, weights
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from warmstart import CheckpointError, FrozenChangedError, MappingError
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


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # which releases before 5 ask for
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


class Stop(TrainerCallback):
    """Ends training with an error after some steps, once."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error = after, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.after = -1
            raise self.error


def test_field_note_1_an_interrupted_training_is_resumed_from_nothing_that_matches(make_trainer, bert_source, tmp_path):
    """As in a notebook: the same Trainer goes on, and no event tells that it was interrupted."""
    stop = Stop(5, KeyboardInterrupt())
    trainer = make_trainer(bert(), stop, WarmStartCallback(bert_source), num_train_epochs=2, save_strategy="epoch")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    path = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    save_file({f"foo.{name}": value for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="matches none of the"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("gone", [False, True])
def test_training_that_starts_again_with_a_smaller_batch_goes_on(make_trainer, bert_source, gone):
    """`auto_find_batch_size` runs the loop once more, and training begins a second time."""
    freeze = {"freeze": "bert.encoder"}
    make_trainer(bert(), WarmStartCallback(bert_source, **freeze), num_train_epochs=1, save_strategy="epoch").train()
    source = load_file(bert_source)
    if gone:
        bert_source.unlink()
    model, callback = bert(3), WarmStartCallback(bert_source, **freeze)
    stop = Stop(6, RuntimeError("CUDA out of memory."))
    trainer = make_trainer(model, callback, stop, num_train_epochs=2, auto_find_batch_size=True)
    trainer.train(resume_from_checkpoint=True)
    assert stop.after == -1
    assert trainer.state.epoch == 2
    assert all(torch.equal(v, source[n]) for n, v in weights(model.bert).items() if n.startswith("encoder."))
    assert (callback.report is None) == gone


def test_a_subclass_may_have_a_signature_of_its_own(plain_source, tmp_path):
    class Theirs(Trainer):
        def train(self, *, resume_from_checkpoint=None):
            return super().train(resume_from_checkpoint)

    args = TrainingArguments(str(tmp_path), num_train_epochs=1, save_strategy="epoch", report_to=[], use_cpu=True)
    callback = WarmStartCallback(plain_source, into="encoder", freeze=True)
    trainer = Theirs(Plain(), args, train_dataset=numbers(), callbacks=[callback])
    callback.attach(trainer)
    trainer.train()
    assert callback.report.status == "applied"
    trainer.train(resume_from_checkpoint=True)
    assert equal(weights(trainer.model.encoder), torch.load(plain_source, weights_only=True))


def test_a_callback_that_was_attached_to_another_trainer_is_not_attached_to_this_one(
    make_trainer, plain_source, tmp_path
):
    callback = WarmStartCallback(plain_source, into="encoder", freeze="encoder.0")
    first = make_trainer(Plain(), callback, save_strategy="epoch", report_to=["tensorboard"])
    callback.attach(first)
    first.train()
    said = len(first.state.log_history)
    # of the same size, so that torch sees nothing wrong; only the manifest tells
    manifest = tmp_path / "run" / "checkpoint-4" / "warmstart.json"
    manifest.write_text(manifest.read_text().replace("encoder.0.", "encoder.3."))
    second = make_trainer(Plain(), callback, num_train_epochs=2, report_to=["tensorboard"])
    with (
        pytest.raises(FrozenChangedError, match="2 frozen tensors, this one has 2"),
        pytest.warns(UserWarning, match="does not fit"),
    ):
        second.train(resume_from_checkpoint=True)
    third = make_trainer(Plain(), callback, report_to=["tensorboard"])
    third.train()
    assert len(first.state.log_history) == said


def test_a_dataset_without_a_length_counts_its_epochs_too(make_trainer, plain_source):
    """The Trainer's own epoch is then a share of `max_steps`, and less than one for the whole of the first."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(numbers())

    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.encoder[3].weight.requires_grad)

    callback = WarmStartCallback(plain_source, into="encoder", freeze=True, unfreeze={1: "encoder.3"})
    make_trainer(Plain(), callback, Look(), data=Stream(), max_steps=12).train()
    assert seen == [False] * 4 + [True] * 8


def test_a_compiled_training_is_the_same(make_trainer, bert_source, monkeypatch):
    monkeypatch.setenv(
        "ACCELERATE_DYNAMO_BACKEND", ""
    )  # put back afterwards: the arguments set it for the whole process
    model, start = bert(), Start()
    callback = WarmStartCallback(bert_source, freeze="bert.encoder")
    trainer = make_trainer(model, callback, start, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    source = load_file(bert_source)
    assert all(torch.equal(start.values[f"bert.{n}"], v) for n, v in source.items() if "position_ids" not in n)
    now = weights(model.bert)
    assert all(torch.equal(now[n], v) for n, v in source.items() if n.startswith("encoder."))
    assert not torch.equal(now["pooler.dense.weight"], source["pooler.dense.weight"])


def test_a_run_of_many_options_at_once(make_trainer, bert_source, tmp_path):
    """Accumulation, noise on embeddings, early stopping, the best model at the end, checkpoints of the weights alone."""
    options = {
        "gradient_accumulation_steps": 2, "neftune_noise_alpha": 1.0, "eval_strategy": "epoch", "save_strategy": "epoch",
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_only_model": True, "eval_on_start": True,
        "label_names": ["labels"], "ignore_data_skip": True,
    }  # fmt: skip
    source = load_file(bert_source)
    for epochs in (2, 4):
        model, start = bert(epochs), Start()
        callback = WarmStartCallback(bert_source, freeze="bert.encoder")
        stopping = EarlyStoppingCallback(early_stopping_patience=5)
        trainer = make_trainer(model, callback, start, stopping, num_train_epochs=epochs, **options)
        trainer.train(resume_from_checkpoint=epochs == 4)
        assert trainer.state.global_step == epochs * 2
        best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
        assert equal(weights(model), best)
        assert all(torch.equal(best[f"bert.{n}"], v) for n, v in source.items() if n.startswith("encoder."))
        if epochs == 4:
            assert equal(start.values, load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"))
            assert callback.report.status == "superseded-by-resume"


def test_an_encoder_and_decoder_with_one_table_through_seq2seqtrainer(tmp_path):
    """Field note 14: three names of one tensor, frozen under one of them."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    source, model = T5ForConditionalGeneration(config), T5ForConditionalGeneration(config)
    source.save_pretrained(tmp_path / "source")
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in texts()]
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "run"), num_train_epochs=1, save_strategy="no", report_to=[], use_cpu=True,
        predict_with_generate=True, generation_max_length=4,
    )  # fmt: skip
    callback = WarmStartCallback(tmp_path / "source", freeze="shared")
    trainer = Seq2SeqTrainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    assert equal(weights(model), weights(source))
    trainer.train()
    trainer.predict(rows)
    assert model.lm_head.weight is model.shared.weight is model.decoder.embed_tokens.weight
    assert torch.equal(model.shared.weight, source.shared.weight)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert not torch.equal(model.get_parameter(name), source.get_parameter(name))


def test_a_run_s_own_checkpoint_is_a_source_and_its_other_files_are_told_apart(make_trainer, bert_source, tmp_path):
    trained = bert(3)
    make_trainer(trained, save_strategy="epoch").train()
    model = bert()
    make_trainer(model, WarmStartCallback(tmp_path / "run" / "checkpoint-4"))
    assert equal(weights(model), weights(trained))
    cold = weights(bert())
    wrong = {
        "checkpoint-4/optimizer.pt": "is an optimizer's state, not weights",
        "checkpoint-4/scheduler.pt": "holds no weights",
        "checkpoint-4/training_args.bin": "holds no weights",
        "checkpoint-4/trainer_state.json": "not weights",
        ".": 'subfolder="checkpoint-4"',
    }
    for name, words in wrong.items():
        model = bert()
        with pytest.raises(CheckpointError, match=re.escape(words)):
            make_trainer(model, WarmStartCallback(tmp_path / "run" / name))
        assert equal(weights(model), cold)


def test_batches_of_rows_of_like_length(make_trainer, bert_source):
    """The Trainer's own sampler; in a list it measures the rows itself, and looks for no column."""
    rows = [{**row, "input_ids": row["input_ids"][: 2 + i % 5]} for i, row in enumerate(texts())]
    lengths = []

    def collate(batch):
        lengths.append([len(row["input_ids"]) for row in batch])
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in batch])}

    grouped = {"group_by_length": True} if BEFORE_5 else {"train_sampling_strategy": "group_by_length"}
    model, start = bert(), Start()
    callback = WarmStartCallback(bert_source, freeze=["bert.encoder"])
    trainer = make_trainer(model, callback, start, data=rows, length_column_name="size", **grouped)
    trainer.data_collator = collate
    trainer.train()
    assert lengths == [sorted(batch, reverse=True) for batch in lengths]
    assert lengths[0][0] == 6  # the longest comes first
    assert callback.report.status == "applied"
    source = load_file(bert_source)
    assert all(torch.equal(start.values[f"bert.{k}"], v) for k, v in source.items() if k != "embeddings.position_ids")
    assert all(torch.equal(v, source[f"encoder.{k}"]) for k, v in model.bert.encoder.state_dict().items())


def test_a_push_to_the_hub_without_a_network_costs_the_push_and_not_the_run(make_trainer, bert_source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, callback = bert(), WarmStartCallback(bert_source)
    before = weights(model)
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        make_trainer(model, callback, push_to_hub=True, hub_model_id="someone/something")
    assert equal(weights(model), before)
    trainer = make_trainer(model, callback, hub_model_id="someone/something")  # the same callback, once more
    callback.attach(trainer)
    trainer.train()
    assert callback.report.status == "applied"
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        trainer.push_to_hub()
    trainer.save_model()
    trained = weights(model)
    assert equal(load_file(Path(trainer.args.output_dir, "model.safetensors")), trained)


def test_a_class_in_the_place_of_a_callback_is_told_what_it_lacks(make_trainer):
    """The Trainer makes an object of a class itself."""
    with pytest.raises(TypeError, match=r"WarmStartCallback.* missing .* 'pretrained'"):
        make_trainer(bert(), WarmStartCallback)
