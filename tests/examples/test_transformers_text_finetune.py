"""The text example on a handful of reviews: its data, its two arms and its verdict."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

import transformers_text_finetune as example
from real_weights import MINILM
from transformers_text_finetune import Arm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(MINILM.fetch("tokenizer.json")), pad_token="[PAD]")


def test_both_sides_have_as_many_of_each_kind_and_no_review_in_common(tokenizer):
    train, test = example.reviews(tokenizer, 40, 20)
    assert (len(train), len(test)) == (40, 20)
    assert sum(row["labels"] for row in train) == 20
    assert sum(row["labels"] for row in test) == 10
    ids = [{tuple(row["input_ids"]) for row in side} for side in (train, test)]
    assert not ids[0] & ids[1]


def test_it_runs_and_its_run_says_where_its_weights_came_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "TEST", 8)
    monkeypatch.setattr(example, "EPOCHS", 1)
    monkeypatch.setattr("sys.argv", ["example", "--texts", "16", "--output", str(tmp_path)])
    example.main()
    said = capsys.readouterr().out
    assert "16 reviews to train on, 8 of other films to test on" in said
    assert "103/103 tensors, 100 % of elements, verified <- model.safetensors" in said
    report = json.loads((tmp_path / "warm" / "warmstart.json").read_text())
    assert report["status"] == "applied"
    assert report["lineage"]["coverage"] == 1
    assert not (tmp_path / "random" / "warmstart.json").exists()


@pytest.mark.parametrize(
    ("warm", "cold", "found"), [(0.77, 0.5, []), (0.6, 0.5, ["below 0.7"]), (0.75, 0.7, ["less than 0.08 above"])]
)
def test_it_fails_in_words(warm, cold, found):
    said = example.failures(Arm("warm", [warm], 1.0), Arm("random", [cold], 1.0))
    assert len(said) == len(found)
    assert all(words in line for words, line in zip(found, said, strict=True))


def test_the_table_has_a_line_for_each_arm():
    lines = example.table([Arm("warm", [0.5, 0.75], 3.0), Arm("random", [0.5, 0.5], 3.0)]).splitlines()
    assert lines[0].split() == ["accuracy", "epoch", "1", "epoch", "2", "seconds"]
    assert [line.split() for line in lines[1:]] == [
        ["warm", "0.500", "0.750", "3.0"],
        ["random", "0.500", "0.500", "3.0"],
    ]
