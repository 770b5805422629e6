"""A loop in the wrong order gets our error at that line, with the lines in the right order."""

from __future__ import annotations

import copy
import re

import loops
import pytest
import torch
from accelerate import Accelerator, dispatch_model, init_empty_weights
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.nn.parallel import DataParallel

from warmstart import TimingError
from warmstart_accelerate import warm_start
from warmstart_accelerate.timing import live_optimizers


def test_load_after_prepare(source, fingerprint):
    accelerator = Accelerator(cpu=True)
    model = loops.Net()
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = fingerprint(model)
    for each in (prepared, model):
        with pytest.raises(TimingError) as caught:
            warm_start(accelerator, each, source, into="encoder")
        report, prepare = str(caught.value).splitlines()[-2:]
        assert "report = warm_start(accelerator, model, ...)" in report
        assert "model, optimizer = accelerator.prepare(model, optimizer)" in prepare
    assert fingerprint(model) == before


def test_a_wrapper_of_one_s_own_comes_too_early(source):
    with pytest.raises(TimingError, match="wrapped in DataParallel already"):
        warm_start(Accelerator(cpu=True), DataParallel(loops.Net()), source, into="encoder")


def test_optimizer_first(source, fingerprint):
    model = loops.Net()
    optimizer = torch.optim.AdamW(model.parameters())
    before = fingerprint(model)
    with pytest.raises(TimingError, match="6 parameters that are to be frozen are in an optimizer already") as caught:
        warm_start(Accelerator(cpu=True), model, source, into="encoder", freeze=True)
    report, made = str(caught.value).splitlines()[-2:]
    assert "report = warm_start(accelerator, model, ...)" in report
    assert "optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)" in made
    assert fingerprint(model) == before
    assert optimizer.param_groups


def test_an_optimizer_that_is_no_more_does_not_count(source):
    model = loops.Net()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # the two are a cycle
    assert live_optimizers(model) == [optimizer]
    del optimizer, scheduler
    warm_start(Accelerator(cpu=True), model, source, into="encoder", freeze=True)


def test_an_optimizer_of_what_is_not_frozen_may_be_there(source):
    model = loops.Net()
    optimizer = torch.optim.AdamW(model.head.parameters())
    report = warm_start(Accelerator(cpu=True), model, source, into="encoder", freeze=True)
    assert report.status == "applied"
    assert optimizer.param_groups


def test_x_an_optimizer_of_what_is_loaded_and_trains_keeps_its_parameters(source):
    """Values are written in place, so that an optimizer that was first still holds what trains."""
    model = loops.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True)
    report = warm_start(accelerator, model, source, into="encoder")
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(torch.randn(8, 4)).square().mean())
    optimizer.step()
    assert report.status == "applied"
    assert not torch.equal(model.encoder[0].weight, torch.load(source)["0.weight"])


def test_an_optimizer_of_parameters_that_were_replaced(source):
    accelerator = Accelerator(cpu=True)
    model = loops.Net()
    warm_start(accelerator, model, source, into="encoder")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.encoder[0].weight = nn.Parameter(model.encoder[0].weight.detach().clone())
    prepared, optimizer = accelerator.prepare(model, optimizer)
    with pytest.raises(TimingError, match="holds 1 loaded parameters that the model has replaced"):
        prepared(torch.randn(8, 4))


def test_an_optimizer_of_another_model(source):
    accelerator = Accelerator(cpu=True)
    model = loops.Net()
    warm_start(accelerator, model, source, into="encoder")
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(loops.Net().parameters(), lr=0.1))
    with pytest.raises(TimingError, match="SGD holds none of the model's 8 trainable parameters"):
        prepared(torch.randn(8, 4))


@pytest.mark.parametrize("prepare", [True, False])
def test_what_is_left_without_memory_is_refused_before_anything_moves_it(source, prepare):
    """field_note_23."""
    with init_empty_weights():
        model = loops.Net()
    accelerator = Accelerator(cpu=True)
    warm_start(accelerator, model, source, into="encoder")
    with pytest.raises(TimingError, match="2 parameters of the Net are on the meta device") as caught:
        accelerator.prepare(model) if prepare else model(torch.randn(8, 4))
    assert "allow_missing=" in str(caught.value)
    assert str(caught.value).endswith("model, optimizer = accelerator.prepare(model, optimizer)")
    assert "head.{bias,weight}" in str(caught.value) or "head.weight" in str(caught.value)
    warm_start(accelerator, model, {"weight": torch.ones(2, 8), "bias": torch.zeros(2)}, into="head")
    assert accelerator.prepare(model)(torch.randn(8, 4)).shape == (8, 2)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (DistributedType.FSDP, "FullyShardedDataParallelPlugin(fsdp_version=2)"),
        (DistributedType.MEGATRON_LM, "fsdp_version=2"),
    ],
)
def test_engines_with_parameters_of_their_own_are_refused_in_words(source, monkeypatch, kind, line):
    """Accelerate makes them on accelerators only: its state is told."""
    accelerator, model = Accelerator(cpu=True), loops.Net()
    before = loops.weights(model)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=1))
    with pytest.raises(TimingError, match=re.escape(line)):
        warm_start(accelerator, model, source, into="encoder")
    assert loops.equal(loops.weights(model), before)


@pytest.mark.parametrize(
    "other", [lambda model: type(model)(), copy.deepcopy, lambda model: nn.Sequential(loops.Net())]
)
def test_another_model_in_the_place_of_the_one_that_was_loaded(source, other):
    accelerator, model = Accelerator(cpu=True), loops.Net()
    warm_start(accelerator, model, source, into="encoder")
    model = other(model)
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        TimingError, match=r"the Net that trains is not the one that was loaded(.|\n)*accelerator\.prepare\("
    ):
        accelerator.backward(prepared(torch.randn(8, 4)).sum())
    accelerator.free_memory()  # lets go of both
    prepared = accelerator.prepare(loops.Net())
    accelerator.backward(prepared(torch.randn(8, 4)).sum())


@pytest.mark.parametrize(
    "teach",
    [
        lambda teacher, x: teacher(x),  # in training mode too
        lambda teacher, x: teacher.eval().head(teacher.encoder(x)),
        lambda teacher, x: teacher.requires_grad_(False).head(teacher.encoder(x)),
    ],
    ids=["forward", "its parts in eval mode", "its parts without gradients"],
)
def test_a_teacher_of_the_student_s_class_is_not_prepared_and_no_mistake(teach):
    accelerator, teacher, student = Accelerator(cpu=True), loops.Smooth(), loops.Smooth()
    report = warm_start(accelerator, teacher, loops.trained_encoder(loops.Smooth), into="encoder")
    student, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1))
    x = torch.randn(8, 4)
    with torch.no_grad():
        target = teach(teacher, x)
    accelerator.backward((student(x) - target).square().mean())
    optimizer.step()
    report.check(teacher)


def test_dispatched_after_the_load(source, tmp_path):
    model = loops.Net()
    accelerator = Accelerator(cpu=True)
    warm_start(accelerator, model, source, into="encoder", freeze=True)
    dispatch_model(model, {"encoder": "disk", "head": "cpu"}, main_device="cpu", offload_dir=tmp_path / "offload")
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    with pytest.raises(TimingError, match=r"dispatched or offloaded after the load(.|\n)*dispatch first, then load"):
        prepared(torch.randn(8, 4))


def test_load_state_before_prepare(source, tmp_path):
    loops.train(source, steps=1, save=tmp_path / "state")
    loops.fresh()
    accelerator, model = Accelerator(cpu=True), loops.Net()
    warm_start(accelerator, model, source, into="encoder")
    with pytest.raises(TimingError, match=r"the Net was not yet(.|\n)*prepare first, then restore"):
        accelerator.load_state(tmp_path / "state")
    other = nn.Linear(4, 2)
    other, _ = accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(TimingError, match="the Net was not yet"):  # the state has a part of it
        accelerator.load_state(tmp_path / "state")
