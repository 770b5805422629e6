"""What is left when the true partners of two tensors are missing, one on each side: never taken for each other."""

from __future__ import annotations

import pytest

from warmstart.mapping.suggesting.judging import _go_and_return
from warmstart.mapping.suggesting.matching import order_agrees
from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.templates import templates
from warmstart.mapping.suggesting.words import Lexicon

from .conftest import layers

D, F = 8, 32
ATTENTION = {f"attn.{x}_proj.weight": (D, D) for x in "qkvo"}
SUB_LAYER = {f"{x}_net.weight": (D, D) for x in ("query", "key", "value", "out")}
CROSS = {f"encoder_attn.{x}_proj.weight": (D, D) for x in ("q", "k", "v", "out")}


def named(before, parts):
    return {f"{before}.{name}": shape for name, shape in parts.items()}


MLP = {"mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}

CASES = {
    # `norm1` of `norm0..1` is not that of `norm1..2`: what is beside it counts from 0 here and from 1 there
    "a row of one": (
        ATTENTION | {"mlp.fc0.weight": (F, D), "mlp.fc1.weight": (D, F), "norm1.weight": (D,)},
        ATTENTION | {"mlp.fc1.weight": (F, D), "mlp.fc2.weight": (D, F), "norm1.weight": (D,)},
        "norm1",
    ),
    # nor is `ff1`, of `ff0..1`, `fc1`
    "a row of one beside others of another name": (
        ATTENTION | {"mlp.ff1.weight": (D, D), "norm.weight": (D,)},
        ATTENTION | {"mlp.fc1.weight": (D, D), "mlp.fc2.weight": (D, D), "norm.weight": (D,)},
        "mlp",
    ),
    # a second sub-layer is missing, the first may be any
    "a row that counts in words": (
        named("first_sub_layer", SUB_LAYER) | {"third_sub_layer.dense_in.weight": (F, D), "norm.weight": (D,)},
        CROSS | {"mlp.fc1.weight": (F, D), "norm.weight": (D,)},
        "encoder_attn",
    ),
    # of self-attention, attention to another sequence and MLP, the norms of the last two
    "three norms of a block": (
        ATTENTION | CROSS | {f"{x}_layer_norm.weight": (D,) for x in ("self_attn", "encoder_attn", "final")},
        ATTENTION | CROSS | {"layer_norm_1.weight": (D,), "layer_norm_2.weight": (D,)},
        "layer_norm_2",
    ),
    "a norm whose name is another's and a word more": (
        ATTENTION | {"operator_norm.weight": (D,), "post_operator_norm.weight": (D,), "post_ffn_norm.weight": (D,)},
        ATTENTION | {"operator_norm.weight": (D,), "post_operator_norm.weight": (D,), "ffn_norm.weight": (D,)},
        "ffn_norm",
    ),
    # of Gemma's four norms, one of another's name is kept: the names of two do not speak of four
    "a norm before a branch and one after it": (
        ATTENTION | MLP | {f"{x}_norm.weight": (D,) for x in ("attn", "post_attention", "ffn")},
        ATTENTION | MLP | {f"{x}_layernorm.weight": (D,) for x in ("post_attention", "pre_feedforward", "post_feedforward")},
        "post_feedforward",
    ),
    "the norm in a module and the one beside it": (
        ATTENTION | MLP | {"norm_conv.weight": (D,), "conv_module.depthwise.weight": (D, 1, 3)},
        ATTENTION | MLP | {"conv.batch_norm.weight": (D,), "conv.depthwise.weight": (D, 1, 3)},
        "norm",
    ),
    # (gate, up, down) are fc_1, fc_2 and proj here, and w1, w3 and w2 there
    "two of three that a number names": (
        ATTENTION | {f"mlp.{x}.weight": (D, D) for x in ("fc_1", "fc_2", "proj")} | {"norm.weight": (D,)},
        ATTENTION | {f"mlp.{x}.weight": (D, D) for x in ("w1", "w2")} | {"norm.weight": (D,)},
        "mlp",
    ),
    "modules that both sides have, whose names say only that they are": (
        ATTENTION | {"proj.0.weight": (F, D), "proj.1.weight": (D,), "block.0.weight": (D, D), "block.1.bias": (D,)},
        ATTENTION | {"proj.0.weight": (F, D), "proj.1.bias": (D,), "block.0.weight": (D, D), "block.1.weight": (D,)},
        "bias",
    ),
    "words in another order, which a transposed matrix has too": (
        ATTENTION | {"mlp.dense_h_to_4h.weight": (F, D), "norm.weight": (D,)},
        ATTENTION | {"mlp.dense_4h_to_h.weight": (D, F), "norm.weight": (D,)},
        "dense",
    ),
}  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_two_that_are_left_are_not_each_other(suggest, case, swapped):
    keys, entries, word = CASES[case]
    sides = [layers(f"{row}.{{}}", parts, range(4)) for row, parts in (("layers", keys), ("blocks", entries))]
    mapping = suggest(*(sides[::-1] if swapped else sides)).mapping
    assert not [names for entry, (key,) in mapping.items() if word in (names := f"{entry} {key}")]
    assert mapping


def test_two_towers_named_by_initials_are_not_each_other(suggest):
    parts = {"o_proj.weight": (D, D), "down_proj.weight": (D, F)}
    keys = layers("H_module.layers.{}", named("attn", parts), range(4)) | {"embed.weight": (50, D)}
    entries = layers("L_module.layers.{}", named("self_attn", parts), range(4)) | {"embed.weight": (50, D)}
    assert set(suggest(keys, entries).mapping) == {"embed.weight"}


def test_a_word_that_rivals_share_as_well_tells_nothing(suggest):
    """Of a gated MLP: that `c_fc` and `ff_proj` say less than the others does not make them one."""
    keys = layers("h.{}", ATTENTION | {"mlp.c_gate.weight": (F, D), "mlp.c_fc.weight": (F, D)}, range(4))
    entries = layers("h.{}", ATTENTION | {"ffn.ff_proj.weight": (F, D), "ffn.up_ff.weight": (F, D)}, range(4))
    assert not [entry for entry in suggest(keys, entries).mapping if ".ffn." in entry]


def test_a_bare_norm_is_what_the_module_around_it_is_called(suggest):
    """`_embedding.layer_norm` is the norm on embeddings, though the last one of the stack is called `norm`."""
    block = ATTENTION | {"fc1.weight": (F, D), "fc2.weight": (D, F)}
    keys = layers("transf_decoder._decoder.layers.{}", block, range(4)) | {
        "transf_decoder._embedding.layer_norm.weight": (D,),
        "transf_decoder._decoder.final_layer_norm.weight": (D,),
    }
    entries = layers("decoder.layers.{}", block, range(4)) | {
        "decoder.embedding_layernorm.weight": (D,),
        "decoder.norm.weight": (D,),
    }
    suggestion = suggest(keys, entries)
    found = suggestion.mapping | {entry: key for p in suggestion.proposed for entry, key in p.mapping.items()}
    assert found["decoder.embedding_layernorm.weight"] == ("transf_decoder._embedding.layer_norm.weight",)


@pytest.mark.parametrize("vocabulary", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_two_ends_of_a_language_model_are_not_each_other(suggest, swapped, vocabulary):
    """OLMo calls the head `ff_out`."""
    here = layers("transformer.blocks.{}", ATTENTION | MLP, range(4)) | {"transformer.ln_f.weight": (D,)}
    there = layers("model.layers.{}", ATTENTION | MLP, range(4)) | {"model.norm.weight": (D,)}
    sides = here | {"transformer.ff_out.weight": (50, D)}, there | {"model.embed_tokens.weight": (50, D)}
    sure = suggest(*(sides[::-1] if swapped else sides), vocabulary=vocabulary).mapping
    assert sure
    assert not [entry for entry in sure if "embed" in entry or entry.endswith("transformer.ff_out.weight")]


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ([{(F, D), (F,)}, {(D, F), (D,)}], True),  # an MLP's two, as Swin's `intermediate.dense` and `output.dense`
        ([{(F, D)}, {(D, F)}], False),  # without biases it may be stored either way
        ([{(D, D), (D,)}, {(F, D), (F,)}], False),  # what is left of an attention
        ([{(D, D), (D,)}, {(D, D), (D,)}], False),
    ],
)
def test_two_shapes_are_a_row_where_they_are_a_map_and_the_map_back(row, known):
    assert _go_and_return({frozenset(shapes) for shapes in row}) == known


def test_a_norm_that_a_number_names_is_no_other_than_a_norm_in_a_layer():
    """`norm_0` of Inkling's vision tower is `layer_norm` of a layer; `norm_conv` is not `conv.norm`."""
    lexicon = Lexicon()
    here, there = (
        Side(templates(parts, lexicon=lexicon)[0], lexicon)
        for parts in (
            {"visual.norm_0.weight": (D,), "norm_conv.weight": (D,)},
            {"visual.0.layer_norm.weight": (D,), "conv.norm.weight": (D,)},
        )
    )
    assert order_agrees(here, ("visual", "norm_0"), there, ("visual", "#", "layer_norm"))
    assert not order_agrees(here, ("norm_conv",), there, ("conv", "norm"))
