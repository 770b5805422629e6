"""Tensors of layers under torch's names, and what is a tensor of a module's own."""

from __future__ import annotations

import pytest

from warmstart.mapping.suggesting.leaves import torch_names
from warmstart.mapping.suggesting.words import Lexicon

LAYER_SCALE = ["ls1.gamma"]
OWN_BESIDE = ["scaling.s", "scaling.b"]
BOTH = ["a.kernel", "a.weight"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["dense.kernel", "dense.bias"], ["dense.weight", "dense.bias"]),
        (["embed.embeddings"], ["embed.weight"]),
        (["ln_1.g", "ln_1.b"], ["ln_1.weight", "ln_1.bias"]),
        (["x.gamma", "x.beta"], ["x.weight", "x.bias"]),
        (["pre_layer_norm.scale"], ["pre_layer_norm.weight"]),
        (
            ["bn.gamma", "bn.beta", "bn.moving_mean", "bn.moving_variance"],
            ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"],
        ),
        (LAYER_SCALE, LAYER_SCALE),
        (OWN_BESIDE, OWN_BESIDE),
        (BOTH, BOTH),
        (["kernel"], ["kernel"]),
    ],
)
def test_a_layer_is_one_of_torchs_if_every_tensor_of_it_is_known(names, told):
    assert list(torch_names(names, [], Lexicon()).values()) == told


def test_a_spelling_of_both_sides_has_its_own_partner():
    assert torch_names(["norm.scale"], ["l2_clip.scale"], Lexicon()) == {"norm.scale": "norm.scale"}


def test_without_the_vocabulary_names_are_what_they_are():
    assert torch_names(["dense.kernel"], [], Lexicon(False)) == {"dense.kernel": "dense.kernel"}


def test_a_tensor_that_some_items_of_a_list_lack_is_still_the_modules_own():
    names = ["layers.0.scaling.s", "layers.0.scaling.b", "layers.1.scaling.b"]
    assert list(torch_names(names, [], Lexicon())) == list(torch_names(names, [], Lexicon()).values())
