from __future__ import annotations

import re

import pytest

from warmstart import MappingError
from warmstart.mapping.planning.renames import Renamer


def renamed(key: str, *stages: dict[str, str]) -> str:
    return Renamer(stages)(key)


@pytest.mark.parametrize(
    ("rules", "key", "expected"),
    [
        ({"encoder": "enc"}, "encoder.weight", "enc.weight"),
        ({"encoder": "enc"}, "model.encoder.weight", "model.enc.weight"),
        ({"encoder": "enc"}, "encoder2.weight", "encoder2.weight"),
        ({"encoder": "enc"}, "pre_encoder.weight", "pre_encoder.weight"),
        ({"encoder": "enc"}, "encoder.encoder.encoder", "enc.enc.enc"),
        ({r"^encoder\.": ""}, "encoder.weight", "weight"),
        ({r"^encoder\.": ""}, "my.encoder.weight", "my.encoder.weight"),
        ({"encoder": ""}, "my.encoder.weight", "my.weight"),  # an empty segment is none
        ({r"\.gamma$": ".weight"}, "norm.gamma", "norm.weight"),
        ({r"\.gamma$": ".weight"}, "norm.gamma_init", "norm.gamma_init"),
        ({r"\.gamma$": ".weight"}, "gamma.x", "gamma.x"),
        ({r"layers\.(\d+)\.attn": r"blocks.\1.attention"}, "enc.layers.11.attn.w", "enc.blocks.11.attention.w"),
        ({r"layers\.(?P<n>\d+)": r"h.\g<n>"}, "layers.3.w", "h.3.w"),
        ({r"layers\.1": "first"}, "layers.12.w", "layers.12.w"),  # ends inside a segment
        ({r"\d": "n"}, "layers.12.w", "layers.12.w"),
        ({"a|ab": "x"}, "ab.w", "x.w"),  # the regex goes on to the alternative that fits
        ({"b?c": "x"}, "bc.c", "x.x"),
        ({"^": "backbone."}, "conv.weight", "backbone.conv.weight"),
        ({"$": ".weight"}, "conv", "conv.weight"),
        ({"": ""}, "conv", "conv"),
        ({r"(.*)": r"model.\1"}, "a.b", "model.a.b"),  # once, not once more at the end of its own match
        ({r"^(.*)$": r"model.\1"}, "a.b", "model.a.b"),
        ({r"(\w+)": r"x_\1"}, "a.b.c", "x_a.x_b.x_c"),
        ({r"(?i:ENCODER)": "e"}, "Encoder.w", "e.w"),
        ({"a.b": "c"}, "a.b.w", "c.w"),
        ({"?gone": "x", "a": "b"}, "a.w", "b.w"),
        ({r"\w+_(\d)": r"g.\1"}, "block_1.w", "g.1.w"),
    ],
)
def test_a_rule_replaces_whole_segments(rules, key, expected):
    assert renamed(key, rules) == expected


def test_hf_4_weight_is_not_weight_scale_inv():
    assert renamed("q_proj.weight", {"weight": "w2"}) == "q_proj.w2"
    assert renamed("q_proj.weight_scale_inv", {"weight": "w2"}) == "q_proj.weight_scale_inv"


def test_x_9_a_short_rule_does_not_reach_into_a_longer_segment():
    assert renamed("qkv.q", {"q": "query"}) == "qkv.query"


def test_x_21_the_layer_number_is_the_layer_s_own():
    assert renamed("enc2.layers.7.w", {r"enc2\.layers\.(\d+)\.w": r"blocks.\1.weight"}) == "blocks.7.weight"


@pytest.mark.parametrize("key", ["gamma.encoder.weight", "aux.head.weight"])
def test_field_note_18_nothing_is_renamed_that_no_rule_asked_for(key):
    assert renamed(key) == key
    assert renamed(key, {"beta": "bias", "hea": "x"}) == key


def test_a_swap_is_a_swap():
    rules = {"left": "right", "right": "left"}
    assert [renamed(key, rules) for key in ("left.w", "right.w", "left.right.left")] == ["right.w", "left.w",
                                                                                      "right.left.right"]  # fmt: skip


def test_within_a_stage_leftmost_wins_then_the_first_listed():
    assert renamed("a.b.c", {r"b\.c": "late", r"a\.b": "early"}) == "early.c"
    assert renamed("a.b.c", {r"a\.b": "two", "a": "one"}) == "two.c"
    assert renamed("a.b.c", {"a": "one", r"a\.b": "two"}) == "one.b.c"


def test_replaced_text_is_not_looked_at_again_within_a_stage_but_in_the_next():
    assert renamed("a.w", {"a": "b", "b": "c"}) == "b.w"
    assert renamed("a.w", {"a": "b"}, {"b": "c"}) == "c.w"
    assert renamed("a.w", {"b": "c"}, {"a": "b"}) == "b.w"


def test_zero_width_rules_and_others_share_a_stage():
    assert renamed("a.w", {"^": "m.", "a": "b"}) == "m.b.w"
    assert renamed("a.w", {"a": "b", "^": "m."}) == "b.w"  # at one place the first listed wins


def test_a_lookahead_sees_the_rest_of_the_key():
    rules = {r"layer(?=\.\d+\.attn)": "attention_layer"}
    assert renamed("layer.0.attn.w", rules) == "attention_layer.0.attn.w"
    assert renamed("layer.0.mlp.w", rules) == "layer.0.mlp.w"


def test_hits_are_counted_once_per_key_and_by_stage():
    renamer = Renamer([{"a": "b", "never": "x", "?maybe": "y"}, {"b": "c", "a": "z"}])
    for key in ("a.a.a", "a.w", "w"):
        renamer(key)
    assert [(rule.rule, rule.hits) for stage in renamer.stages for rule in stage] == [
        ("a", 2), ("never", 0), ("?maybe", 0), ("b", 2), ("a", 0)]  # fmt: skip
    assert [(rule.rule, rule.stage) for rule in renamer.without_hit()] == [("never", 0), ("a", 1)]


def test_an_7_a_rule_that_leaves_nothing_of_a_key_is_an_error_naming_both():
    with pytest.raises(MappingError, match=re.escape("rename: 'encoder' leaves nothing of the key 'encoder'")):
        renamed("encoder", {"encoder": ""})


@pytest.mark.parametrize(
    ("rule", "replacement"),
    [("layer.(", "x"), ("a", r"\1"), (r"(a)", r"\2"), ("(a)", r"\g<name>"), ("*", "x"), ("a{2,1}", "x")],
)
def test_a_rule_that_is_no_regex_is_named_with_an_example_of_one_that_is(rule, replacement):
    message = re.escape(f"rename: {rule!r} -> {replacement!r} is no valid regex and replacement: ")
    with pytest.raises(MappingError, match=message + r".*Write it as for re\.sub, for example \{r'layers"):
        renamed("a", {rule: replacement})
