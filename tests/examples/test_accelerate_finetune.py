"""The accelerate example on a handful of digits: its data, its two arms and its verdict."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import accelerate_finetune as example
from accelerate_finetune import Arm

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_both_sides_have_as_many_of_each_digit_and_no_image_in_common():
    train, test = example.digits(example.MNIST.fetch(), 40, 20, batch_size=8)
    sides = [loader.dataset.tensors for loader in (train, test)]
    assert [len(labels) for _, labels in sides] == [40, 20]
    assert torch.bincount(sides[0][1]).tolist() == [4] * 10
    assert torch.bincount(sides[1][1]).tolist() == [2] * 10
    assert sides[0][0].shape == (40, 3, 64, 64)
    ink = [{image[0].numpy().tobytes() for image in images} for images, _ in sides]
    assert not ink[0] & ink[1]


def test_it_runs_and_its_run_says_where_its_weights_came_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "TEST", 20)
    monkeypatch.setattr(example, "EPOCHS", 2)
    monkeypatch.setattr(example, "RELEASE", 1)
    monkeypatch.setattr("sys.argv", ["example", "--labels", "40", "--output", str(tmp_path)])
    example.main()
    said = capsys.readouterr().out
    assert "40 digits to train on, 20 to test on, 1 process(es)" in said
    assert "312/312 tensors, 100 % of elements, verified, 312 frozen <- mobilenetv2" in said
    assert "288 tensors frozen" in said
    assert "bit for bit what was loaded" in said
    report = json.loads((tmp_path / "warmstart.json").read_text())
    assert report["status"] == "applied"
    assert report["lineage"]["coverage"] == 1
    assert (tmp_path / "warmstart.html").exists()
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("warm", "cold", "found"), [(0.95, 0.5, []), (0.7, 0.5, ["below 0.8"]), (0.85, 0.8, ["less than 0.1 above"])]
)
def test_it_fails_in_words(warm, cold, found):
    said = example.failures(Arm("warm", [warm], 1.0), Arm("from scratch", [cold], 1.0))
    assert len(said) == len(found)
    assert all(words in line for words, line in zip(found, said, strict=True))


def test_the_table_has_a_line_for_each_arm():
    lines = example.table([Arm("warm", [0.5, 0.75], 3.0), Arm("cold", [0.5, 0.5], 3.0)]).splitlines()
    assert lines[0].split() == ["accuracy", "epoch", "1", "epoch", "2", "seconds"]
    assert [line.split() for line in lines[1:]] == [
        ["warm", "0.500", "0.750", "3.0"],
        ["cold", "0.500", "0.500", "3.0"],
    ]
