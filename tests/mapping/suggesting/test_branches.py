"""Shapes prove the map by which a branch goes back into the width of the model, whatever it is called."""

from __future__ import annotations

import pytest

from warmstart.mapping.suggesting.branches import way_back
from warmstart.mapping.suggesting.items import items_of
from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.templates import templates
from warmstart.mapping.suggesting.words import Lexicon

from .conftest import layers

H, INNER = 8, 32
NORMS = {"norm1.weight": (H,), "norm2.weight": (H,)}
QKV = {"attn.qkv.weight": (3 * H, H)}


def branch_of(name, parts):
    lexicon = Lexicon()
    side = Side(templates(layers("blocks.{}", parts, range(3)), lexicon=lexicon)[0], lexicon)
    (item,) = (item for item in items_of(side.templates) if ".".join(item.path[2:]) == name)
    return way_back(item, side)


@pytest.mark.parametrize(
    ("name", "shape", "branch"),
    [
        ("mlp.w2", (H, INNER), "mlp"),  # Meta's llama
        ("mlp.w3", (H, INNER), "mlp"),  # xFormers' SwiGLU: (w1, w2, w3) is (gate, up, down)
        ("ffn.ff_out", (H, INNER), "mlp"),
        ("mlp.experts.w2_weight", (4, H, INNER), "mlp"),
        ("attention.dense", (H, INNER), "attention"),
        ("attn.proj", (H, INNER), "attention"),
        ("mlp.w3", (INNER, H), None),  # llama's up
        ("mlp.w2", (H, H), None),
        ("attn.q_b_proj", (H, INNER), None),
        ("adapter.w2", (H, INNER), None),
    ],
)
def test_the_way_back_is_told_by_its_shape(name, shape, branch):
    leaf = "" if name.endswith("_weight") else ".weight"
    assert branch_of(name, NORMS | QKV | {f"{name}{leaf}": shape}) == branch


@pytest.mark.parametrize(
    ("parts", "branch"),
    [
        ({}, None),  # `c_fc` of GPT-2 and the first `dense` of Keras are stored so, and are the way in
        ({"mlp.c_fc.bias": (H,)}, "mlp"),
        ({"mlp.c_fc.bias": (INNER,)}, None),
        ({"attn.qkv.weight": (3 * H, H)}, "mlp"),
        ({"attn.c_attn.weight": (H, 3 * H), "attn.qkv.weight": (H, 3 * H)}, None),
        ({"mlp.gate.weight": (INNER, H), "mlp.up.weight": (INNER, H)}, "mlp"),
        ({"mlp.up.weight": (INNER, H)}, None),
    ],
)
def test_a_name_that_is_elsewhere_the_way_in_needs_the_layout(parts, branch):
    assert branch_of("mlp.c_fc", NORMS | {"mlp.c_fc.weight": (H, INNER)} | parts) == branch


@pytest.mark.parametrize(
    "parts",
    [
        {},  # no norm tells the width
        {"norm1.weight": (H,), "norm2.weight": (INNER,)},  # either may be it
        NORMS | {"mlp.skip.weight": (H, INNER)},
        {"mlp.norm.weight": (H,)},  # of the branch itself
    ],
)
def test_without_one_width_and_one_map_nothing_is_told(parts):
    assert branch_of("mlp.w2", parts | {"mlp.w2.weight": (H, INNER)}) is None


ATTENTION = {f"attn.{x}.weight": (H, H) for x in ("q_proj", "k_proj", "v_proj", "o_proj")}


@pytest.mark.parametrize("down", ["w2", "w3"])
def test_a_gated_mlp_is_sure_of_the_way_back_alone(suggest, down):
    gate_up = [f"mlp.{w}.weight" for w in ("w1", "w2", "w3") if w != down]
    keys = NORMS | ATTENTION | dict.fromkeys(gate_up, (INNER, H)) | {f"mlp.{down}.weight": (H, INNER)}
    entries = NORMS | ATTENTION | {f"mlp.{w}_proj.weight": (INNER, H) for w in ("gate", "up")}
    entries["mlp.down_proj.weight"] = (H, INNER)
    suggestion = suggest(layers("blocks.{}", keys, range(4)), layers("blocks.{}", entries, range(4)))
    found = {entry: key for entry, (key,) in suggestion.mapping.items() if ".mlp." in entry}
    assert found == {f"blocks.{i}.mlp.down_proj.weight": f"blocks.{i}.mlp.{down}.weight" for i in range(4)}
    assert [len(p.rivals) for p in suggestion.proposed] == [1]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("into", "back"), [("fc1", "fc2"), ("fc", "proj"), ("up_proj", "down_proj"), ("0", "2")])
@pytest.mark.parametrize(("dense_in", "dense_out"), [("c_fc", "c_proj"), ("dense_2", "dense_3")])
def test_a_way_in_that_is_stored_transposed_is_no_way_back(suggest, dense_in, dense_out, into, back, swapped):
    norms = ATTENTION | {f"{norm}.{leaf}": (H,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
    keys = norms | {f"mlp.{dense_in}.weight": (H, INNER), f"mlp.{dense_out}.weight": (INNER, H)}
    entries = norms | {f"mlp.{into}.weight": (INNER, H), f"mlp.{back}.weight": (H, INNER)}
    sides = layers("h.{}", keys, range(4)), layers("blocks.{}", entries, range(4))
    assert not [entry for entry in suggest(*(sides[::-1] if swapped else sides)).mapping if ".mlp." in entry]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_map_of_the_mlp_is_none_of_the_attention(suggest, swapped):
    """OLMo's blocks have no modules in them: below `self_attn` here, `ff_out` is there as well."""
    pairs = {f"{x}_proj": f"self_attn.{x}_proj" for x in "qkv"} | {
        "attn_out": "self_attn.o_proj",
        "ff_out": "mlp.down_proj",
    }
    keys = NORMS | {f"{key}.weight": (H, H) for key in pairs}
    entries = NORMS | {f"{entry}.weight": (H, H) for entry in pairs.values()}
    truth = {entry: key for key, entry in pairs.items()}
    sides = layers("transformer.blocks.{}", keys, range(4)), layers("model.layers.{}", entries, range(4))
    sure = suggest(*(sides[::-1] if swapped else sides)).mapping.items()
    names = [(k, e) if swapped else (e, k) for e, (k,) in sure]
    short = [tuple(name.split(".", 3)[3].removesuffix(".weight") for name in two) for two in names]
    assert short
    assert all(truth.get(entry, entry) == key for entry, key in short)


def test_experts_are_not_the_shared_one(suggest):
    keys = layers("blocks.{}", NORMS | ATTENTION | {"mlp.experts.w2_weight": (4, H, INNER)}, range(4))
    entries = layers("blocks.{}", NORMS | ATTENTION | {"mlp.shared.down_proj": (4, H, INNER)}, range(4))
    assert not [entry for entry in suggest(keys, entries).mapping if ".mlp." in entry]
