from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart import MappingError
from warmstart.mapping.conversions.templates import Template, natural, numbered


@pytest.mark.parametrize(
    ("template", "name", "values"),
    [
        ("a.{x}.w", "a.b.w", {"x": "b"}),
        ("a.{x}.w", "a.b.c.w", None),  # one segment
        ("a.{x}.w", "a..w", None),  # not none
        ("a.{x}.w", "za.b.w", None),
        ("a.{x}.w", "a.b.w2", None),
        ("a.{x}", "a.b\n", {"x": "b\n"}),
        ("a.{x}", "a.{x}", {"x": "{x}"}),
        ("a.{r...}.w", "a.w", {"r": ""}),
        ("a.{r...}.w", "a.b.w", {"r": "b."}),
        ("a.{r...}.w", "a.b.c.w", {"r": "b.c."}),
        ("a.{r...}.w", "a..w", {"r": "."}),  # an empty segment is not no segment
        ("a.{r...}.w", "ab.w", None),
        ("a.{r...}.w", "a.bw", None),
        ("{r...}.w", "w", {"r": ""}),
        ("{r...}.w", "a.b.w", {"r": "a.b."}),
        ("{r...}.w", ".w", {"r": "."}),
        ("a.{r...}", "a", {"r": ""}),
        ("a.{r...}", "a.b.c", {"r": "b.c."}),
        ("a.{r...}", "a.", {"r": "."}),
        ("a.{r...}", "ab", None),
        ("{r...}", "", {"r": "."}),
        ("{r...}", "a.b", {"r": "a.b."}),
        ("{p...}.layers.{i}.{r...}", "enc.layers.3.attn.w", {"p": "enc.", "i": "3", "r": "attn.w."}),
        ("{p...}.layers.{i}.{r...}", "layers.3", {"p": "", "i": "3", "r": ""}),
        ("l.{2*i+1}.w", "l.5.w", {"i": "2"}),
        ("l.{2*i+1}.w", "l.4.w", None),
        ("l.{i*2}.w", "l.0.w", {"i": "0"}),
        ("l.{2*i}.w", "l.00.w", None),  # `00` is not 0
        ("l.{i-1}.w", "l.0.w", {"i": "1"}),
        ("l.{i+1}.w", "l.0.w", None),  # i would be -1
        ("l.{2*i}.w", "l.x.w", None),
        ("l.{2*i}.w", "l.\u0662.w", None),  # a digit, and no ASCII one
        ("l.{2*i}.w", "l." + "9" * 5000 + ".w", None),
        ("layer{i}.w", "layer12.w", {"i": "12"}),
        ("layer{i}.w", "layer.w", None),
        ("res{2*i}_b.w", "res4_b.w", {"i": "2"}),
        ("{a}_{b}.w", "x_y.w", {"a": "x", "b": "y"}),
        ("{i}.x.{i}", "3.x.3", {"i": "3"}),
        ("{i}.x.{i}", "3.x.4", None),
        ("{i}.{i+1}", "3.4", {"i": "3"}),
        ("{i}.{i+1}", "3.5", None),
        ("{r...}.to.{r...}", "a.b.to.a.b", {"r": "a.b."}),
        ("a.(b|c)+.{x}", "a.(b|c)+.d", {"x": "d"}),
        ("a.(b|c)+.{x}", "a.b.d", None),
        ("a.{{x}}.{x}", "a.{x}.d", {"x": "d"}),
        ("plain.name", "plain.name", {}),
        ("plain.name", "plain_name", None),
    ],
)
def test_a_template_matches_whole_names_and_renders_them_back(template, name, values):
    parsed = Template(template, numbered([Template(template)]))
    assert parsed.match(name) == values
    if values is not None:
        assert parsed.render(values) == name


def test_x_21_the_layer_number_is_the_layer_s_own():
    assert Template("enc2.layers.{i}.w").match("enc2.layers.7.w") == {"i": "7"}


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("", "it is empty"),
        ("a.{x", "without its partner"),
        ("a.x}", "without its partner"),
        ("a.{}.w", "no placeholder"),
        ("a.{x y}.w", "no placeholder"),
        ("a.{i**2}.w", "no placeholder"),
        ("a.{2*i*2}.w", "no placeholder"),
        ("a.{i/2}.w", "no placeholder"),
        ("a.{__import__('os')}.w", "no placeholder"),
        ("a.{0*i}.w", "the same number for every i"),
        ("a.{x}{y}.w", "two placeholders touch"),
        ("a.b{r...}.w", "a whole segment"),
        ("a.{r...}b", "a whole segment"),
        ("a.{\x1b[31m}", r"\\x1b"),
    ],
)
def test_a_template_that_cannot_be_parsed_says_how_to_write_one(template, why):
    with pytest.raises(MappingError, match=why) as error:
        Template(template)
    assert "write it like 'layers.{i}.{r...}'" in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{a...}.x.{b...}", "x.x"),
        ("{a}_{b}.w", "x_y_z.w"),
        ("{a...}.{i}.{b...}", "p.q"),
    ],
)
def test_a_name_that_fits_in_two_ways_is_refused(template, name):
    with pytest.raises(MappingError, match="in more than one way"):
        Template(template).match(name)


def test_two_rests_in_a_row_can_be_rendered_only():
    for template, values, name in (
        ("{a...}.{b...}", {"a": "x.y.", "b": "z."}, "x.y.z"),
        ("{a...}.{b...}.w", {"a": "", "b": "z."}, "z.w"),
        ("h.{a...}.{b...}", {"a": "x.", "b": ""}, "h.x"),
    ):
        assert Template(template).render(values) == name
        with pytest.raises(MappingError, match=r"nothing tells \{a...\} from \{b...\}"):
            Template(template).check_source()


def test_a_template_may_leave_nothing_of_a_name():
    assert Template("{r...}").render({"r": "a.b."}) == "a.b"
    with pytest.raises(MappingError, match="leaves nothing"):
        Template("{r...}").render({"r": ""})


def test_a_placeholder_that_is_an_index_elsewhere_matches_numbers_only():
    source, target = Template("layers.{i}.w"), Template("h.{i-2}.w")
    source = Template(source.text, numbered([source, target]))
    assert source.match("layers.final.w") is None
    assert source.match("layers.02.w") is None
    assert source.match("layers.1.w") is None  # h.-1
    assert source.match("layers.2.w") == {"i": "2"}


def test_values_that_are_missing_stay_as_they_are_written():
    assert Template("a.{i}.{2*j+1}.{k-3}.{r...}").render({"i": "3"}) == "a.3.{2*j+1}.{k-3}.{r...}"


def test_natural_order():
    texts = ["10", "2", "02", "a", "", "x10", "x9", "0", "00", "1" * 6000, "9" * 5999]
    random.Random(0).shuffle(texts)
    assert sorted(texts, key=natural) == ["", "0", "00", "02", "2", "10", "9" * 5999, "1" * 6000, "a", "x9", "x10"]


SEGMENT = st.sampled_from(["", "a", "w", "0", "7", "12", "a.b", "{x}", "(.*)", "\n"])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "w", "{x}", "{y}", "{r...}", "{2*i+1}", "l{x}", "(.*)"]), min_size=1, max_size=5),
    st.lists(SEGMENT, min_size=1, max_size=6),
)
def test_what_matches_renders_as_it_was_spelled(parts, segments):
    try:
        template = Template(".".join(parts), {"i": 0})
        template.check_source()
    except MappingError:
        return
    name = ".".join(segments)
    try:
        values = template.match(name)
    except MappingError:  # it fits in more than one way
        return
    if values is not None:
        assert template.render(values) == name
