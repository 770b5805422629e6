"""A rename that one place proves, where another place has no shapes that tell."""

from __future__ import annotations

import pytest

from .conftest import layers

D, F = 8, 32


def sides(square: bool) -> tuple[dict, dict, dict]:
    """Experts of which one is square; the checkpoint calls the maps `wi`, `wz`, the model `rise`, `fall`: entry to key too."""
    inner = D if square else F
    parts = {
        "rout.{}.weight": (4, D),
        "mine.{}.weight": (F, D),
        "mine.{}.bias": (F,),
        "yours.{}.weight": (inner, D),
        "other.{}.weight": (D, inner),
    }
    words = {"rout": ("sel", "sel"), "mine": ("wi", "rise"), "yours": ("wi", "rise"), "other": ("wz", "fall")}
    truth = {}
    shapes = {}
    for part, shape in parts.items():
        module = part.partition(".")[0]
        shared = "big" if module in ("rout", "mine") else "small"
        old, new = words[module]
        for i in range(3):
            key = f"model.layers.{i}.{shared}.{part.partition('.')[2].format(old)}"
            truth[f"layers.{i}.{shared}.{part.partition('.')[2].format(new)}"] = key
            shapes[key] = shape
    return shapes, {entry: shapes[key] for entry, key in truth.items()}, truth


@pytest.mark.parametrize("square", [False, True])
def test_a_proven_rename_tells_what_shapes_do_not(suggest, square):
    keys, entries, truth = sides(square)
    suggestion = suggest(keys, entries)
    found = {entry: names[0] for entry, names in suggestion.mapping.items()}
    assert found == {entry: truth[entry] for entry in found}
    assert {entry for entry in truth if ".rise." in entry} <= found.keys()


def test_a_word_that_stands_for_two_is_not_learned(suggest):
    """`wi` is `rise` in one place and `fall` in another: it says nothing of a third."""
    keys = layers("l.{}.a", {"wi.weight": (F, D), "sel.weight": (4, D), "sel.bias": (4,)}, range(3))
    keys |= layers("l.{}.b", {"wi.weight": (F + 1, D), "sel.weight": (4, D), "sel.bias": (4,)}, range(3))
    keys |= layers(
        "l.{}.c", {"wi.weight": (D, D), "wo.weight": (D, D), "sel.weight": (4, D), "sel.bias": (4,)}, range(3)
    )
    told = {"a.wi": "a.rise", "b.wi": "b.fall"}
    entries = {}
    for key, shape in keys.items():
        entry = key
        for old, new in told.items():
            entry = entry.replace(old, new)
        entries[entry.replace("c.wi", "c.rise").replace("c.wo", "c.fall")] = shape
    suggestion = suggest(keys, entries)
    assert not [entry for entry in suggestion.mapping if ".c.rise" in entry or ".c.fall" in entry]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_second_of_two_is_not_the_second_of_three(suggest, swapped):
    """DETR's encoder has norms 1 and 2, its decoder 1 to 3: what `norm2` is of two is not said of three."""
    attention = {f"self_attn.{x}_proj.weight": (D, D) for x in "qkvo"} | {"fc1.weight": (F, D), "fc2.weight": (D, F)}
    cross = {f"multihead_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
    norms = {f"{x}_layer_norm.weight": (D,) for x in ("self_attn", "encoder_attn", "final")}
    two = {name: shape for name, shape in norms.items() if "encoder" not in name}
    numbered = {f"norm{n}.weight": (D,) for n in (1, 2, 3)}
    keys = layers("encoder.layers.{}", attention | {f"norm{n}.weight": (D,) for n in (1, 2)}, range(4))
    keys |= layers("decoder.layers.{}", attention | cross | numbered, range(4))
    entries = layers("model.encoder.layers.{}", attention | two, range(4))
    entries |= layers("model.decoder.layers.{}", attention | cross | norms, range(4))
    sure = suggest(*((entries, keys) if swapped else (keys, entries))).mapping
    assert not [entry for entry in sure if "decoder" in entry and "norm" in entry]
    assert len([entry for entry in sure if "encoder.layers" in entry and "norm" in entry]) == 8
