from __future__ import annotations

import fnmatch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from warmstart.patterns import Pattern, PatternSet, as_patterns, nearest


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("encoder", "encoder", True),
        ("encoder", "encoder.weight", True),
        ("encoder", "encoder.layer.0.weight", True),
        ("encoder", "encoder2.weight", False),
        ("encoder", "pre_encoder.weight", False),
        ("encoder", "model.encoder.weight", False),
        ("encoder.layer.*.attention", "encoder.layer.3.attention.query.weight", True),
        ("encoder.layer.*.attention", "encoder.layer.3.attention_norm.weight", False),
        ("encoder.layer.*.attention", "encoder.layer.attention.weight", False),
        ("*.bias", "head.bias", True),
        ("*.bias", "encoder.layer.0.bias", True),
        ("*.bias", "bias", False),
        ("*bias", "bias", True),
        ("*.bias", "encoder.bias_table", False),
        ("*.bias", "encoder.bias.scale", True),  # a leading path of the name ends in .bias
        ("*", "anything.at.all", True),
        ("layer.?", "layer.7.weight", True),
        ("layer.?", "layer.17.weight", False),
        ("layer.[0-3]", "layer.2.weight", True),
        ("layer.[!0-3]", "layer.2.weight", False),
        ("Encoder", "encoder.weight", False),  # case-sensitive on every platform
        ("encoder.", "encoder.weight", False),
        ("a.b", "axb", False),  # a dot is a dot
        ("x[[]0]", "x[0].w", True),
        ("line", "line\nbreak", False),
        ("li*k", "line\nbreak", True),
        ("?encoder", "encoder.weight", True),
        ("?encoder", "xencoder.weight", False),
    ],
)
def test_a_pattern_is_a_glob_against_the_name_or_a_leading_path_of_it(pattern, name, expected):
    assert Pattern(pattern).matches(name) is expected


@pytest.mark.parametrize(
    ("text", "optional", "glob"), [("cls", False, "cls"), ("?cls", True, "cls"), ("??ls", True, "?ls")]
)
def test_one_leading_question_mark_makes_a_pattern_optional(text, optional, glob):
    assert (Pattern(text).optional, Pattern(text).glob, Pattern(text).text) == (optional, glob, text)


def test_tf_6_one_list_takes_whole_variables_and_their_slots_apart():
    # ["v1", "v2[^/]"] as patterns: v1 and its slot, and v2 without its slot.
    names = ["v1", "v1.Momentum", "v2", "v2.Momentum"]
    include, exclude = PatternSet(["v1", "v2"], where="include"), PatternSet("v2.*", where="exclude")
    assert [n for n in names if include.matches(n) and not exclude.matches(n)] == ["v1", "v1.Momentum", "v2"]


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["layer1", "layer2.0"], ["layer1.0.bn1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight"]),
        (["layer1.0.bn1"], ["layer1.0.bn1.weight"]),
        ("layer1.0.bn1", ["layer1.0.bn1.weight"]),
        ("*", ["fc.weight", "layer1.0.bn1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight",
               "layer2.1.conv1.weight", "layer3.0.conv1.weight"]),
    ],
)  # fmt: skip
def test_ti_5_patterns_name_submodules_and_a_string_is_one_pattern(patterns, frozen):
    names = ["fc.weight", "layer1.0.bn1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer2.1.conv1.weight",
             "layer3.0.conv1.weight"]  # fmt: skip
    chosen = PatternSet(patterns, where="freeze")
    assert [name for name in names if chosen.matches(name)] == frozen


def test_es_5_encoder_is_encoder_and_below_but_never_encoder2():
    assert [n for n in ["encoder", "encoder.x", "encoder2.x"] if Pattern("encoder").matches(n)] == [
        "encoder",
        "encoder.x",
    ]


def test_a_set_marks_every_pattern_that_hits_not_only_the_first():
    patterns = PatternSet(["encoder", "*.bias", "head", "?gone", "typo"], where="freeze")
    assert patterns.matches("encoder.bias")
    assert not patterns.matches("decoder.weight")
    assert patterns.matches("module.head.weight", "head.weight")  # two spellings of one entry
    assert [p.text for p in patterns.without_hit()] == ["typo"]
    assert bool(patterns)
    assert not PatternSet((), where="freeze")


@pytest.mark.parametrize("value", [["a", 3], [None], [b"a"]])
def test_a_pattern_that_is_no_string_is_a_type_error_naming_the_field(value):
    with pytest.raises(TypeError, match=r"include: a pattern is a string such as 'encoder\.\*', not"):
        as_patterns(value, where="include")


@pytest.mark.parametrize("value", ["", "?", ["a", ""], ["?"]])
def test_an_empty_pattern_is_refused(value):
    with pytest.raises(ValueError, match=r"include: an empty pattern matches nothing; .* write '\*' for everything"):
        as_patterns(value, where="include")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("encodr", "encoder"),
        ("?encodr", "encoder"),
        ("encoder.layers", "encoder.layer"),
        ("haed.*", "head"),
        (r"^clasifier\.", "classifier"),
        ("head.wieght", "head.weight"),
    ],
)
def test_the_nearest_names_are_whole_paths_of_the_depth_that_was_typed(typed, meant):
    names = ["encoder.layer.0.weight", "encoder.layer.1.weight", "head.weight", "classifier.out.weight"]
    assert nearest(typed, names)[0] == meant


def test_a_path_that_lacks_its_beginning_is_found_by_its_whole_segments():
    names = ["encoder.layer.0.weight", "decoder.layer.0.cross.layer.0.weight", "layers.0.weight"]
    assert nearest("layer.0", names)[:2] == ["decoder.layer.0", "encoder.layer.0"]
    assert nearest("0", names) == ["layers.0", "decoder.layer.0", "encoder.layer.0"]
    assert nearest("cross.*", names)[0] == "decoder.layer.0.cross"


def test_nothing_is_near_to_nonsense_and_huge_input_is_cut():
    assert nearest("qqqqqqq", ["encoder.weight"]) == []
    assert nearest("x" * 10_000, ["y" * 10_000, "encoder"]) == []


SEGMENT = st.text(alphabet="ab0_", min_size=1, max_size=3)
NAME = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)
GLOB = st.text(alphabet="ab0_.*?[]!", min_size=1, max_size=8).filter(lambda text: text.strip("?"))


@settings(max_examples=400, derandomize=True, deadline=None)
@given(GLOB, NAME)
@example("*a*", "ba.a0.b")
@example("*.*.a", "b.a.b.a.b")
def test_a_pattern_says_what_fnmatch_says_of_some_leading_path(glob, name):
    pattern, parts = Pattern(glob), name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    assert pattern.matches(name) == any(fnmatch.fnmatchcase(path, pattern.glob) for path in paths)
