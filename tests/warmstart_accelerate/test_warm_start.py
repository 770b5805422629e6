"""One line before `prepare`, on one process: what trains is what was loaded, and it trains as a hand-written load does."""

from __future__ import annotations

import copy
import pickle

import loops
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import nn

import warmstart
from warmstart import FrozenChangedError, MappingError, Pretrained, VerificationError
from warmstart_accelerate import warm_start


def by_hand(source):
    def load(model):
        model.encoder.load_state_dict(torch.load(source))

    return load


def test_the_loss_curve_is_bit_equal_to_that_of_a_load_by_hand(source):
    ours = loops.train(source)
    loops.fresh()
    theirs = loops.train(None, load=by_hand(source))
    assert ours.losses == theirs.losses
    assert loops.equal(loops.weights(ours.model), loops.weights(theirs.model))
    assert ours.report.status == "applied"
    assert ours.report.verified == "full"


def test_training_starts_from_the_values_of_the_file(source):
    seen = loops.train(source, freeze=["encoder.0", "encoder.3"])
    for name, value in torch.load(source).items():
        if not name.startswith("1."):  # the statistics of the norm that trains have moved by then
            assert torch.equal(seen.start[f"encoder.{name}"], value)
    assert loops.equal(
        {k: v for k, v in loops.weights(seen.model).items() if k.startswith(("encoder.0", "encoder.3"))},
        {f"encoder.{k}": v for k, v in torch.load(source).items() if k.startswith(("0", "3"))},
    )


def test_field_note_5_the_objects_stay_and_the_optimizer_trains_them(source):
    torch.manual_seed(0)
    model = loops.Net()
    before = {name: id(p) for name, p in model.named_parameters()}
    seen = loops.train(source, model=model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    held = {id(p) for o in seen.accelerator._optimizers for g in o.param_groups for p in g["params"]}
    assert held == set(before.values())
    end = loops.weights(model)
    assert not torch.equal(end["encoder.0.weight"], torch.load(source)["0.weight"])


def test_field_notes_11_and_33_what_is_frozen_keeps_its_bits_and_its_mode(source):
    seen = loops.train(source, freeze=True)
    expected = {f"encoder.{name}": value for name, value in torch.load(source).items()}
    assert loops.equal({k: v for k, v in loops.weights(seen.model).items() if k.startswith("encoder.")}, expected)
    assert not any(m.training for m in seen.model.encoder.modules())
    held = {id(p) for o in seen.accelerator._optimizers for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in seen.model.head.parameters()}
    seen.accelerator.end_training()


def test_the_first_training_forward_finds_what_was_overwritten_since(source):
    accelerator = Accelerator(cpu=True)
    model = loops.Net()
    report = warm_start(accelerator, model, source, into="encoder")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    nn.init.zeros_(model.encoder[3].weight)
    prepared.eval()
    prepared(torch.randn(8, 4))  # no training
    prepared.train()
    with pytest.raises(VerificationError, match="1 loaded tensors do not hold the checkpoint's values") as caught:
        prepared(torch.randn(8, 4))
    assert caught.value.tensors == ("encoder.3.weight",)
    assert report.status == "failed"


def test_a_model_that_is_never_prepared_is_looked_at_as_well(source):
    model = loops.Net()
    warm_start(Accelerator(cpu=True), model, source, into="encoder")
    nn.init.zeros_(model.encoder[0].bias)
    with pytest.raises(VerificationError, match=r"encoder\.0\.bias"):
        model(torch.randn(8, 4))


def test_a_loop_that_calls_the_parts_of_its_model_gets_the_last_look_before_its_first_step(source):
    """No forward of the model, no hook of it: what has gradients trains."""

    def loop(overwrite):
        loops.fresh()
        accelerator, model = Accelerator(cpu=True), loops.Net()
        report = warm_start(accelerator, model, source, into="encoder", log=False)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if overwrite:
            nn.init.zeros_(model.encoder[3].weight)
        loss = model.head(model.encoder(torch.randn(8, 4))).square().mean()  # moves the statistics
        accelerator.backward(loss)
        optimizer.step()
        model(torch.randn(8, 4))  # nothing is looked at twice
        return report

    assert loop(overwrite=False).status == "applied"
    with pytest.raises(VerificationError, match=r"encoder\.3\.weight"):
        loop(overwrite=True)


def test_a_loop_that_trains_in_eval_mode_by_itself_gets_it_there_too(source):
    """No training forward and no `accelerator.backward`: the optimizer's step is the last moment."""
    accelerator, model = Accelerator(cpu=True), loops.Net().eval()
    report = warm_start(accelerator, model, source, into="encoder", log=False)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    nn.init.zeros_(model.encoder[3].weight)
    before = loops.weights(model)
    prepared(torch.randn(8, 4)).sum().backward()
    with pytest.raises(VerificationError, match=r"encoder\.3\.weight"):
        optimizer.step()
    assert report.status == "failed"
    assert loops.equal(loops.weights(model), before)


def test_report_check_does_it_at_once_and_on_what_was_prepared(source):
    accelerator = Accelerator(cpu=True)
    model = loops.Net()
    report = warm_start(accelerator, model, source, into="encoder")
    prepared = accelerator.prepare(model)
    report.check(prepared)
    nn.init.zeros_(model.encoder[0].bias)
    with pytest.raises(VerificationError, match=r"encoder\.0\.bias"):
        report.check(prepared)


def test_a_copy_or_a_pickle_of_the_model_has_no_hook_that_acts(source):
    model = loops.Net()
    warm_start(Accelerator(cpu=True), model, source, into="encoder")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.zeros_(other.encoder[0].bias)
        other(torch.randn(8, 4))
    model(torch.randn(8, 4))
    assert not model._forward_pre_hooks


def test_two_sources_into_one_model_and_two_models_under_one_accelerator(source, tmp_path):
    head = {"weight": torch.ones(2, 8), "bias": torch.zeros(2)}
    accelerator = Accelerator(cpu=True)
    model, other = loops.Net(), loops.Net()
    warm_start(accelerator, model, source, into="encoder")
    report = warm_start(accelerator, model, head, into="head")
    warm_start(accelerator, loops.Net(), source, into="encoder")  # never prepared, as of a cell that is run again
    warm_start(accelerator, other, source, into="encoder", name="teacher")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    model, other, *_ = accelerator.prepare(model, other, *optimizers)
    for each in (model, other):
        each(torch.randn(8, 4))
    assert report.status == "applied"
    assert torch.equal(model.head.weight, head["weight"])
    third = loops.Net()
    with pytest.raises(MappingError, match=r"both warm_start\[encoder\] .* name="):
        warm_start(accelerator, third, source, into="encoder")
    accelerator.free_memory()  # lets go of both, and of their names
    fresh = loops.Net()
    warm_start(accelerator, fresh, head, into="head")
    with pytest.raises(MappingError, match="two warm starts write 2 of the same entries"):
        warm_start(accelerator, fresh, dict(head), into="head", name="again")


def test_a_list_of_sources_and_fields_in_one_call(source):
    head = {"weight": torch.ones(2, 8), "bias": torch.zeros(2)}
    parts = [Pretrained(source, into="encoder", freeze=True), Pretrained(head, into="head")]
    model = loops.Net()
    report = warm_start(Accelerator(cpu=True), model, parts)
    assert report.coverage == 1
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_before_training_a_second_call_gives_the_first_one_s_report(source):
    accelerator, model = Accelerator(cpu=True), loops.Net()
    first = warm_start(accelerator, model, source, into="encoder")
    assert warm_start(accelerator, model, source, into="encoder") is first


def test_another_accelerator_takes_up_a_model_that_was_trained(source):
    seen = loops.train(source, freeze=True)
    end = loops.weights(seen.model)
    report = warm_start(Accelerator(cpu=True), seen.model, source, into="encoder", freeze=True)
    assert report.status == "already-applied"
    assert loops.equal(loops.weights(seen.model), end)
    assert len(report.frozen) == 9


def test_nothing_is_written_on_an_error(source, fingerprint):
    model = loops.Net(width=6)
    before = fingerprint(model)
    with pytest.raises(MappingError, match="mismatched"):
        warm_start(Accelerator(cpu=True), model, source, into="encoder", freeze=True)
    assert fingerprint(model) == before
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_field_note_8_neither_mixed_precision_nor_accumulation_undoes_the_load(source, precision, accumulate):
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    seen = loops.train(source, accelerator=accelerator, freeze=["encoder.0", "encoder.1"])
    assert seen.report.status == "applied"
    expected = torch.load(source)
    assert torch.equal(seen.start["encoder.3.weight"], expected["3.weight"])
    assert torch.equal(loops.weights(seen.model)["encoder.0.weight"], expected["0.weight"])
    assert not torch.equal(loops.weights(seen.model)["encoder.3.weight"], expected["3.weight"])


def test_a_compiled_model_is_looked_at_outside_of_its_graph(source):
    plugin = TorchDynamoPlugin(backend="eager")
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    model = loops.Smooth()
    report = warm_start(accelerator, model, loops.trained_encoder(loops.Smooth), into="encoder")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert type(prepared).__name__ == "OptimizedModule"
    nn.init.zeros_(model.encoder[0].bias)
    with pytest.raises(VerificationError, match=r"encoder\.0\.bias"):
        prepared(torch.randn(8, 4))
    assert report.status == "failed"


@pytest.mark.parametrize("overwrite", [False, True])
def test_accumulated_and_compiled_at_once(overwrite):
    plugin = TorchDynamoPlugin(backend="eager")
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin, gradient_accumulation_steps=2)
    encoder, model, seen = loops.trained_encoder(loops.Smooth), loops.Smooth(), []

    def each_step(step, model, optimizer):
        seen.append(torch.equal(model.encoder[2].weight, encoder["2.weight"]))

    def by_hand(model):
        model.encoder.load_state_dict(encoder)
        model.encoder[0].requires_grad_(False)

    options = {"kind": loops.Smooth, "freeze": "encoder.0", "each_step": each_step}
    if overwrite:
        report = warm_start(accelerator, model, encoder, into="encoder", freeze="encoder.0")
        nn.init.zeros_(model.encoder[2].bias)
        with pytest.raises(VerificationError, match=r"encoder\.2\.bias"):
            loops.train(encoder, model=model, accelerator=accelerator, **options)
        assert report.status == "failed"
        return
    run = loops.train(encoder, accelerator=accelerator, **options)
    assert seen == [True, False, False, False]  # what was loaded holds until the second batch's step
    assert run.report.status == "applied"
    assert torch.equal(run.model.encoder[0].weight, encoder["0.weight"])
    loops.fresh()
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin, gradient_accumulation_steps=2)
    assert loops.train(None, accelerator=accelerator, kind=loops.Smooth, load=by_hand).losses == run.losses


def test_a_hook_that_writes_after_the_start_is_found_when_the_state_is_saved_and_at_the_end(source, tmp_path):
    seen = loops.train(source, freeze=True)
    with torch.no_grad():
        seen.model.encoder[0].bias.add_(1)
    with pytest.raises(FrozenChangedError, match=r"encoder\.0\.bias"):
        seen.accelerator.save_state(tmp_path / "state")
    with pytest.raises(FrozenChangedError, match=r"encoder\.0\.bias"):
        seen.accelerator.end_training()


def test_release_at_a_step_of_the_loop(source):
    released = {}

    def each_step(step, model, optimizer):
        if step == 2:
            released["before"] = loops.weights(model)["encoder.0.weight"]
            report.frozen.release(["encoder.0"], optimizer)

    accelerator, model = Accelerator(cpu=True), loops.Net()
    report = warm_start(accelerator, model, source, into="encoder", freeze=True)
    seen = loops.train(source, model=model, accelerator=accelerator, freeze=True, each_step=each_step)
    assert seen.report is report
    assert torch.equal(released["before"], torch.load(source)["0.weight"])
    end = loops.weights(model)
    assert not torch.equal(end["encoder.0.weight"], released["before"])
    assert torch.equal(end["encoder.3.weight"], torch.load(source)["3.weight"])
    accelerator.end_training()


def test_release_by_the_schedule_counts_optimizer_steps(source):
    trains = []

    def each_step(step, model, optimizer):
        trains.append(model.encoder[0].weight.requires_grad)

    seen = loops.train(source, freeze=True, unfreeze={3: "encoder.0"}, each_step=each_step)
    assert trains == [False, False, True, True]
    end = loops.weights(seen.model)
    assert not torch.equal(end["encoder.0.weight"], torch.load(source)["0.weight"])
    assert torch.equal(end["encoder.3.weight"], torch.load(source)["3.weight"])


def test_epochs_cannot_be_counted(source):
    with pytest.raises(MappingError, match="only optimizer steps"):
        warm_start(Accelerator(cpu=True), loops.Net(), source, freeze=True, unfreeze={1: "x"}, unfreeze_unit="epoch")


def test_param_groups_by_what_was_loaded(source):
    accelerator, model = Accelerator(cpu=True), loops.Net()
    report = warm_start(accelerator, model, source, into="encoder")
    optimizer = torch.optim.SGD(warmstart.param_groups(model, report, lr=0.1, loaded_lr_scale=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model.encoder.parameters()} == {0.05}
    assert {rates[id(p)] for p in model.head.parameters()} == {0.1}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared(torch.randn(8, 4))
    assert report.status == "applied"


def test_arguments_the_wrong_way_round(source):
    with pytest.raises(TypeError, match="the accelerator comes first"):
        warm_start(loops.Net(), Accelerator(cpu=True), source)
