from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError

FLAT = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2), "a.count": torch.tensor(1)}
NESTED = {"a": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "b": {"weight": torch.ones(4)}}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
SCALAR = torch.tensor(0.5)


def keys(source: Any, key: str | None = None) -> tuple[str | None, list[str]]:
    checkpoint = open_checkpoint(source, checkpoint_key=key)
    return checkpoint.checkpoint_key, list(checkpoint.keys())


def error(source: Any, key: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, checkpoint_key=key)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "taken"),
    [
        (FLAT, None),
        (NESTED, None),
        ({"state_dict": FLAT}, "state_dict"),
        ({"state_dict": FLAT, "epoch": 3, "optimizer": OPTIMIZER}, "state_dict"),
        ({"model": FLAT, "optim_g": OPTIMIZER, "anything": OPTIMIZER}, "model"),
        ({"model": NESTED, "optimizer_states": [OPTIMIZER], "opt_state": {"mu": FLAT}}, "model"),
        ({"model": FLAT, "lr_schedulers": [{"a.b": torch.ones(2)}], "scaler": {"x.y": torch.ones(1)}}, "model"),
        ({"model": FLAT, "rng_states": {"cpu.0": torch.ones(8)}, "args": {"w.x": torch.ones(8)}}, "model"),
        ({"model": FLAT, "metrics": {"best_loss": SCALAR}}, "model"),
        ({"model": FLAT, "best_loss": SCALAR, "step": torch.tensor(3)}, "model"),
        ({"anything": FLAT}, "anything"),
        ({"checkpoint": {"state_dict": FLAT}}, "checkpoint.state_dict"),
        ({"params": NESTED}, "params"),
        ({"metrics": {"loss": SCALAR}}, None),
        ({"state_dict": {}, "ema": FLAT}, "ema"),
        (
            {"state_dict": FLAT, "callbacks": {"ModelCheckpoint": {"best_model_score": SCALAR, "best": torch.ones(1)}}},
            "state_dict",
        ),
    ],
)
def test_the_only_tree_is_taken(source: dict[str, Any], taken: str | None) -> None:
    assert keys(source)[0] == taken


def test_names_of_nested_trees_are_dotted() -> None:
    assert keys(NESTED) == (None, ["a.weight", "a.bias", "b.weight"])
    assert keys({"params": NESTED}) == ("params", ["a.weight", "a.bias", "b.weight"])
    assert keys({"w": torch.ones(2), "sub": {"w": torch.ones(2), "scaler": torch.ones(1)}}) == (
        None,
        ["w", "sub.w", "sub.scaler"],
    )


@pytest.mark.parametrize(
    ("source", "trees"),
    [
        ({"state_dict": FLAT, "model_ema": FLAT}, ["state_dict", "model_ema"]),
        ({"model": NESTED, "ema": NESTED}, ["model", "ema"]),
        (
            {"student": {"state_dict": FLAT}, "teacher": {"state_dict": FLAT}},
            ["student.state_dict", "teacher.state_dict"],
        ),
        ({"encoder": FLAT, "decoder": FLAT}, ["encoder", "decoder"]),
        ({"generator": NESTED, "discriminator": NESTED, "optimizer": OPTIMIZER}, ["generator", "discriminator"]),
        ({"w": torch.ones(2), "model_ema": {"w": torch.ones(2)}}, ["", "model_ema"]),
        (
            {"state_dict": FLAT, "callbacks": {"EMAWeightAveraging": {"average": FLAT, "step": 3}}},
            ["state_dict", "callbacks.EMAWeightAveraging.average"],
        ),
        (
            {"state_dict": FLAT, "callbacks": {"EMA": {"p": torch.ones(2), "q": torch.ones(3)}}},
            ["state_dict", "callbacks.EMA"],
        ),
    ],
)
def test_several_trees_are_listed_with_the_lines_to_type(source: dict[str, Any], trees: list[str]) -> None:
    message = error(source)
    assert f"holds {len(trees)} trees of tensors; say which one to take, with one of:" in message
    for tree in trees:
        assert f'\n  checkpoint_key="{tree}"  (' in message
        taken, names = keys(source, tree)
        assert taken == (tree or None)
        assert names


def test_the_list_counts_tensors_and_elements() -> None:
    message = error({"model": FLAT, "ema": {"a.w": torch.ones(1)}})
    assert 'checkpoint_key="model"  (3 tensors, 9 elements)' in message
    assert 'checkpoint_key="ema"  (1 tensor, 1 element)' in message


def test_an_empty_key_takes_everything_but_optimizers() -> None:
    source = {"encoder": FLAT, "decoder": FLAT, "optimizer": OPTIMIZER}
    assert keys(source, "") == (None, [f"{part}.{name}" for part in ("encoder", "decoder") for name in FLAT])


def test_any_node_can_be_asked_for_by_its_exact_path() -> None:
    source = {"a.b": {"c": FLAT}, "a": {"b": {"c.d": {"w": torch.ones(1)}, "x": NESTED}}, "args": {"t": {"v": SCALAR}}}
    assert keys(source, "a.b")[1] == list(below("c"))
    assert keys(source, "a.b.c")[1] == list(FLAT)
    assert keys(source, "a.b.c.d")[1] == ["w"]
    assert keys(source, "a.b.x.a")[1] == ["weight", "bias"]
    assert keys(source, "args.t")[1] == ["v"]


def below(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in FLAT.items()}


@pytest.mark.parametrize("key", ["optimizer", "optimizer.state", "optimizer.state.0", "renamed", "optimizer_states.0"])
def test_an_optimizer_is_never_a_tree_not_even_on_request(key: str) -> None:
    source = {"model": FLAT, "optimizer": OPTIMIZER, "renamed": OPTIMIZER, "optimizer_states": [OPTIMIZER]}
    message = error(source, key)
    assert f"'{key}' is an optimizer's state, not weights; take one of:" in message
    assert message.endswith('checkpoint_key="model"  (3 tensors, 9 elements)')


def test_only_an_optimizer_is_no_checkpoint() -> None:
    assert "holds no weights; it holds 'optimizer', 'epoch'" in error({"optimizer": OPTIMIZER, "epoch": 1})
    assert "is an optimizer's state, not weights; save the model's" in error(OPTIMIZER)
    assert "is an optimizer's state, not weights; save the model's" in error(OPTIMIZER, "state")


def test_a_mistyped_key_gets_suggestions_and_the_list() -> None:
    message = error({"state_dict": FLAT, "model_ema": FLAT}, "state_dct")
    assert "there is no tree 'state_dct' (did you mean 'state_dict'?); take one of:" in message
    assert 'checkpoint_key="model_ema"  (' in message


def test_a_key_that_names_a_tensor_or_nothing() -> None:
    assert "'a.weight' is one tensor, not a tree" in error(FLAT, "a.weight")
    assert "'other' holds no tensors" in error({"model": FLAT, "other": {"x": 1}}, "other")
    assert "there is no tree 'epoch'" in error({"model": FLAT, "epoch": 1}, "epoch")


def test_trees_aside_are_named_when_nothing_else_is_there() -> None:
    message = error({"config": FLAT, "epoch": 3})
    assert "tensors lie only where weights usually do not" in message
    assert 'checkpoint_key="config"' in message
    assert keys({"config": FLAT}, "config")[1] == list(FLAT)


def test_notes_say_what_was_left_out() -> None:
    source = {
        "model": FLAT | {"extra": "text"},
        "optimizer": OPTIMIZER,
        "best": SCALAR,
        "callbacks": {"x": {"y": SCALAR}},
        "epoch": 3,
    }
    assert open_checkpoint(source).notes == (
        "1 entry is not a tensor and was left out: 'extra'",
        "single numbers beside the tree were left out: 'best'",
        "an optimizer's state was left out: 'optimizer'",
        "not weights by their name, left out: 'callbacks'",
    )
    assert open_checkpoint({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}, "loss": SCALAR}).notes == (
        "single numbers beside the tree were left out: 'loss'",
    )


def test_hostile_names_stay_harmless(tmp_path: Path) -> None:
    names = ["\x1b[31mred", "<script>alert(1)</script>", "x" * 1_000_000, 'quote"', "new\nline", "\ud800"]
    source = {name: {"model": {"w": torch.ones(2)}} for name in names}
    torch.save({name: FLAT for name in names if name != "\ud800"}, tmp_path / "w.pt")
    for message in (error(source), error(source, "missing"), error(source, "\x1b[31m"), error(tmp_path / "w.pt")):
        assert len(message) < 5_000
        assert "\x1b" not in message
        assert message.isascii()
    assert keys(source, "\x1b[31mred.model")[1] == ["w"]
