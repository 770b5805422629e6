"""Lock files: the decisions of a plan, and a short diff when they change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import warmstart
from warmstart import MappingError


def encoder(layers: int = 12) -> nn.Module:
    root = nn.Module()
    root.encoder = nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))})
    root.head = nn.Linear(2, 3)
    return root


def state(layers: int = 12) -> dict[str, torch.Tensor]:
    names = [
        f"{part}.layer.{i}.{leaf}"
        for i in range(layers)
        for leaf in ("weight", "bias")
        for part in ("student", "teacher")
    ]
    return {name: torch.randn(2, 2) if name.endswith("weight") else torch.randn(2) for name in names}


RULES = {"into": "encoder", "select": "student", "rename": {"student": ""}}


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "warmstart.lock.yaml"
    path.write_text(warmstart.plan(encoder(), state(), **RULES).to_yaml())
    return path


def test_a_plan_that_comes_out_the_same_is_taken_whatever_the_source(lock, tmp_path):
    from safetensors.torch import save_file

    save_file(state(), tmp_path / "elsewhere.safetensors")
    report = warmstart.load(encoder(), tmp_path / "elsewhere.safetensors", lock=lock, **RULES)
    assert len(report.assignments) == 24


def test_one_changed_rule_gives_at_most_20_lines_with_the_entries_and_both_keys(lock, fingerprint):
    model = encoder()
    before = fingerprint(model)
    rules = RULES | {"select": "teacher", "rename": {"teacher": ""}}
    with pytest.raises(MappingError) as caught:
        warmstart.load(model, state(), lock=lock, **rules)
    text = str(caught.value)
    assert fingerprint(model) == before
    assert len(text.splitlines()) <= 20
    assert "encoder.layer.{0-11}.weight" in text
    assert "student.layer.0.weight -> teacher.layer.0.weight" in text
    assert [p.kind for p in caught.value.plan.errors] == ["lock"]


def test_many_kinds_of_change_stay_within_20_lines(lock):
    keys = {f"k{i}.a{i}": torch.zeros(i + 1) for i in range(40)}
    model = nn.Module()
    for i in range(40):
        model.register_module(f"m{i}", nn.Module())
        model._modules[f"m{i}"].register_parameter(f"a{i}", nn.Parameter(torch.zeros(i + 1)))
    plan = warmstart.plan(model, keys, rename={rf"k{i}": f"m{i}" for i in range(40)}, lock=lock)
    (problem,) = [p for p in plan.errors if p.kind == "lock"]
    assert len(str(problem).splitlines()) <= 20
    assert "more of" in str(problem)


def test_freeze_shape_and_fill_are_decisions_too(tmp_path):
    path = tmp_path / "lock.yaml"
    model, source = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
    path.write_text(warmstart.plan(model, source, freeze="weight").to_yaml())
    assert not warmstart.plan(model, source, freeze="weight", lock=path).errors
    assert [p.kind for p in warmstart.plan(model, source, lock=path).errors] == ["lock"]
    (problem,) = warmstart.plan(
        model, {"weight": source["weight"]}, fill={"bias": 1}, freeze="weight", lock=path
    ).errors
    assert "bias  mapping: was same name, (2,), is" in str(problem)
    assert "fill 1.0" in str(problem)


def test_a_lock_that_is_not_there_says_how_to_write_it(tmp_path):
    with pytest.raises(MappingError, match=r"no such file.*write_text\(warmstart.plan"):
        warmstart.plan(nn.Linear(2, 2), nn.Linear(2, 2), lock=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text", ["", "[1]", "warmstart_lock: 9", "warmstart_lock: 1\nmapping: 3", "a: [", "  x", '  "a": ', "\x00"]
)
def test_what_is_no_lock_file_is_refused(tmp_path, text):
    path = tmp_path / "lock.yaml"
    path.write_text(text)
    with pytest.raises(MappingError, match="lock"):
        warmstart.plan(nn.Linear(2, 2), nn.Linear(2, 2), lock=path)


def test_hostile_names_survive_the_round_trip(tmp_path):
    names = ['a"b', "a: b", "- x", "a\nb", "é\u2028", "{x}", "null", "1"]
    model = nn.Module()
    for name in names:
        model._parameters[name] = nn.Parameter(torch.zeros(2))
    source = copy.deepcopy(dict(model._parameters))
    path = tmp_path / "lock.yaml"
    path.write_text(warmstart.plan(model, source).to_yaml(), encoding="utf-8")
    assert not warmstart.plan(model, source, lock=path).errors


@pytest.mark.parametrize("value", [1e-5, 1e22, float("inf"), float("nan"), -0.0])
def test_numbers_are_locked_as_they_are(tmp_path, value):
    path = tmp_path / "lock.yaml"
    model, source = nn.Linear(2, 2), {"weight": torch.zeros(2, 2)}
    path.write_text(warmstart.plan(model, source, fill={"bias": value}).to_yaml())
    assert not warmstart.plan(model, source, fill={"bias": value}, lock=path).errors


def test_the_dtype_that_is_taken_from_the_file_is_locked(tmp_path):
    path = tmp_path / "lock.yaml"
    model = nn.Linear(2, 2, bias=False)
    path.write_text(warmstart.plan(model, {"weight": torch.zeros(2, 2).bfloat16()}, dtype="checkpoint").to_yaml())
    plan = warmstart.plan(model, {"weight": torch.zeros(2, 2).half()}, dtype="checkpoint", lock=path)
    assert [p.kind for p in plan.errors] == ["lock"]
    assert warmstart.plan(model, {"weight": torch.zeros(2, 2).bfloat16()}, dtype="checkpoint").digest() != plan.digest()


def test_a_function_without_a_name_is_not_locked():
    convert = [warmstart.Conversion("w", "weight", [warmstart.Apply(lambda tensors: tensors)])]
    plan = warmstart.plan(nn.Linear(2, 2, bias=False), {"w": torch.zeros(2, 2)}, convert=convert)
    with pytest.raises(MappingError, match="cannot be locked"):
        plan.to_yaml()
