"""Which norm follows which map, and which rows lack something."""

from __future__ import annotations

import pytest

from warmstart.mapping.suggesting.layers import Tree, counted, ordered
from warmstart.mapping.suggesting.templates import templates
from warmstart.mapping.suggesting.words import Lexicon


def tree(shapes):
    named = {}
    for path, shape in shapes.items():
        named[f"{path}.weight"] = shape
        if len(shape) == 1:
            named |= {f"{path}.bias": shape, f"{path}.running_mean": shape}
    return Tree.of(templates(named, lexicon=Lexicon())[0])


def partners(found):
    return {".".join(norm.path): ".".join(map_.path) for norm, map_ in found.partner.items() if len(norm.shape) == 1}


BLOCK = {"_expand": (48, 8, 1, 1), "_depthwise": (48, 1, 3, 3), "_project": (16, 48, 1, 1)}


@pytest.mark.parametrize(
    ("shapes", "follows"),
    [
        ({"a.0": (8, 3, 3, 3), "a.1": (8,), "a.3": (8, 8, 3, 3), "a.4": (8,)}, {"a.1": "a.0", "a.4": "a.3"}),
        (
            {"a.conv1": (8, 3, 3, 3), "a.bn1": (8,), "a.conv2": (8, 8, 3, 3), "a.bn2": (8,)},
            {"a.bn1": "a.conv1", "a.bn2": "a.conv2"},
        ),
        ({"a.conv": (8, 3, 3, 3), "a.norm": (8,)}, {"a.norm": "a.conv"}),
        ({"conv1": (8, 3, 3, 3), "conv1.norm": (8,)}, {"conv1.norm": "conv1"}),
        (
            {**{f"b.{name}": shape for name, shape in BLOCK.items()}, "b._bn0": (48,), "b._bn1": (48,), "b._bn2": (16,)},
            {"b._bn0": "b._expand", "b._bn1": "b._depthwise", "b._bn2": "b._project"},
        ),
        # one of three is missing: the others may be of any
        ({**{f"b.{name}": shape for name, shape in BLOCK.items()}, "b._bn0": (48,), "b._bn2": (16,)}, {"b._bn2": "b._project"}),
        # norms before their maps
        ({"a.norm1": (8,), "a.conv1": (16, 8, 1, 1), "a.norm2": (16,), "a.conv2": (4, 16, 3, 3)}, {}),
        ({"a.norm": (8,), "a.q": (8, 8), "a.k": (8, 8)}, {}),
    ],
)  # fmt: skip
def test_a_norm_follows_a_map_where_names_and_widths_say_it_in_one_way(shapes, follows):
    assert partners(tree(shapes)) == follows


def test_numbers_are_compared_as_numbers_and_nothing_else_is_an_order():
    found = tree({f"a.{i}.conv": (8, 8, 3, 3) for i in (10, 2, 1)})
    assert [layer.path[1] for layer in ordered(found.layers)] == ["1", "2", "10"]
    assert ordered(tree({"a.left": (8, 8, 3, 3), "a.right": (8, 8, 3, 3)}).layers) == []


@pytest.mark.parametrize("segment", ["conv_3x3", "mobilenet_v2", "conv"])
def test_a_size_or_a_version_is_no_turn(segment):
    assert counted(segment) == (segment, None)


@pytest.mark.parametrize(
    ("numbers", "broken"),
    [((0, 1, 2), False), ((1, 2, 3), False), ((2, 3, 4), True), ((0, 1, 3), True), ((0, 2, 4), False)],
)
def test_a_row_of_modules_that_starts_late_or_has_a_gap_is_broken(numbers, broken):
    found = tree({f"a.{i}.{part}": shape for i in numbers for part, shape in (("conv", (8, 8, 3, 3)), ("norm", (8,)))})
    assert found.is_broken(("a", str(numbers[-1]), "conv")) is broken


def test_activations_in_a_sequence_are_no_gaps():
    assert not tree({"a.0": (8, 3, 3, 3), "a.3": (8, 8, 3, 3), "a.5": (8, 8, 3, 3)}).is_broken(("a", "5"))
    assert tree({"a.0": (8, 3, 3, 3), "a.5": (8, 8, 3, 3)}).is_broken(("a", "5"))
