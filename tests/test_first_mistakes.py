"""What a new user gets wrong: each a typed error that says what to type, and a model that is untouched, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart import CheckpointError, MappingError


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, classes)


def good() -> dict[str, torch.Tensor]:
    return Net().state_dict()


def truncated(path: Path) -> Path:
    torch.save(good(), path)
    path.write_bytes(path.read_bytes()[:-700])
    return path


def truncated_safetensors(path: Path) -> Path:
    save_file(good(), path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def text(path: Path) -> Path:
    path.write_text("epoch,loss\n1,0.5\n")
    return path


def wrong_model(path: Path) -> Path:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).state_dict(), path)
    return path


def state(path: Path, **changes: torch.Tensor) -> Path:
    torch.save(good() | {name.replace("__", "."): value for name, value in changes.items()}, path)
    return path


def two_trees(path: Path) -> Path:
    torch.save({"state_dict": good(), "model_ema": good(), "epoch": 3}, path)
    return path


MISTAKES = {
    "a file that is not there": (lambda p: p.with_name("weigths.pt"), {}, CheckpointError, r"no such file"),
    "another model's file": (wrong_model, {}, MappingError, r"none of the 4 keys fits any of the 11 model entries"),
    "a truncated zip": (truncated, {}, CheckpointError, r"weights\.pt"),
    "a truncated safetensors": (truncated_safetensors, {}, CheckpointError, r"bytes"),
    "a text file named .pt": (text, {}, CheckpointError, r"a text file that starts with 'epoch,loss"),
    "a prefix off by one segment": (state, {"strip_prefix": "encoder"}, MappingError, r"leave strip_prefix= out"),
    "a module that is not there": (state, {"into": "encoder.layers"}, MappingError, r"did you mean 'encoder"),
    "a head of another shape": (
        lambda p: state(p, head__weight=torch.zeros(1000, 8)),
        {},
        MappingError,
        r'head\.weight +checkpoint \(1000, 8\), model \(10, 8\)(.|\n)*allow_mismatched=\["head\.weight"\]',
    ),
    "a typo in a pattern": (state, {"freeze": "encodr"}, MappingError, r"did you mean 'encoder'"),
    "a typo in a rule": (state, {"rename": {r"encodr\.(\d+)": r"encoder.\1"}}, MappingError, r"'encodr.*matches no"),
    "a rule that is no regex": (state, {"rename": {"encoder(": ""}}, MappingError, r"no valid regex"),
    "a key too many": (lambda p: state(p, neck__weight=torch.zeros(3)), {}, MappingError, r'allow_unexpected=\["neck'),
    "two trees": (
        two_trees,
        {},
        CheckpointError,
        r'checkpoint_key="state_dict" +\(11 tensors(.|\n)*checkpoint_key="model_ema"',
    ),
    "a tree that is not there": (
        two_trees,
        {"checkpoint_key": "ema"},
        CheckpointError,
        r"did you mean 'model_ema'|model_ema",
    ),
    "another digest": (state, {"sha256": "0" * 64}, CheckpointError, r"SHA-256"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_a_typed_error_with_its_fix_and_the_model_untouched(tmp_path, fingerprint, mistake):
    make, fields, error, words = MISTAKES[mistake]
    source, model = make(tmp_path / "weights.pt"), Net()
    before = fingerprint(model)
    with pytest.raises(error, match=words) as caught:
        warmstart.load(model, source, **fields)
    assert fingerprint(model) == before
    assert type(caught.value) is error


def test_all_errors_of_a_plan_come_at_once():
    broken = good() | {"head.weight": torch.zeros(3, 8), "neck.weight": torch.zeros(3)}
    del broken["encoder.0.bias"]
    with pytest.raises(MappingError) as caught:
        warmstart.load(Net(), broken, exclude=["haed"], rename={"nothing": "x"}, min_coverage=1.0)
    kinds = {problem.kind for problem in caught.value.plan.errors}
    assert kinds == {"missing", "unexpected", "mismatched", "unused", "coverage"}


@pytest.mark.parametrize("source", [3, None, torch.zeros(3), b"weights.pt"])
def test_a_source_that_is_none_is_a_type_error(source):
    with pytest.raises(TypeError, match="source"):
        warmstart.load(Net(), source)


def test_unknown_and_misplaced_fields_are_type_errors():
    with pytest.raises(TypeError, match="unknown field stric; the fields are"):
        warmstart.load(Net(), good(), stric=False)
    with pytest.raises(TypeError, match="cannot be given beside"):
        warmstart.load(Net(), [warmstart.Pretrained(good())], into="encoder")
    with pytest.raises(TypeError, match="a pattern is a string"):
        warmstart.load(Net(), good(), freeze=3)
