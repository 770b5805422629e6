"""The moment: before the optimizer, once for each model, never a silent cold start."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from tiny import Plain, bert, equal, numbers, weights
from torch import nn
from transformers import TrainerCallback

from warmstart import MappingError, TimingError, VerificationError
from warmstart_transformers import WarmStartCallback


class Look(TrainerCallback):
    """What the model held when training started, and what the optimizer had."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.start = weights(model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.in_optimizer = {name for name, p in model.named_parameters() if id(p) in held}


def test_building_the_trainer_loads_and_training_starts_from_it(make_trainer, plain_source, capsys):
    model, look = Plain(), Look()
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(model, callback, look)
    expected = torch.load(plain_source, weights_only=True)
    assert equal(weights(model.encoder), expected)
    trainer.train()
    assert equal({n.removeprefix("encoder."): v for n, v in look.start.items() if n.startswith("encoder.")}, expected)
    assert not equal(weights(model.encoder), expected)
    assert callback.report.status == "applied"
    assert callback.report.coverage == 1
    assert "encoder.pt" in capsys.readouterr().out


def test_a_base_goes_into_the_base_of_a_model_with_a_head(make_trainer, bert_source):
    """`into` is `base_model_prefix` where the names say so: nothing to allow for the head."""
    model = bert()
    head = weights(model.classifier)
    callback = WarmStartCallback(bert_source)
    make_trainer(model, callback).train()
    assert callback.report.plan.parts[0].pretrained.into == "bert"
    assert set(callback.report.excluded) == {"classifier.weight", "classifier.bias"}
    assert callback.report.status == "applied"
    fresh = bert()
    trainer = make_trainer(fresh, WarmStartCallback(bert_source))
    source = load_file(bert_source)
    assert all(torch.equal(value, source[name]) for name, value in trainer.model.bert.state_dict().items())
    assert equal(weights(fresh.classifier), head)


def test_training_twice_goes_on_from_the_first(make_trainer, plain_source):
    model, look = Plain(), Look()
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(model, callback, look)
    trainer.train()
    first = weights(model)
    trainer.train()
    assert equal(look.start, first)
    assert not equal(weights(model), first)


def test_another_trainer_over_the_same_model_goes_on_too(make_trainer, plain_source):
    model = Plain()
    make_trainer(model, WarmStartCallback(plain_source, into="encoder")).train()
    trained = weights(model)
    again = WarmStartCallback(plain_source, into="encoder")
    look = Look()
    make_trainer(model, again, look).train()
    assert equal(look.start, trained)


def test_evaluating_and_predicting_load_nothing(make_trainer, plain_source):
    """Field note 9: building loads; what is evaluated afterwards is what was trained."""
    model = Plain()
    trainer = make_trainer(model, WarmStartCallback(plain_source, into="encoder"))
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained = weights(model)
    after = trainer.evaluate()["eval_loss"]
    trainer.predict(numbers())
    assert equal(weights(model), trained)
    assert before != after


def test_evaluating_alone_is_right_and_asks_for_no_training(make_trainer, plain_source):
    model = Plain()
    trainer = make_trainer(model, WarmStartCallback(plain_source, into="encoder"))
    trainer.evaluate()
    trainer.predict(numbers())
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))


def test_added_later_it_is_refused_before_the_first_step(make_trainer, plain_source):
    """Field note 46: `add_callback` after the Trainer was built brings no event before training."""
    model = Plain()
    cold = weights(model)
    trainer = make_trainer(model)
    trainer.add_callback(WarmStartCallback(plain_source, into="encoder"))
    with pytest.raises(TimingError, match=r"callback\.attach\(trainer\)"):
        trainer.train()
    assert equal(weights(model), cold)


def test_added_later_and_attached_it_loads(make_trainer, plain_source):
    model, look = Plain(), Look()
    trainer = make_trainer(model, look)
    callback = WarmStartCallback(plain_source, into="encoder", freeze=True)
    assert callback.attach(trainer) is callback
    assert callback in trainer.callback_handler.callbacks
    trainer.train()
    expected = torch.load(plain_source, weights_only=True)
    assert equal(weights(model.encoder), expected)
    assert look.in_optimizer == {"head.weight", "head.bias"}


def test_field_note_46_model_init_alone_is_refused(make_trainer, plain_source):
    trainer = make_trainer(None, WarmStartCallback(plain_source, into="encoder"), model_init=Plain)
    with pytest.raises(TimingError, match=r"model_init=callback\.wrap_model_init\(model_init\)"):
        trainer.train()


@pytest.mark.parametrize("way", ["wrapped", "attached", "both"])
def test_model_init_starts_warm_each_time(make_trainer, plain_source, way):
    callback, look = WarmStartCallback(plain_source, into="encoder", freeze=True), Look()
    init = Plain if way == "attached" else callback.wrap_model_init(Plain)
    trainer = make_trainer(None, callback, look, model_init=init)
    if way != "wrapped":
        callback.attach(trainer)
    models = []
    for _ in range(2):
        trainer.train()
        models.append(trainer.model)
        assert equal(weights(trainer.model.encoder), torch.load(plain_source, weights_only=True))
        assert look.in_optimizer == {"head.weight", "head.bias"}
        assert callback.report.status == "applied"
    assert models[0] is not models[1]


def test_model_init_may_take_the_trial(make_trainer, plain_source):
    seen = []

    def init(trial):
        seen.append(trial)
        return Plain()

    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(None, callback, model_init=callback.wrap_model_init(init))
    trainer.train()
    assert seen == [None, None]
    assert callback.report.status == "applied"


def test_a_model_put_in_later_is_refused_or_loaded(make_trainer, plain_source):
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback)
    trainer.model = trainer.model_wrapped = Plain()
    with pytest.raises(TimingError, match=r"callback\.attach\(trainer\)"):
        trainer.train()

    other, look = Plain(), Look()
    trainer = make_trainer(Plain(), callback, look)
    callback.attach(trainer)
    trainer.model = trainer.model_wrapped = other
    trainer.train()
    expected = torch.load(plain_source, weights_only=True)
    assert equal({n.removeprefix("encoder."): v for n, v in look.start.items() if n.startswith("encoder.")}, expected)


def test_a_model_put_in_after_training_meets_the_old_optimizer(make_trainer, plain_source):
    """The Trainer keeps its optimizer, which would train nothing of the new model."""
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback)
    callback.attach(trainer)
    trainer.train()
    trainer.model = trainer.model_wrapped = Plain()
    with pytest.raises(TimingError, match="holds none of the model's"):
        trainer.train()


def test_a_user_s_own_optimizer_trains_what_was_loaded(make_trainer, plain_source):
    model, look = Plain(), Look()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(model, callback, look, optimizers=(optimizer, None))
    trainer.train()
    expected = torch.load(plain_source, weights_only=True)
    assert torch.equal(look.start["encoder.0.weight"], expected["0.weight"])
    assert not torch.equal(model.encoder[0].weight, expected["0.weight"])
    assert look.in_optimizer == {name for name, _ in model.named_parameters()}


def test_a_user_s_own_optimizer_that_holds_what_is_to_be_frozen_is_refused(make_trainer, plain_source, fingerprint):
    model = Plain()
    before = fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TimingError, match="to be frozen are in an optimizer already"):
        make_trainer(model, WarmStartCallback(plain_source, into="encoder", freeze=True), optimizers=(optimizer, None))
    assert fingerprint(model) == before
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    make_trainer(
        model, WarmStartCallback(plain_source, into="encoder", freeze=True), optimizers=(optimizer, None)
    ).train()
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))


def test_an_error_in_the_plan_leaves_the_model_untouched(make_trainer, plain_source, fingerprint):
    model = Plain()
    before = fingerprint(model)
    with pytest.raises(MappingError):
        make_trainer(model, WarmStartCallback(plain_source, into="head"))
    assert fingerprint(model) == before


@pytest.mark.parametrize("moment", ["on_train_begin", "on_epoch_begin"])
def test_what_is_written_after_the_load_is_found_before_the_first_step(make_trainer, plain_source, moment):
    model, steps = Plain(), []

    def write(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.encoder[0].weight.add_(1)

    other = type("Other", (TrainerCallback,), {moment: write})()
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    trainer = make_trainer(model, other, WarmStartCallback(plain_source, into="encoder"))
    with pytest.raises(VerificationError, match=r"encoder\.0\.weight"):
        trainer.train()
    assert steps == []


def test_field_note_10_a_late_init_pass_is_found(make_trainer, bert_source):
    class InitLate(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for module in model.modules():
                vars(module).pop("_is_hf_initialized", None)
                for parameter in module.parameters(recurse=False):
                    vars(parameter).pop("_is_hf_initialized", None)
            model.init_weights()

    trainer = make_trainer(bert(), InitLate(), WarmStartCallback(bert_source))
    with pytest.raises(VerificationError, match=r"bert\.embeddings"):
        trainer.train()


def test_two_write_two_parts(make_trainer, plain_source):
    model = Plain()
    head = nn.Linear(8, 2).state_dict()
    callbacks = [WarmStartCallback(plain_source, into="encoder", freeze=True), WarmStartCallback(head, into="head")]
    trainer = make_trainer(model, *callbacks)
    assert equal(weights(model.head), head)
    trainer.train()
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))
    assert [c.report.status for c in callbacks] == ["applied", "applied"]


def test_two_that_write_the_same_are_refused(make_trainer, plain_source):
    other = Plain().encoder.state_dict()
    second = WarmStartCallback(other, into="encoder", name="second")
    with pytest.raises(MappingError, match="two warm starts write 9 of the same entries"):
        make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"), second)


def test_it_can_be_copied_and_pickled(make_trainer, plain_source):
    callback = WarmStartCallback(plain_source, into="encoder")
    make_trainer(Plain(), callback).train()
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.state_key == callback.state_key
        assert twin.report is None
        model = Plain()
        make_trainer(model, twin)
        assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))


@pytest.mark.parametrize("wrong", [{"unfreeze_unit": "week"}, {"held": "train "}, {"unfreeze": {0: "encoder"}}])
def test_what_cannot_be_meant_is_refused_at_once(plain_source, wrong):
    with pytest.raises(MappingError):
        WarmStartCallback(plain_source, **wrong)
