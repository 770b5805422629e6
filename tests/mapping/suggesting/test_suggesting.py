"""What is sure, what is proposed, and what is not answered at all."""

from __future__ import annotations

import random

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import warmstart
from warmstart import MappingError, Pretrained
from warmstart.mapping.suggesting.suggesting import suggest_rules
from warmstart.mapping.suggesting.words import Lexicon

from .conftest import Header, layers, net

D, F = 8, 32
BERT = {
    "attention.self.query.weight": (D, D), "attention.self.query.bias": (D,),
    "attention.self.key.weight": (D, D), "attention.self.key.bias": (D,),
    "attention.self.value.weight": (D, D), "attention.self.value.bias": (D,),
    "attention.output.dense.weight": (D, D), "attention.output.dense.bias": (D,),
    "intermediate.dense.weight": (F, D), "intermediate.dense.bias": (F,),
    "output.dense.weight": (D, F), "output.dense.bias": (D,),
}  # fmt: skip
OWN = {
    "attn.q.weight": "attention.self.query.weight", "attn.q.bias": "attention.self.query.bias",
    "attn.k.weight": "attention.self.key.weight", "attn.k.bias": "attention.self.key.bias",
    "attn.v.weight": "attention.self.value.weight", "attn.v.bias": "attention.self.value.bias",
    "attn.o.weight": "attention.output.dense.weight", "attn.o.bias": "attention.output.dense.bias",
    "mlp.fc1.weight": "intermediate.dense.weight", "mlp.fc1.bias": "intermediate.dense.bias",
    "mlp.fc2.weight": "output.dense.weight", "mlp.fc2.bias": "output.dense.bias",
}  # fmt: skip


def bert(count: int = 3) -> tuple[dict, dict, dict]:
    """A BERT-like checkpoint, an own model, and the truth: entry to key."""
    keys = layers("bert.encoder.layer.{}", BERT, range(count)) | {"bert.embeddings.word_embeddings.weight": (100, D)}
    truth = {f"blocks.{i}.{own}": f"bert.encoder.layer.{i}.{key}" for i in range(count) for own, key in OWN.items()}
    truth["word_embedding.weight"] = "bert.embeddings.word_embeddings.weight"
    return keys, {entry: keys[key] for entry, key in truth.items()}, truth


def wrong(suggestion, truth) -> dict[str, str]:
    return {entry: keys[0] for entry, keys in suggestion.mapping.items() if truth.get(entry) != keys[0]}


def test_a_whole_architecture_by_a_few_rules(suggest):
    keys, entries, truth = bert()
    suggestion = suggest(keys, entries)
    assert {entry: found[0] for entry, found in suggestion.mapping.items()} == truth
    assert suggestion.proposed == ()
    assert suggestion.unexplained == ((), ())
    assert suggestion.coverage == (1.0, 1.0)
    assert len(suggestion.pretrained.rename) <= 10


def test_in_the_other_direction_too(suggest):
    keys, entries, truth = bert()
    suggestion = suggest(entries, keys)
    assert {found[0]: entry for entry, found in suggestion.mapping.items()} == truth


def test_the_plan_does_what_the_suggestion_says(suggest):
    keys, entries, _ = bert()
    suggestion = suggest(keys, entries)
    plan = warmstart.plan(net(entries), suggestion.pretrained)
    assert not plan.errors, plan.explain()
    assert plan.mapping == suggestion.mapping


def test_equal_names_need_no_rule(suggest):
    keys, _, _ = bert()
    assert suggest(keys, keys).pretrained.rules() == {"strip_prefix": ""}


def test_a_prefix_alone_is_stripped(suggest):
    keys, _, _ = bert()
    assert suggest({f"module_.net.{k}": v for k, v in keys.items()}, keys).pretrained.rules() == {
        "strip_prefix": "module_.net"
    }


def test_a_prefix_alone_is_added(suggest):
    keys, _, _ = bert()
    found = suggest(keys, {f"backbone.{k}": v for k, v in keys.items()})
    assert found.pretrained.rules() == {"strip_prefix": "", "rename": {"^": "backbone."}}


def test_values_arrive_where_the_rules_say():
    keys, entries, truth = bert()
    source = {key: torch.randn(shape) for key, shape in keys.items()}
    model = net(entries).to_empty(device="cpu")
    checkpoint = warmstart.open_checkpoint(source)
    suggestion = suggest_rules(model, Pretrained(source), checkpoint)
    warmstart.load(model, suggestion.pretrained)
    for entry, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[truth[entry]])


def test_yaml_is_the_fields_of_a_pretrained(suggest, tmp_path):
    keys, entries, _ = bert()
    suggestion = suggest(keys, entries)
    fields = yaml.safe_load(suggestion.to_yaml())
    plan = warmstart.plan(net(entries), Pretrained(Header(keys), **fields))
    assert plan.mapping == suggestion.mapping


# ---- twins ----

GATED = {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
NUMBERED = {"ffn.w1.weight": (F, D), "ffn.w3.weight": (F, D), "ffn.w2.weight": (D, F)}


def gated(suggest, **options):
    keys = layers("layers.{}", {"attn.wq.weight": (D, D), "norm.weight": (D,)} | NUMBERED, range(4))
    entries = layers("layers.{}", {"attn.q_proj.weight": (D, D), "norm.weight": (D,)} | GATED, range(4))
    return suggest(keys, entries, **options)


def test_twins_of_equal_shape_are_said_in_both_readings_and_not_applied(suggest):
    suggestion = gated(suggest)
    twins = {f"layers.{i}.mlp.{name}.weight" for i in range(4) for name in ("gate_proj", "up_proj")}
    assert not twins & suggestion.mapping.keys()
    (proposal,) = [p for p in suggestion.proposed if twins & p.mapping.keys()]
    assert proposal.mapping["layers.0.mlp.gate_proj.weight"] == ("layers.0.ffn.w1.weight",)
    (rival,) = proposal.rivals
    assert rival["layers.0.mlp.gate_proj.weight"] == ("layers.0.ffn.w3.weight",)
    assert rival["layers.0.mlp.up_proj.weight"] == ("layers.0.ffn.w1.weight",)
    assert "both ways" in proposal.doubt
    assert "or: " in str(suggestion)


def test_accept_applies_the_first_reading_of_what_it_names(suggest):
    suggestion = gated(suggest, accept="layers.*.mlp.gate_proj")
    assert suggestion.mapping["layers.3.mlp.gate_proj.weight"] == ("layers.3.ffn.w1.weight",)
    assert suggestion.mapping["layers.3.mlp.up_proj.weight"] == ("layers.3.ffn.w3.weight",)


def test_accept_of_nothing_proposed_is_an_error(suggest):
    with pytest.raises(MappingError, match=r"accept='head' names no entry"):
        gated(suggest, accept="head")


# ---- what is missing on both sides ----


@pytest.mark.parametrize(
    ("key", "entry"),
    [("gate_proj", "up_proj"), ("up_proj", "gate_proj"), ("q_proj", "k_proj"), ("q_norm", "k_norm"), ("norm1", "norm2"),
     ("layernorm_before", "layernorm_after"), ("running_a", "running_b")],
)  # fmt: skip
def test_the_last_two_of_a_shape_are_not_a_pair(suggest, key, entry):
    parts = {"self_attn.o_proj.weight": (D, D), "mlp.down_proj.weight": (D, F), "mlp.down_proj.bias": (D,)}
    keys = layers("layers.{}", parts | {f"self_attn.{key}.weight": (7, 5)}, range(4))
    entries = layers("model.layers.{}", parts | {f"self_attn.{entry}.weight": (7, 5)}, range(4))
    suggestion = suggest(keys, entries)
    assert len(suggestion.mapping) == 12
    assert not [name for name in suggestion.mapping if entry in name]


def test_an_exact_name_is_not_taken_by_another_tensor(suggest):
    keys = {f"enc.{i}.{x}.weight": (4, 4) for i in range(6) for x in "abc"}
    entries = {f"{name}": shape for name, shape in keys.items()}
    assert {e: k[0] for e, k in suggest(keys, entries).mapping.items()} == {name: name for name in keys}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["names", "kinds"]))
@example(626, "kinds")  # values on one side, the output projection on the other
def test_nothing_sure_is_wrong_whatever_is_dropped(seed, what):
    keys, entries, truth = bert(4)
    chance = random.Random(seed)

    def kept(names):
        kind = (
            (lambda n: n)
            if what == "names"
            else (lambda n: ".".join("#" if s.isdecimal() else s for s in n.split(".")))
        )
        gone = {k for k in sorted({kind(n) for n in names}) if chance.random() < 0.15}
        return {n: s for n, s in names.items() if kind(n) not in gone}

    checkpoint = Header(kept(keys))
    try:
        suggestion = suggest_rules(net(kept(entries)), Pretrained(checkpoint), checkpoint)
    except MappingError:
        return
    assert not wrong(suggestion, truth)


words_of_letters = st.text("bcdfghjklmnpqrtvwxz", min_size=4, max_size=9)  # without the plural's s


@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans())
def test_another_language_on_both_sides_makes_nothing_wrong(data, vocabulary):
    keys, entries, truth = bert()
    known = sorted({w for n in (*keys, *entries) for w in n.split(".") if not w.isdecimal()} - {"weight", "bias"})
    drawn = data.draw(st.lists(words_of_letters, min_size=len(known), max_size=len(known), unique=True))
    language = dict(zip(known, drawn, strict=True))

    def said(name):
        return ".".join(language.get(word, word) for word in name.split("."))

    checkpoint = Header({said(k): v for k, v in keys.items()})
    try:
        suggestion = suggest_rules(
            net({said(e): v for e, v in entries.items()}), Pretrained(checkpoint), checkpoint, vocabulary=vocabulary
        )
    except MappingError:
        return
    assert not wrong(suggestion, {said(e): said(k) for e, k in truth.items()})


TOWER = {
    "attention.query.weight": (D, D), "attention.key.weight": (D, D), "attention.output.weight": (D, D),
    "mlp.up.weight": (F, D), "mlp.down.weight": (D, F), "norm.weight": (D,), "gain": (3,),
}  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_towers_in_any_language_are_never_crossed(data):
    """Two towers, called otherwise on both sides, with or without modules that both call alike, some lost crosswise."""
    towers = data.draw(st.lists(words_of_letters, min_size=4, max_size=4, unique=True))
    kept = data.draw(st.booleans())  # whether the sides have one language for what is in a tower
    inside = sorted({w for n in TOWER for w in n.split(".")} - {"weight"})
    drawn = data.draw(st.lists(words_of_letters, min_size=len(inside), max_size=len(inside), unique=True))
    language = {} if kept else dict(zip(inside, drawn, strict=True))
    lost = data.draw(st.tuples(*[st.sampled_from([None, *inside])] * 2))
    truth = {}
    for key, entry in zip(towers[:2], towers[2:], strict=True):
        for part in TOWER:
            said = ".".join(language.get(word, word) for word in part.split("."))
            truth |= {f"{entry}.layers.{i}.{said}": f"{key}.layers.{i}.{part}" for i in range(4)}
    shapes = {key: TOWER[key.split(".", 3)[3]] for key in truth.values()}
    keys = {k: s for k, s in shapes.items() if not (k.startswith(f"{towers[0]}.") and lost[0] in k.split("."))}
    entries = {
        e: shapes[k] for e, k in truth.items() if not (e.startswith(f"{towers[3]}.") and lost[1] in k.split("."))
    }
    checkpoint = Header(keys)
    try:
        suggestion = suggest_rules(net(entries), Pretrained(checkpoint), checkpoint)
    except MappingError:
        return
    assert not wrong(suggestion, truth)


# ---- indices ----


def test_a_list_that_starts_later_is_a_conversion(suggest):
    parts = {"conv.weight": (4, 3), "conv.bias": (4,), "norm.weight": (5,)}
    keys = layers("decoder.layers.{}", parts, range(1, 6)) | {"decoder.embed.weight": (9, 9)}
    entries = layers("decoder.layers.{}", parts, range(5)) | {"decoder.embed.weight": (9, 9)}
    suggestion = suggest(keys, entries)
    assert suggestion.mapping["decoder.layers.0.conv.weight"] == ("decoder.layers.1.conv.weight",)
    assert len(suggestion.mapping) == 16
    assert warmstart.plan(net(entries), suggestion.pretrained).mapping == suggestion.mapping


def test_lists_with_gaps_that_start_differently_are_said_both_ways(suggest):
    rest = {f"other.{x}.weight": (i + 2, 9) for i, x in enumerate("abcdefghijkl")}
    keys = layers("items.{}", {"w.weight": (4, 3)}, (1, 2, 4)) | rest
    entries = layers("items.{}", {"w.weight": (4, 3)}, (0, 1, 3)) | rest
    suggestion = suggest(keys, entries)
    assert len(suggestion.mapping) == 12
    assert all("numbers" in p.doubt for p in suggestion.proposed)


def test_a_list_alone_whose_numbers_differ_is_said_both_ways(suggest):
    parts = {"norm.weight": (4,), "fc.weight": (4, 3), "fc.bias": (3,), "up.weight": (3, 4)}
    keys = layers("text.layers.{}", parts, range(6)) | {f"text.extra.layer_query.{i}": (5,) for i in range(5)}
    entries = layers("text.layers.{}", parts, range(6)) | {f"text.layers.{i}.query": (5,) for i in range(1, 6)}
    suggestion = suggest(keys, entries)
    assert len(suggestion.mapping) == 24
    assert not [entry for entry in suggestion.mapping if "query" in entry]


def test_a_raw_number_is_no_match(suggest):
    rest = layers("layers.{}", {"fc.weight": (4, 3), "fc.bias": (4,), "norm.weight": (5,)}, range(4))
    keys = rest | {f"stem.conv2d{i}.weight": (6, 6, 3, 3) for i in (1, 2, 3)}
    entries = {f"net.{k}": v for k, v in rest.items()} | {f"net.stem.convs.{i}.weight": (6, 6, 3, 3) for i in range(3)}
    suggestion = suggest(keys, entries)
    truth = {f"net.stem.convs.{i}.weight": f"stem.conv2d{i + 1}.weight" for i in range(3)}
    assert not wrong(suggestion, truth | {f"net.{name}": name for name in rest})


def test_words_that_both_sides_own_have_their_own_partners(suggest):
    """`fpn` against `pan`, with the true partner of one missing on each side."""
    parts = {"conv.weight": (4, 4, 3, 3), "conv.bias": (4,), "norm.weight": (7,)}
    keys = layers("neck.fpn.{}", parts, range(3)) | layers("neck.pan.{}", parts, range(3))
    entries = {f"model.{name}": shape for name, shape in keys.items()}
    del keys["neck.pan.1.conv.weight"]
    del entries["model.neck.fpn.1.conv.weight"]
    assert not wrong(suggest(keys, entries), {f"model.{name}": name for name in keys})


# ---- what is not answered ----


def test_unrelated_sides_are_an_error_with_the_best_partial_explanation(suggest):
    keys, _, _ = bert()
    other = {f"features.{i}.conv.weight": (4, 4, 3, 3) for i in range(20)} | {
        "bert.encoder.layer.0.output.dense.bias": (D,)
    }
    with pytest.raises(MappingError, match="too little in common") as error:
        suggest(keys, other)
    assert "1 of 37 keys" in str(error.value)
    assert "into=" in str(error.value)


def test_rules_that_are_there_already_are_not_inferred_again(suggest):
    keys, entries, _ = bert()
    with pytest.raises(MappingError, match="rename= is what suggest infers"):
        suggest(keys, entries, fields={"rename": {"a": "b"}})


def test_into_and_select_narrow_both_sides(suggest):
    keys, entries, truth = bert()
    model = {f"tower.{e}": s for e, s in entries.items()} | {"head.weight": (3, D)}
    suggestion = suggest(keys | {"cls.weight": (2, 2)}, model, fields={"into": "tower", "select": "bert"})
    assert {e.removeprefix("tower."): k[0] for e, k in suggestion.mapping.items()} == truth
    assert suggestion.unexplained == ((), ())


def test_what_is_left_on_both_sides_is_said(suggest):
    keys, entries, _ = bert()
    suggestion = suggest(keys | {"cls.decoder.weight": (7, 3)}, entries | {"head.fc.weight": (5, 2)})
    assert suggestion.unexplained == (("cls.decoder.weight",), ("head.fc.weight",))
    assert "cls.decoder.weight" in suggestion.to_yaml()


def test_hostile_names_are_printed_safely(suggest):
    keys, entries, _ = bert()
    text = str(suggest(keys | {"\x1b[31mred\n.weight": (3,)}, entries))
    assert "\x1b" not in text
    assert "\\x1b[31mred\\n.weight" in text


def test_names_that_look_like_the_notation_are_names(suggest):
    keys, _, _ = bert()
    odd = {"a.#.b": (2,), "c#.d": (3,), "{i}.e": (4,), "f.\ue000.g": (5,), r"h\1.i": (6,)}
    suggestion = suggest({f"net.{k}": v for k, v in (keys | odd).items()}, keys | odd)
    assert suggestion.mapping.keys() >= (keys | odd).keys() - {"f.\ue000.g"}
    assert not wrong(suggestion, {name: f"net.{name}" for name in keys | odd})


def test_no_order_of_keys_is_evidence(suggest):
    keys, entries, _ = bert()
    chance = random.Random(0)
    shuffled = [dict(chance.sample(list(side.items()), len(side))) for side in (keys, entries)]
    assert suggest(*shuffled).mapping == suggest(keys, entries).mapping


def test_tied_entries_are_explained_by_their_twin():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "fc": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["emb"].weight
    source = {"net.emb.weight": torch.randn(9, 4), "net.fc.weight": torch.randn(4, 4), "net.fc.bias": torch.randn(4)}
    suggestion = suggest_rules(model, Pretrained(source), warmstart.open_checkpoint(source))
    assert suggestion.unexplained == ((), ())
    warmstart.load(model, suggestion.pretrained)
    assert torch.equal(model["head"].weight, source["net.emb.weight"])


# ---- values ----


def test_values_refute_a_proposal():
    """A norm's weight is near one; what lies near zero is its bias, whatever shape says."""
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                nn.ModuleDict({"norm": nn.LayerNorm(5, bias=False), "fc": nn.Linear(5, 3)}) for _ in range(3)
            )
        }
    )
    source = {
        f"blocks.{i}.fc.{leaf}": torch.randn(shape)
        for i in range(3)
        for leaf, shape in (("weight", (3, 5)), ("bias", (3,)))
    }
    source |= {f"blocks.{i}.shift.weight": torch.zeros(5) for i in range(3)}
    checkpoint = warmstart.open_checkpoint(source)
    by_names = suggest_rules(model, Pretrained(source), checkpoint)
    by_values = suggest_rules(model, Pretrained(source), checkpoint, evidence="values")
    assert [p for p in by_names.proposed if "blocks.0.norm.weight" in p.mapping]
    assert not by_values.proposed


def test_a_hundred_thousand_keys_are_a_few_decisions(suggest):
    keys = layers("encoder.layer.{}", BERT, range(1000))
    entries = {f"blocks.{i}.{own}": keys[f"encoder.layer.{i}.{key}"] for i in range(1000) for own, key in OWN.items()}
    suggestion = suggest(keys, entries)
    assert len(suggestion.mapping) == len(entries)
    assert len(suggestion.pretrained.rename) <= 10


# ---- what only looks equal ----

HEAD = {"weight": (9, 9), "bias": (9,)}


def sequence_and_names(suggest, **options):
    """SAM's heads: three layers numbered in the checkpoint; the model names the first and the last of them."""
    rest = layers("blocks.{}", {"attn.proj.weight": (5, 5), "attn.proj.bias": (5,), "mlp.fc1.weight": (7, 5)}, range(5))
    keys = rest | layers("head.layers.{}", HEAD, range(3))
    entries = rest | {f"head.{name}.{leaf}": shape for name in ("proj_in", "layers.0", "proj_out")
                      for leaf, shape in HEAD.items()}  # fmt: skip
    return suggest(keys, entries, **options)


@pytest.mark.parametrize("vocabulary", [True, False])
def test_an_equal_name_in_a_row_that_is_spread_is_not_sure_and_is_said_to_be_left_out(suggest, vocabulary):
    suggestion = sequence_and_names(suggest, vocabulary=vocabulary)
    assert not [entry for entry in suggestion.mapping if entry.startswith("head.")]
    assert len(suggestion.mapping) == 15
    assert suggestion.withheld == ("head.layers.0.bias", "head.layers.0.weight")
    assert "left out by exclude" in str(suggestion)
    assert "left out by exclude" in suggestion.to_yaml()


def test_a_square_matrix_is_never_transposed(suggest):
    """Equal shapes say nothing about a transposition."""
    suggestion = sequence_and_names(suggest)
    assert "convert" not in suggestion.pretrained.rules()


def test_two_modules_of_one_shape_keep_their_own_tensors(suggest):
    """`H_module` and `L_module` alike, one kind of tensor missing in each: the last two are not a pair."""
    parts = {"mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F), "attn.q_proj.weight": (D, D)}
    keys = layers("H_module.layers.{}", parts, range(4)) | layers("L_module.layers.{}", parts, range(4))
    entries = dict(keys)
    for i in range(4):
        del keys[f"L_module.layers.{i}.mlp.down_proj.weight"]
        del entries[f"H_module.layers.{i}.mlp.down_proj.weight"]
    assert not wrong(suggest(keys, entries), {name: name for name in keys})


def test_what_the_path_says_needs_no_word_of_its_own(suggest):
    """`self_attn.sinks` is `self_attn.attention_sink_bias`, and a slip of spelling is no other word."""
    rest = {"mlp.up_proj.weight": (F, D), "norm.weight": (D,)}
    theirs = rest | {"self_attn.query.weight": (D, D), "self_attn.attention_sink_bias": (3,)}
    ours = rest | {"self_attn.q_proj.weight": (D, D), "self_attn.sinks": (3,)}
    keys = layers("layers.{}", theirs, range(4)) | {"view_seperator": (11,)}
    entries = layers("layers.{}", ours, range(4)) | {"view_separator": (11,)}
    suggestion = suggest(keys, entries)
    assert suggestion.mapping["layers.2.self_attn.sinks"] == ("layers.2.self_attn.attention_sink_bias",)
    assert suggestion.mapping["view_separator"] == ("view_seperator",)


@pytest.mark.parametrize("names", [("H_module", "L_module"), ("high", "low")])
@pytest.mark.parametrize("attention", ["attn", "mixer", "block"])
def test_two_towers_keep_their_own_tensors_whatever_stands_below_them(suggest, names, attention):
    """`H_module...attn.o_proj` and `L_module...self_attn.o_proj`: what else differs does not make them one.

    Nor does what is missing, where both towers are called otherwise: each has lost its attention on one side.
    """
    parts = {"o_proj.weight": (D, D), "o_proj.bias": (D,)}
    mlp = {"mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F), "norm.weight": (D,)}
    keys, truth = {"embed.weight": (100, D)}, {"embed.weight": "embed.weight"}
    for tower, own in zip(("H_module", "L_module"), names, strict=True):
        here = {f"{attention}.{part}": shape for part, shape in parts.items()} | mlp
        keys |= layers(f"{tower}.layers.{{}}", here, range(4))
        truth |= {f"{own}.layers.{i}.{part.replace(f'{attention}.', 'self_attn.')}": f"{tower}.layers.{i}.{part}"
                  for i in range(4) for part in here}  # fmt: skip
    entries = {entry: keys[key] for entry, key in truth.items()}
    for i in range(4):
        for part in parts:
            del keys[f"H_module.layers.{i}.{attention}.{part}"]
            del entries[f"{names[1]}.layers.{i}.self_attn.{part}"]
    assert not wrong(suggest(keys, entries), truth)


@pytest.mark.parametrize("missing", [True, False])
def test_a_norm_on_embeddings_is_not_the_last_norm_of_a_stack(suggest, missing):
    """`_embedding.layer_norm` is `embedding_layernorm`, although `embedding` and `decoder` share a table and a norm."""
    parts = {"layer_norm_1.weight": (D,), "layer_norm_1.bias": (D,), "third.dense_in.weight": (F, D)}
    own = {"input_layernorm.weight": (D,), "input_layernorm.bias": (D,), "mlp.fc1.weight": (F, D)}
    keys = layers("net._decoder.layers.{}", parts, range(4)) | layers("encoder.layers.{}", own, range(4))
    entries = layers("decoder.layers.{}", own, range(4)) | layers("encoder.layers.{}", own, range(4))
    truth = {
        f"decoder.layers.{i}.{e}": f"net._decoder.layers.{i}.{k}"
        for i in range(4)
        for e, k in zip(own, parts, strict=True)
    } | {"decoder.embed_tokens.weight": "net._embedding.token_embedding.weight"}
    for leaf in ("weight", "bias"):
        truth[f"decoder.norm.{leaf}"] = f"net._decoder.final_layer_norm.{leaf}"
        truth[f"decoder.embedding_layernorm.{leaf}"] = f"net._embedding.layer_norm.{leaf}"
        keys |= {f"net._decoder.final_layer_norm.{leaf}": (D,), f"net._embedding.layer_norm.{leaf}": (D,)}
        entries |= {f"decoder.norm.{leaf}": (D,), f"decoder.embedding_layernorm.{leaf}": (D,)}
        if missing:
            del keys[f"net._decoder.final_layer_norm.{leaf}"], entries[f"decoder.embedding_layernorm.{leaf}"]
    keys["net._embedding.token_embedding.weight"] = entries["decoder.embed_tokens.weight"] = (100, D)
    truth |= {name: name for name in keys if name.startswith("encoder.")}
    assert not wrong(suggest(keys, entries), truth)


def test_beside_names_that_are_kept_an_extra_word_is_another_tensor(suggest):
    """`output_gate` is not `out_proj` where all that lies beside it has one name on both sides."""
    parts = {"self_attn.qkv_proj.weight": (3 * D, D), "mlp.up.weight": (F, D), "norm.weight": (D,)}
    keys = layers("layers.{}", parts | {"self_attn.out_proj.weight": (D, D)}, range(6)) | {"embed.weight": (50, D)}
    entries = layers("layers.{}", parts | {"self_attn.output_gate.weight": (D, D)}, range(6)) | {
        "embed.weight": (50, D)
    }
    assert not wrong(suggest(keys, entries), {name: name for name in keys})


def test_the_word_of_a_module_that_the_other_side_says_elsewhere_is_not_spare(suggest):
    """`encoder.layer_norm` is not `tower.adapter.norm`: the checkpoint has an adapter, by another path."""
    parts = {"fc1.weight": (F, D), "fc2.weight": (D, F), "norm1.weight": (D,), "norm1.bias": (D,)}
    keys = layers("audio.encoder.layers.{}", parts, range(12)) | {"audio.encoder.layer_norm.weight": (7,)}
    keys |= {"audio_adapter.proj.0.weight": (7,), "audio_adapter.proj.1.weight": (9, 7)}
    entries = layers("tower.layers.{}", parts, range(12))
    entries |= {"tower.adapter.norm.weight": (7,), "tower.adapter.fc1.weight": (9, 7)}
    truth = {e: f"audio.encoder.{e.removeprefix('tower.')}" for e in entries if "layers" in e} | {
        "tower.adapter.norm.weight": "audio_adapter.proj.0.weight",
        "tower.adapter.fc1.weight": "audio_adapter.proj.1.weight",
    }
    assert not wrong(suggest(keys, entries), truth)


def test_two_towers_of_other_names_are_said_not_to_be_known(suggest):
    """All of the one may be the other: both are there on both sides, and no name tells them apart."""
    parts = {"mlp.up.weight": (F, D), "mlp.down.weight": (D, F), "norm.weight": (D,), "attn.qkv.weight": (3 * D, D)}
    rest = layers("stem.layers.{}", parts | {"gain": (2,)}, range(9))
    keys = rest | layers("left.layers.{}", parts, range(4)) | layers("right.layers.{}", parts, range(4))
    entries = rest | layers("up.layers.{}", parts, range(4)) | layers("down.layers.{}", parts, range(4))
    suggestion = suggest(keys, entries)
    assert suggestion.mapping.keys() == rest.keys()
    assert suggestion.proposed


def test_a_tower_that_keeps_its_name_leaves_the_other_to_the_other(suggest):
    parts = {"mlp.up.weight": (F, D), "mlp.down.weight": (D, F), "norm.weight": (D,), "attn.qkv.weight": (3 * D, D)}
    keys = layers("text.layers.{}", parts, range(4)) | layers("image.layers.{}", parts, range(4))
    entries = layers("language.layers.{}", parts, range(4)) | layers("vision_image.layers.{}", parts, range(4))
    truth = {e: e.replace("language", "text").replace("vision_image", "image") for e in entries}
    suggestion = suggest(keys, entries)
    assert {entry: found[0] for entry, found in suggestion.mapping.items()} == truth


def test_a_transposed_name_is_not_another_of_its_shape(suggest):
    """GPT-2's `Conv1D`: turned, the matrix of `c_fc` has the shape of `c_proj`'s, and `fc` and `proj` say little."""
    rest = {"ln_1.weight": (D,), "attn.c_attn.bias": (3 * D,), "mlp.c_fc.bias": (F,), "mlp.c_proj.bias": (D,)}
    turned = {"attn.c_attn.weight": (D, 3 * D), "mlp.c_fc.weight": (D, F), "mlp.c_proj.weight": (F, D)}
    keys = layers("h.{}", rest | turned, range(3))
    entries = layers("h.{}", rest | {name: shape[::-1] for name, shape in turned.items()}, range(3))
    suggestion = suggest(keys, entries)
    assert suggestion.mapping == {name: (name,) for name in entries}
    assert suggestion.pretrained.rules()["convert"]


def test_rows_that_count_from_0_and_from_1_go_together_in_order(suggest):
    """Kimi-K2.5's `norm0`, `norm1` are `norm1`, `norm2`: the one name that both have is not one tensor."""
    parts = {"attn.wo.weight": (D, D), "mlp.fc0.weight": (F, D), "mlp.fc1.weight": (D, F)}
    own = {"attn.wo.weight": (D, D), "mlp.fc1.weight": (F, D), "mlp.fc2.weight": (D, F)}
    keys = layers("blocks.{}", parts | {"norm0.weight": (D,), "norm1.weight": (D,)}, range(3))
    entries = layers("layers.{}", own | {"norm1.weight": (D,), "norm2.weight": (D,)}, range(3))
    truth = {
        f"layers.{i}.{e}.weight": f"blocks.{i}.{k}.weight"
        for i in range(3)
        for e, k in {
            "attn.wo": "attn.wo", "mlp.fc1": "mlp.fc0", "mlp.fc2": "mlp.fc1", "norm1": "norm0", "norm2": "norm1"
        }.items()
    }  # fmt: skip
    assert not wrong(suggest(keys, entries), truth)
    for side, gone in ((keys, "norm1"), (entries, "norm1"), (entries, "norm2")):
        left = {name: shape for name, shape in side.items() if gone not in name}
        assert not wrong(suggest(left, entries) if side is keys else suggest(keys, left), truth)


@pytest.mark.parametrize("large", ["checkpoint", "model"])
def test_more_kinds_of_names_than_are_compared_are_an_answer_of_their_own(suggest, monkeypatch, large):
    """Names without any sense are refused before a single one is read as words."""
    nonsense = {f"{'ab'[i % 2]}x{i}y.w": (i % 9 + 1,) for i in range(5_001)}
    sides = (nonsense, {"a.weight": (3,)}) if large == "checkpoint" else ({"a.weight": (3,)}, nonsense)
    read = []
    monkeypatch.setattr(Lexicon, "segment", lambda _, segment: read.append(segment))
    with pytest.raises(MappingError, match=rf"the {large} has 5,001 kinds of names .* more than the 5,000") as error:
        suggest(*sides)
    assert "select=" in str(error.value)
    assert not read


def resnet(kept: int = 4) -> tuple[dict, dict, dict]:
    """Stages of a ResNet as torchvision spells them, and as detectron2 does: entry to key too."""
    truth, keys = {}, {}
    channels = 8
    for stage in range(1, kept + 1):
        for block in range(2):
            row = {f"conv{i}": (channels, channels, size, size) for i, size in ((1, 1), (2, 3))}
            row["conv3"] = (4 * channels, channels, 1, 1)
            if not block:
                row["conv1"] = (channels, 2 * channels, 1, 1)
            parts = {f"{name}.weight": (shape, f"{name}.weight") for name, shape in row.items()}
            for i in (1, 2, 3):
                size = (row[f"conv{i}"][0],)
                parts |= {
                    f"bn{i}.{tensor}": (size, f"conv{i}.norm.{tensor}")
                    for tensor in ("weight", "bias", "running_mean", "running_var")
                }
            if not block:
                parts["downsample.0.weight"] = ((4 * channels, 2 * channels, 1, 1), "shortcut.weight")
                parts |= {
                    f"downsample.1.{tensor}": ((4 * channels,), f"shortcut.norm.{tensor}")
                    for tensor in ("weight", "bias", "running_mean", "running_var")
                }
            for key, (shape, entry) in parts.items():
                keys[f"layer{stage}.{block}.{key}"] = shape
                truth[f"res{stage + 1}.{block}.{entry}"] = f"layer{stage}.{block}.{key}"
        channels *= 2
    return keys, {entry: keys[key] for entry, key in truth.items()}, truth


def test_the_stages_of_a_resnet_are_never_taken_for_each_other(suggest):
    """`layer1` is `res2`, whatever the numbers say."""
    keys, entries, truth = resnet()
    suggestion = suggest(keys, entries)
    assert wrong(suggestion, truth) == {}
    assert len(suggestion.mapping) > 0.7 * len(truth)


@pytest.mark.parametrize("dropped", ["layer1.", "layer4.", "layer2.0.downsample"])
def test_subtrees_of_a_resnet_under_a_prefix_go_where_their_names_say(suggest, dropped):
    """A backbone that lacks a stage, or its shortcut: the others are not moved up."""
    keys, _, _ = resnet()
    truth = {f"backbone.body.{key}": key for key in keys if not key.startswith(dropped)}
    suggestion = suggest(keys, {entry: keys[key] for entry, key in truth.items()})
    assert {entry: found[0] for entry, found in suggestion.mapping.items()} == truth
    assert set(suggestion.unexplained.keys) == {key for key in keys if key.startswith(dropped)}


def block(names, d=D):
    return {f"{name}.{leaf}": shape for name in names for leaf, shape in (("weight", (d,)), ("bias", (d,)))}


def test_the_last_norm_of_a_block_is_not_that_of_a_stack(suggest):
    """`final_layer_norm` of a block and `layer_norm` of the other's, each of whose partners is missing."""
    parts = {f"attn.{p}.weight": (D, D) for p in ("q_proj", "k_proj")} | {"fc1.weight": (F, D), "fc2.weight": (D, F)}
    keys = layers("layers.{}", parts | block(["final_layer_norm"]), range(4))
    entries = layers("layers.{}", parts | block(["layer_norm"]), range(4))
    suggestion = suggest(keys, entries)
    assert not any("layer_norm" in entry for entry in suggestion.mapping)


def test_attention_to_itself_is_not_attention_to_another_sequence(suggest):
    parts = {
        f"{p}.{leaf}": shape for p in ("q", "k", "v", "out") for leaf, shape in (("weight", (D, D)), ("bias", (D,)))
    }
    mlp = {"mlp.0.weight": (F, D), "mlp.2.weight": (D, F)}
    keys = layers("blocks.{}", {f"cross_attn.{p}": s for p, s in parts.items()} | mlp, range(4))
    entries = layers("layers.{}", {f"self_attn.{p}": s for p, s in parts.items()} | mlp, range(4))
    suggestion = suggest(keys, entries)
    assert not any("attn" in entry for entry in suggestion.mapping)


def test_a_list_is_spread_whichever_of_its_named_parts_is_there(suggest):
    """`layers.0` of three is `proj_in`, also where the model has no `proj_in`."""
    keys = layers("head.layers.{}", {"weight": (D, D), "bias": (D,)}, range(2)) | {"head.layers.2.weight": (4, D)}
    entries = {"head.layers.0.weight": (D, D), "head.layers.0.bias": (D,), "head.proj_out.weight": (4, D)}
    more = layers("body.{}", BERT, range(4))
    suggestion = suggest(keys | more, entries | more)
    assert not any(entry.startswith("head.layers") for entry in suggestion.mapping)


def test_the_two_maps_of_an_mlp_by_any_of_their_names(suggest):
    own = {"feed_forward.intermediate_dense.weight": (F, D), "feed_forward.output_dense.weight": (D, F)}
    parts = {f"self_attn.{p}_proj.weight": (D, D) for p in "qkv"}
    keys = layers("layers.{}", parts | {"fc1.weight": (F, D), "fc2.weight": (D, F)}, range(4))
    entries = layers("layers.{}", {f"attention.{p}_proj.weight": (D, D) for p in "qkv"} | own, range(4))
    mapping = suggest(keys, entries).mapping
    assert mapping["layers.1.feed_forward.intermediate_dense.weight"] == ("layers.1.fc1.weight",)
    assert len(mapping) == len(entries)
