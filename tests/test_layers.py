"""The layers of a model, counted from its modules alone."""

from __future__ import annotations

import pytest
from torch import nn

from warmstart.errors import MappingError
from warmstart.layers import layers_above


def module(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(count))


def above(model: nn.Module) -> dict[str, int]:
    found = layers_above(model, [name for name, _ in model.named_parameters()])
    return {name.removesuffix(".weight"): layers for name, layers in found.items()}


def test_the_stages_of_a_resnet_are_one_tower():
    model = module(stem=nn.Linear(1, 1, bias=False), layer1=linears(2), layer2=linears(1 + 1), fc=linears(1)[0])
    assert above(model) == {"stem": 5, "layer1.0": 4, "layer1.1": 3, "layer2.0": 2, "layer2.1": 1, "fc": 0}


def test_the_two_sides_of_a_clip_are_towers_of_their_own():
    model = module(
        text=module(embed=linears(1)[0], layers=linears(2)), vision=module(layers=linears(3), norm=linears(1)[0])
    )
    assert above(model) == {
        "text.embed": 3, "text.layers.0": 2, "text.layers.1": 1,
        "vision.layers.0": 3, "vision.layers.1": 2, "vision.layers.2": 1, "vision.norm": 0,
    }  # fmt: skip


def test_what_an_encoder_and_a_decoder_share_lies_below_both():
    model = module(shared=linears(1)[0], encoder=module(block=linears(2)), decoder=module(block=linears(2)))
    assert above(model)["shared"] == 3
    assert above(model)["encoder.block.0"] == above(model)["decoder.block.0"] == 2


def test_a_sequential_of_mostly_one_class_is_a_stack_and_one_of_two_parts_is_none():
    features = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), *linears(3), nn.ReLU())
    assert above(module(features=features)) == {f"features.{i}": 4 - i for i in range(4)}
    whole = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), module(layers=linears(2)))
    assert above(whole) == {"0": 3, "1.layers.0": 2, "1.layers.1": 1}


def test_what_stands_between_two_layers_belongs_to_the_one_before():
    model = module(layer1=linears(2), between=linears(1)[0], layer2=linears(2))
    assert above(model)["between"] == above(model)["layer1.1"] == 3


def test_a_list_inside_a_layer_is_no_stack():
    model = module(layers=nn.ModuleList(module(mlp=linears(2)) for _ in range(2)))
    assert set(above(model).values()) == {1, 2}


def test_no_layers():
    with pytest.raises(MappingError, match="layer_decay needs layers"):
        layers_above(nn.Linear(1, 1), ["weight"])
