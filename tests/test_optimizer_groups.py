"""Groups for an optimizer: every trainable parameter once, by what was loaded, how deep it lies, and what decays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart import MappingError, param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layer = nn.ModuleList([Block(), Block(), Block()])
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    """A loaded encoder, a head whose weight is tied to the embedding, and a new bias."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(4, 6)
        self.head.weight = self.encoder.embed.weight
        self.new = nn.Linear(4, 2)


SOURCE = Encoder().state_dict()
EXEMPT = {"head": ["head.bias"], "new": ["new"]}


def plan(model, **fields):
    return warmstart.plan(model, SOURCE, into="encoder", **fields)


def names(model, groups):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {group["name"]: [by_id[id(p)] for p in group["params"]] for group in groups}


def test_field_note_49_every_trainable_parameter_once_and_a_tied_one_once():
    model = Model()
    model.encoder.norm.weight.requires_grad_(False)
    groups = param_groups(model, plan(model), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("loaded", [False, True], ids=["plan", "report"])
def test_what_is_loaded_trains_slower(loaded):
    model = Model()
    groups = param_groups(model, plan(model).apply() if loaded else plan(model), lr=2.0, loaded_lr_scale=0.25)
    assert [(g["name"], g["lr"]) for g in groups] == [("loaded", 0.5), ("new", 2.0)]
    assert names(model, groups)["new"] == ["head.bias", "new.weight", "new.bias"]  # the tied head.weight was loaded


def test_layer_wise_decay_counts_from_the_last_layer_down():
    model = Model()
    groups = param_groups(model, plan(model), lr=1.0, loaded_lr_scale=1.0, layer_decay=0.5)
    rates = {n: g["lr"] for g in groups for n in names(model, [g])[g["name"]]}
    assert rates["encoder.embed.weight"] == 0.5**4  # three layers above it, and the norm
    assert [rates[f"encoder.layer.{i}.proj.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert rates["encoder.norm.weight"] == 1
    assert rates["new.weight"] == 1


def test_weight_decay_spares_biases_and_gains_or_what_is_named():
    model = Model()
    groups = param_groups(model, plan(model), lr=1.0, weight_decay=0.1)
    spared = {n for g in groups if g["weight_decay"] == 0 for n in names(model, [g])[g["name"]]}
    assert spared == {n for n, p in model.named_parameters() if p.dim() < 2}

    groups = param_groups(model, plan(model), lr=1.0, weight_decay=0.1, no_decay=["encoder.embed", "*.bias"])
    spared = {n for g in groups if g["weight_decay"] == 0 for n in names(model, [g])[g["name"]]}
    assert spared == {"encoder.embed.weight"} | {n for n, _ in model.named_parameters() if n.endswith("bias")}


def test_by_name_where_a_wrapper_or_a_cast_made_new_objects():
    model = Model()
    made = plan(model)
    twin = Model()  # as fully_shard replaces every parameter object
    twin.encoder = torch.compile(twin.encoder, backend="eager")
    loaded = names(twin, param_groups(twin, made, lr=1.0))["loaded"]
    assert loaded == [n for n, _ in twin.named_parameters() if n.startswith("encoder.")]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": 0.0}, "lr=0.0: a positive number"),
        ({"lr": 1.0, "layer_decay": -1.0}, "layer_decay=-1.0"),
        ({"lr": 1.0, "no_decay": "encodr"}, r"no_decay='encodr' matches no parameter \(did you mean 'encoder'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, match):
    model = Model()
    with pytest.raises(MappingError, match=match):
        param_groups(model, plan(model), **arguments)


def test_a_model_without_layers_another_model_and_nothing_that_trains():
    flat = nn.Linear(2, 2)
    made = warmstart.plan(flat, nn.Linear(2, 2).state_dict())
    with pytest.raises(MappingError, match="layer_decay needs layers"):
        param_groups(flat, made, lr=1.0, layer_decay=0.5)
    with pytest.raises(MappingError, match="none of the 2 parameters that the plan loads"):
        param_groups(Model(), made, lr=1.0)
    with pytest.raises(MappingError, match="no parameter of this model is trainable"):
        param_groups(flat.requires_grad_(False), made, lr=1.0)
