"""A loop in the wrong order gets our error at that line, with the lines in the right order."""

from __future__ import annotations

import loops
import pytest
import torch
from accelerate import Accelerator
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
