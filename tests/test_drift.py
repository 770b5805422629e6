"""How far loaded layers moved, by a sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart.drift import Drift


def make(source=None):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 3)), "head": nn.Linear(3, 2)})
    source = source if source is not None else nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 3)).state_dict()
    return model, warmstart.load(model, source, into="body")


def test_the_distance_is_relative_and_per_module():
    model, report = make()
    drift = Drift.of(report, model)
    assert drift.measure(model) == {"body.0": 0.0, "body.1": 0.0}
    with torch.no_grad():
        for parameter in model["body"][1].parameters():
            parameter.mul_(1.5)
    assert drift.measure(model)["body.0"] == 0.0
    assert drift.measure(model)["body.1"] == pytest.approx(0.5, rel=1e-6)


def test_a_sample_of_a_large_parameter_stands_for_all_of_it():
    model, report = make()
    drift, weight = Drift.of(report, model), model["body"][0].weight  # of 7200 elements 4096 are looked at
    before = [p.detach().clone() for p in model["body"][0].parameters()]
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.01)
    moved = (weight.detach() - before[0]).norm() / torch.cat([p.flatten() for p in before]).norm()
    assert drift.measure(model)["body.0"] == pytest.approx(float(moved), rel=0.05)


def test_what_is_frozen_and_what_is_new_is_left_out():
    model, report = make()
    drift = Drift.of(report, model)
    model["body"][0].requires_grad_(False)
    assert drift.measure(model).keys() == {"body.1"}


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_superseded_load_is_measured_from_its_file(tmp_path, on_disk):
    path = tmp_path / "source.pt"
    torch.save(nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 3)).state_dict(), path)
    model, report = make(path if on_disk else torch.load(path, weights_only=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    report.status = "superseded-by-resume"
    found = Drift.of(report, model).measure(model)
    assert found == pytest.approx({"body.0": 2.0, "body.1": 2.0} if on_disk else {})


def test_many_layers_are_few_modules():
    layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(12))
    report = warmstart.load(layers, {k: v.clone() for k, v in layers.state_dict().items()})
    assert set(Drift.of(report, layers).measure(layers)) == {str(i) for i in range(12)}
