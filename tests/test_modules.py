"""Every module of a model, once, in torch's own order."""

from __future__ import annotations

import sys

import torch
from torch import nn

import warmstart
from warmstart.modules import every_module


def test_modules_that_are_shared_absent_or_in_a_circle_are_there_once_in_torch_s_order():
    model, inner = nn.Module(), nn.Module()
    shared = nn.Linear(1, 1)
    model.first, model.twice = inner, nn.ModuleDict({"a": inner, "b": nn.Sequential(shared, nn.ReLU())})
    inner.layer, inner.back = shared, model
    inner.register_module("absent", None)
    assert list(every_module(model).items()) == [(module, name) for name, module in model.named_modules()]


def test_a_chain_of_modules_deeper_than_python_s_stack_is_loaded():
    depth = sys.getrecursionlimit() + 10
    model = nn.Linear(2, 2)
    for _ in range(depth):
        model = nn.Sequential(model)
    source = {"0." * depth + "weight": torch.ones(2, 2), "0." * depth + "bias": torch.full((2,), 3.0)}
    warmstart.load(model, source)
    inner = list(every_module(model))[-1]
    assert torch.equal(inner.weight, torch.ones(2, 2))
    assert torch.equal(inner.bias, torch.full((2,), 3.0))
