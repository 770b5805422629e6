"""Frozen means frozen, although the Trainer calls `model.train()` at every step; and released when the schedule says so."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import Plain, bert, equal, weights
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel

from warmstart import FrozenChangedError, MappingError, TimingError
from warmstart_transformers import WarmStartCallback

CHECKPOINTING = next(  # by its name in later releases, and in earlier ones
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


class Watch(TrainerCallback):
    """What the encoder's outputs were at each training forward, and which parameters trained in each epoch."""

    def __init__(self, module):
        self.outputs, self.trainable, self.optimizer, self.rates = [], [], set(), []
        module.register_forward_hook(self.look)

    def look(self, module, given, output):
        output = output[0] if isinstance(output, tuple) else output  # a layer's, in earlier releases
        self.outputs.append((given[0].clone(), output.clone(), module.training))

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

    def on_epoch_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        self.trainable.append({name for name, p in model.named_parameters() if p.requires_grad})
        self.rates.append(lr_scheduler.get_last_lr())


def test_field_note_11_frozen_parts_neither_move_nor_drift(make_trainer, plain_source):
    """BatchNorm's statistics, LayerNorm and dropout: training-time output is the eval output, bit for bit."""
    model = Plain()
    watch = Watch(model.encoder)
    trainer = make_trainer(
        model, watch, WarmStartCallback(plain_source, into="encoder", freeze=True), num_train_epochs=3
    )
    trainer.train()
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))
    assert watch.optimizer == {"head.weight", "head.bias"}
    assert len(watch.outputs) == 12
    reference = Plain()
    reference.encoder.load_state_dict(torch.load(plain_source, weights_only=True))
    reference.encoder.eval()
    for given, output, training in watch.outputs:
        assert not training
        assert torch.equal(output, reference.encoder(given))


def test_held_train_leaves_the_mode_alone(make_trainer, plain_source):
    model = Plain()
    watch = Watch(model.encoder[2])
    callback = WarmStartCallback(plain_source, into="encoder", freeze=["encoder.0", "encoder.3"], held="train")
    make_trainer(model, watch, callback).train()
    assert all(training for _, _, training in watch.outputs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_field_note_22_a_frozen_bert_under_gradient_checkpointing(make_trainer, bert_source, checkpointing):
    model = bert()
    callback = WarmStartCallback(bert_source, freeze=["bert.embeddings", "bert.encoder.layer.0"])
    watch = Watch(model.bert.encoder.layer[0])
    trainer = make_trainer(model, callback, watch, **{CHECKPOINTING: checkpointing})
    trainer.train()
    source = load_file(bert_source)
    now = weights(model.bert)
    frozen = {n for n in now if n.startswith(("embeddings", "encoder.layer.0"))}
    assert all(torch.equal(now[name], source[name]) for name in frozen)
    assert not any(torch.equal(now[name], source[name]) for name in now.keys() - frozen if name.endswith("weight"))
    assert not any(name.startswith(("bert.embeddings", "bert.encoder.layer.0")) for name in watch.optimizer)
    assert not any(training for _, _, training in watch.outputs)


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, **sizes))


@pytest.fixture
def reentrant(make_trainer):
    """A Trainer of a ViT that is frozen up to its last layer; of images the library does not know that it should ask."""
    source, model = weights(vit()), vit()
    frozen = [name for name in source if "embeddings" in name or ".0." in name]
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    data = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)]
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    return source, make_trainer(model, WarmStartCallback(source, freeze=frozen), data=data, **options)


def test_field_note_22_gradients_reach_what_trains_behind_frozen_layers_under_reentrant_checkpointing(reentrant):
    """It ends them at a layer whose inputs need none, and what lies behind would never train, without an error."""
    source, trainer = reentrant
    trainer.train()
    matrices = {name: value for name, value in weights(trainer.model).items() if name.endswith("weight")}
    moved = {name for name, value in matrices.items() if not torch.equal(value, source[name])}
    assert moved == {name for name in matrices if "embeddings" not in name and ".0." not in name}


def test_field_note_22_where_no_gradient_can_pass_training_does_not_start(reentrant, monkeypatch):
    def unknown(self):
        raise NotImplementedError

    monkeypatch.setattr(ViTModel, "get_input_embeddings", unknown)
    source, trainer = reentrant
    with pytest.raises(TimingError, match=r'gradient_checkpointing_kwargs=\{"use_reentrant": False\}'):
        trainer.train()
    assert equal(weights(trainer.model), source)


def test_what_moves_a_frozen_tensor_is_named_at_the_epoch_s_end(make_trainer, plain_source):
    class Move(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.encoder[1].running_mean.add_(1)

    trainer = make_trainer(Plain(), Move(), WarmStartCallback(plain_source, into="encoder", freeze=True))
    with pytest.raises(FrozenChangedError, match=r"encoder\.1\.running_mean"):
        trainer.train()


def test_what_is_thawed_behind_our_back_is_named_at_the_start(make_trainer, plain_source):
    model = Plain()
    trainer = make_trainer(model, WarmStartCallback(plain_source, into="encoder", freeze=True))
    model.requires_grad_(True)
    with pytest.raises(FrozenChangedError, match="requires_grad=True again"):
        trainer.train()


SCHEDULE = {1: "encoder.3", 2: ["encoder.0", "encoder.1"]}
EVERY = {name for name, _ in Plain().named_parameters()}


def staged(trainable):
    return [
        EVERY - {n for n in EVERY if n.startswith("encoder")} | {n for n in EVERY if n.startswith(t)} for t in trainable
    ]


def test_unfreezing_by_epoch(make_trainer, plain_source):
    model = Plain()
    watch, callback = (
        Watch(model.encoder),
        WarmStartCallback(plain_source, into="encoder", freeze=True, unfreeze=SCHEDULE),
    )
    snapshots = []

    class Keep(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            snapshots.append(weights(model.encoder))

    make_trainer(model, watch, callback, Keep(), num_train_epochs=3).train()
    assert watch.optimizer == EVERY  # from the start, so that groups and schedulers never change shape
    assert watch.trainable == staged([("nothing",), ("encoder.3",), ("encoder.",)])
    source = torch.load(plain_source, weights_only=True)
    assert equal(snapshots[0], source)
    second = {name: value for name, value in snapshots[1].items() if not name.startswith("3")}
    assert equal(second, {name: source[name] for name in second})
    assert not torch.equal(snapshots[1]["3.weight"], source["3.weight"])
    assert not torch.equal(snapshots[2]["0.weight"], source["0.weight"])
    assert not torch.equal(snapshots[2]["1.running_mean"], source["1.running_mean"])  # its hold ended too


def test_unfreezing_by_step(make_trainer, plain_source):
    model, seen = Plain(), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.encoder[3].weight.requires_grad)

    callback = WarmStartCallback(
        plain_source, into="encoder", freeze=True, unfreeze={2: "encoder.3"}, unfreeze_unit="step"
    )
    make_trainer(model, callback, Look()).train()
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("at", [4, 6, 8])
@pytest.mark.parametrize("attached", [False, True])
def test_field_note_12_a_schedule_survives_a_resume(make_trainer, plain_source, tmp_path, at, attached):
    """Resumed at an epoch's end or amid one: in the end the same as a run that was never stopped."""

    def make(stop=None):
        torch.manual_seed(0)
        model = Plain()
        model.encoder[2].p = 0.0  # its draws would differ
        callback = WarmStartCallback(plain_source, into="encoder", freeze=True, unfreeze=SCHEDULE)
        watch = Watch(model.encoder)
        trainer = make_trainer(
            model, callback, watch, num_train_epochs=3, save_strategy="steps", save_steps=2, lr_scheduler_type="cosine"
        )
        if attached:
            callback.attach(trainer)
        return model, trainer, watch

    model, trainer, watch = make()
    trainer.train()
    whole = weights(model)
    again, trainer, watch_again = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert equal(weights(again), whole)
    assert watch_again.optimizer == EVERY
    assert watch_again.trainable == watch.trainable[-len(watch_again.trainable) :]
    assert watch_again.rates == watch.rates[-len(watch_again.rates) :]


def test_another_schedule_on_resume_is_told_in_words(make_trainer, plain_source):
    first = WarmStartCallback(plain_source, into="encoder", freeze=True, unfreeze=SCHEDULE)
    make_trainer(Plain(), first, save_strategy="epoch").train()
    callback = WarmStartCallback(plain_source, into="encoder", freeze=True)
    trainer = make_trainer(Plain(), callback, num_train_epochs=2)
    callback.attach(trainer)
    with pytest.raises(FrozenChangedError, match="was to release 9 frozen tensors, this one 0"):
        trainer.train(resume_from_checkpoint=True)


def test_training_twice_goes_on_with_the_schedule(make_trainer, plain_source):
    model = Plain()
    callback = WarmStartCallback(plain_source, into="encoder", freeze=True, unfreeze={2: "encoder.3"})
    trainer = make_trainer(model, callback)
    trainer.train()
    assert not model.encoder[3].weight.requires_grad
    trainer.args.num_train_epochs = 3
    trainer.train()
    assert model.encoder[3].weight.requires_grad
    assert not torch.equal(model.encoder[3].weight, torch.load(plain_source, weights_only=True)["3.weight"])


@pytest.mark.parametrize(("freeze", "match"), [(False, "freezes"), ("encoder.0", "freezes")])
def test_a_schedule_of_what_is_not_frozen_is_refused(make_trainer, plain_source, fingerprint, freeze, match):
    model = Plain()
    before = fingerprint(model)
    with pytest.raises(MappingError, match=match):
        make_trainer(model, WarmStartCallback(plain_source, into="encoder", freeze=freeze, unfreeze={1: "encoder.3"}))
    assert fingerprint(model) == before


def test_evaluation_between_epochs_changes_nothing_frozen(make_trainer, plain_source):
    model = Plain()
    trainer = make_trainer(
        model, WarmStartCallback(plain_source, into="encoder", freeze=True), num_train_epochs=2, eval_strategy="epoch"
    )
    trainer.train()
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))
    assert len([row for row in trainer.state.log_history if "eval_loss" in row]) == 2


def test_a_user_s_own_optimizer_may_hold_what_is_released_later(make_trainer, plain_source):
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    callback = WarmStartCallback(plain_source, into="encoder", freeze=True, unfreeze={1: "encoder"})
    trainer = make_trainer(model, callback, optimizers=(optimizer, None), num_train_epochs=2)
    trainer.train()
    source = torch.load(plain_source, weights_only=True)
    assert not torch.equal(model.encoder[0].weight, source["0.weight"])
    assert optimizer.state[model.encoder[0].weight]["step"] == 4  # of eight


def test_a_change_of_the_freeze_that_is_meant_is_allowed(make_trainer, plain_source):
    first = WarmStartCallback(plain_source, into="encoder", freeze="encoder.1.bias")
    make_trainer(Plain(), first, save_strategy="epoch").train()
    callback = WarmStartCallback(plain_source, into="encoder", freeze="encoder.3.bias", on_freeze_change="allow")
    trainer = make_trainer(Plain(), callback, num_train_epochs=2)
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert [n for n, p in trainer.model.named_parameters() if not p.requires_grad] == ["encoder.3.bias"]


def test_training_twice_keeps_what_the_schedule_was_in_the_manifest(make_trainer, plain_source, tmp_path):
    """A descendant of the second training still finds its optimizer's shape in it."""

    def callback():
        return WarmStartCallback(plain_source, into="encoder", freeze=True, unfreeze=SCHEDULE)

    first = callback()
    trainer = make_trainer(Plain(), first, num_train_epochs=2, save_strategy="epoch")
    first.attach(trainer)
    trainer.train()
    trainer.train()
    again = callback()
    trainer = make_trainer(Plain(), again, num_train_epochs=3)
    again.attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
