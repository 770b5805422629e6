"""`warmstart diff`: names, shapes, dtypes, and values by relative distance."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from warmstart.cli.comparing import Sums


@pytest.fixture
def other(state, tmp_path):
    changed = {k: v.clone() for k, v in state.items()}
    changed["encoder.layer.0.q.weight"] *= 1.5
    changed["encoder.layer.2.k.bias"] = torch.randn(8)
    changed["encoder.layer.1.v.bias"] = changed["encoder.layer.1.v.bias"].half()
    del changed["encoder.layer.2.q.bias"]
    changed["head.weight"] = torch.ones(2, 2)
    save_file(changed, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_equal_files_are_equal_whatever_their_format(run, source, state, tmp_path):
    torch.save(state, tmp_path / "same.pt")
    ran = run("diff", source, "same.pt")
    assert ran.code == 0
    assert ran.out.endswith("values: 18 of 18 tensors are equal bit for bit\nequal\n")


def test_every_difference_is_told(run, source, other):
    data = (ran := run("diff", source, other, "--json")).data
    assert ran.code == 1
    assert not data["equal"]
    assert data["only_a"] == ["encoder.layer.2.q.bias"]
    assert data["only_b"] == ["head.weight"]
    assert data["shapes"] == {"encoder.layer.2.k.bias": [[16], [8]]}
    assert data["dtypes"] == {"encoder.layer.1.v.bias": ["float32", "float16"]}
    assert data["tensors"]["encoder.layer.0.q.weight"] == {"distance": pytest.approx(0.5), "equal": 0, "tensors": 1}
    assert data["modules"]["encoder.layer.0.k"] == {"distance": 0.0, "equal": 2, "tensors": 2}
    assert 0 < data["modules"]["encoder.layer.1.v"]["distance"] < 1e-3
    text = run("diff", source, other).out
    assert "encoder.layer.2.k.bias  A (16,), B (8,)" in text
    *_, first, second, last = text.splitlines()
    assert first.split() == ["5e-01", "encoder.layer.0.q"]
    assert second.split()[1:] == ["encoder.layer.1.v"]
    assert last == "they differ"


def test_names_only_reads_no_tensor(run, source, other):
    data = run("diff", source, other, "--names_only", "--json").data
    assert data["tensors"] is data["modules"] is None
    assert data["only_b"] == ["head.weight"]


def test_rules_apply_to_the_first(run, source, state, tmp_path):
    renamed = {f"bert.{k.removeprefix('encoder.')}": v for k, v in state.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    ran = run("diff", source, "renamed.safetensors")
    assert ran.code == 1
    assert """18 of A's fit B's under --strip_prefix 'encoder' --rename '{"^": "bert."}'""" in ran.out
    assert (
        run("diff", source, "renamed.safetensors", "--strip_prefix", "encoder", "--rename", '{"^": "bert."}').code == 0
    )
    assert run("diff", source, "renamed.safetensors", "--rename", '{"encoder": "bert"}').code == 0


def test_trees_of_both_are_chosen(run, state, tmp_path):
    torch.save({"model": state, "ema": state}, tmp_path / "two.pt")
    assert run("diff", "two.pt", "two.pt").code == 3
    assert run("diff", "two.pt", "two.pt", "--checkpoint_key", "model", "--other_checkpoint_key", "ema").code == 0


@pytest.mark.parametrize(("a", "b", "distance"), [
    ([1.0, 2.0], [1.0, 2.0], 0.0),
    ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
    ([float("inf"), 3.0], [float("inf"), 4.0], math.inf),
    ([1.0, 2.0], [float("nan"), 2.0], math.inf),
    ([0.0, 0.0], [1.0, 0.0], math.inf),
    ([3.0, 4.0], [3.0, 5.0], 0.2),
])  # fmt: skip
def test_distances(a, b, distance):
    assert Sums.of(torch.tensor(a), torch.tensor(b)).distance in (pytest.approx(distance), distance)


def test_nan_is_equal_to_the_same_nan_and_not_to_a_number():
    a, b = torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])
    assert Sums.of(a, b).equal == 1
    assert Sums.of(a, torch.tensor([2.0, 1.0])).distance == math.inf


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64]
)
def test_every_dtype_can_be_compared(dtype):
    a = torch.tensor([1.0, 0.0, 1.0]).to(dtype)
    b = torch.tensor([1.0, 1.0, 1.0]).to(dtype)
    assert Sums.of(a, a.clone()).distance == 0
    assert Sums.of(a, b).distance == pytest.approx(math.sqrt(0.5))


def test_correlation_is_pearson_s_and_none_where_there_is_none():
    a, b = torch.randn(1000), torch.randn(1000)
    wanted = torch.corrcoef(torch.stack([a, a + b]))[0, 1].item()
    assert Sums.of(a, a + b).correlation == pytest.approx(wanted, abs=1e-5)
    assert Sums.of(torch.ones(100), b[:100]).correlation is None
    assert Sums.of(torch.full((100,), 0.1), b[:100]).correlation is None
