"""Without a process group it is a plain block; real processes agree in distributed/test_agreement.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import warmstart
from warmstart import VerificationError
from warmstart.loading.agreement import agree, raised_on_all
from warmstart.loading.fingerprint import SECTIONS, details, fingerprint


def test_alone_an_error_is_itself():
    error = VerificationError("here", tensors=("a",))
    with pytest.raises(VerificationError) as caught, raised_on_all():
        raise error
    assert caught.value is error


def test_alone_an_error_of_another_kind_is_itself():
    with pytest.raises(ZeroDivisionError), raised_on_all():
        raise ZeroDivisionError


def test_alone_nothing_is_read_to_agree():
    plan = warmstart.plan(nn.Linear(2, 2), nn.Linear(2, 2).state_dict())
    agree(plan, None, verify="full")
    assert plan.parts[0].checkpoint.bytes_read == 0


def test_the_processes_of_the_fake_backend_do_not_exist_and_are_not_waited_for():
    script = """
import torch, torch.distributed as dist, warmstart
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=3, world_size=64, store=FakeStore())
net = torch.nn.Linear(2, 2)
report = warmstart.load(net, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
assert report.status == "applied" and bool((net.weight == 1).all())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_fingerprint_has_a_digest_for_each_thing_that_can_differ():
    source = nn.Linear(40, 3).state_dict()
    net = nn.Linear(40, 3)
    before = fingerprint(warmstart.plan(net, source), {"verify": "full"})
    changed = {name: value.clone() for name, value in source.items()}
    changed["weight"][2, 39] += 1
    after = fingerprint(warmstart.plan(net, changed), {"verify": "off"})
    assert [section for section in SECTIONS if before[section] != after[section]] == ["call", "bytes"]
    bare = fingerprint(
        warmstart.plan(nn.Linear(40, 3), source, exclude="bias", allow_unexpected="bias"), {"verify": "full"}
    )
    assert [section for section in SECTIONS if before[section] != bare[section]] == ["plan", "bytes"]


def test_a_few_elements_of_each_tensor_are_sampled_and_no_more():
    plan = warmstart.plan(nn.Linear(1000, 1000), nn.Linear(1000, 1000).state_dict())
    assert set(details(plan, {}, "bytes")) == {"weight", "bias"}
    assert plan.parts[0].checkpoint.bytes_read == 2 * 2 * 16 * 4


def test_scalars_and_empty_tensors_are_sampled_too():
    net = nn.Module()
    net.register_buffer("steps", torch.tensor(3))
    net.register_buffer("empty", torch.empty(0, 4))
    plan = warmstart.plan(net, {"steps": torch.tensor(5), "empty": torch.empty(0, 4)})
    assert set(details(plan, {}, "bytes")) == {"steps"}
