"""One rule for all layers that only a number tells apart."""

from __future__ import annotations

from warmstart.mapping.planning.renames import Renamer
from warmstart.mapping.suggesting.layer_rules import layer_renames


def blocks(numbers, key, entry):
    return {
        f"{key.format(i)}.{tensor}": f"{entry.format(i)}.{tensor}" for i in numbers for tensor in ("weight", "bias")
    }


def test_a_number_of_both_sides_is_left_open():
    names = blocks(range(1, 13), "features.{}.0", "blocks.{}.conv")
    assert layer_renames(names, ["features.0.0.weight"]) != {r"^features\.(\d+)\.0": r"blocks.\1.conv"}
    assert layer_renames(names, ["other.0.0.weight"]) == {r"^features\.(\d+)\.0": r"blocks.\1.conv"}


def test_exceptions_come_first():
    names = blocks(range(2, 6), "features.{}.0", "blocks.{}.expand") | blocks(
        [1], "features.{}.0", "blocks.{}.depthwise"
    )
    rules = layer_renames(names, [])
    assert list(rules) == [r"^features\.1\.0", r"^features\.(\d+)\.0"]
    assert {key: Renamer([rules])(key) for key in names} == names


def test_numbers_that_are_the_same_by_chance_are_written_out():
    names = blocks(range(3), "layer1.{}.conv1", "stages.0.layers.{}.conv0")
    names |= blocks(range(3), "layer2.{}.conv1", "stages.1.layers.{}.conv0")
    rules = layer_renames(names, [])
    assert len(rules) == 2
    assert {key: Renamer([rules])(key) for key in names} == names


def test_a_tensor_of_another_name_is_a_rule_of_its_own():
    names = {"a.0.kernel": "b.0.weight", "a.0.bias": "b.0.bias", "a.1.weight": "c.x.weight"}
    assert {key: Renamer([layer_renames(names, [])])(key) for key in names} == names
