"""A module of a name that each side has once, with the same tensors in the same few items of its list, is one."""

from __future__ import annotations

import pytest

from .conftest import layers

ALL = {
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
SOME = {
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
}
SHAPES = {
    "attn.wq_a.weight": (6, 8), "attn.wq_b.weight": (32, 6), "attn.wkv.weight": (5, 8), "attn.wo.weight": (8, 32),
    "attn.compressor.wgate.weight": (7, 8), "attn.compressor.wkv.weight": (7, 8),
    "attn_norm.weight": (8,), "ffn_norm.weight": (8,),
    "attn.indexer.wq_b.weight": (16, 6), "attn.indexer.weights_proj.weight": (3, 8),
    "attn.indexer.compressor.wgate.weight": (9, 8), "attn.indexer.compressor.wkv.weight": (9, 8),
}  # fmt: skip


def sides(here, there):
    """Both sides, an indexer in some layers of each, and the truth: entry to key."""
    truth = {f"layers.{i}.{entry}": f"layers.{i}.{key}" for i in range(8) for key, entry in ALL.items()}
    parts = {key: SHAPES[key] for key in SOME}
    keys = layers("layers.{}", {key: SHAPES[key] for key in ALL}, range(8)) | layers("layers.{}", parts, here)
    truth |= {f"layers.{i}.{entry}": f"layers.{i}.{key}" for i in there for key, entry in SOME.items()}
    entries = {entry: SHAPES[key.split(".", 2)[2]] for entry, key in truth.items()}
    return keys, entries, truth


def found(suggestion, word="indexer"):
    return {entry: key for entry, (key,) in suggestion.mapping.items() if word in entry}


def test_scattered_items_say_which_module_it_is(suggest):
    keys, entries, truth = sides((1, 4, 6), (1, 4, 6))
    assert found(suggest(keys, entries)) == {entry: key for entry, key in truth.items() if "indexer" in entry}
    assert found(suggest(entries, keys)) == {key: entry for entry, key in truth.items() if "indexer" in entry}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ((1, 4, 6), (1, 4, 7)),  # nearly the same
        ((1, 4), (1, 4, 6)),
        ((2, 3, 4), (2, 3, 4)),  # a run: every module of one kind of layer stands there
        (range(8), range(8)),
    ],
)
def test_other_items_or_a_run_of_them_say_nothing(suggest, here, there):
    keys, entries, truth = sides(here, there)
    sure = found(suggest(keys, entries))
    assert not [entry for entry in sure if "q_b_proj" in entry or "scorer" in entry]
    assert sure.items() <= truth.items()


def test_a_name_that_stands_elsewhere_as_well_is_no_landmark(suggest):
    keys, entries, truth = sides((1, 4, 6), (1, 4, 6))
    entries |= {f"layers.{i}.self_attn.indexer.gate.weight": (2, 2) for i in (1, 4, 6)}
    sure = found(suggest(keys, entries))
    assert not [entry for entry in sure if "q_b_proj" in entry or "scorer" in entry]
    assert sure.items() <= truth.items()


def test_between_other_words_on_each_side_it_is_another(suggest):
    keys, entries, _ = sides((1, 4, 6), (1, 4, 6))
    keys = {key.replace("attn.indexer", "attn.decoder.indexer"): shape for key, shape in keys.items()}
    entries = {entry.replace("compressor.indexer", "encoder.indexer"): shape for entry, shape in entries.items()}
    assert not [entry for entry in found(suggest(keys, entries)) if "q_b_proj" in entry]


@pytest.mark.parametrize("lost", sorted(SOME.values()))
@pytest.mark.parametrize("other", sorted(SOME))
def test_nothing_sure_is_wrong_whatever_is_missing_in_it(suggest, lost, other):
    keys, entries, truth = sides((1, 4, 6), (1, 4, 6))
    keys = {key: shape for key, shape in keys.items() if not key.endswith(other)}
    entries = {entry: shape for entry, shape in entries.items() if not entry.endswith(lost)}
    assert found(suggest(keys, entries), "").items() <= truth.items()
