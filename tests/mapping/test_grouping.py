from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart.mapping.grouping import covering, grouped, listed, pasteable, printable
from warmstart.patterns import Pattern


def templates(*names: str) -> list[str]:
    return [group.template for group in grouped((name, 0) for name in names)]


def test_fv_7_names_that_differ_in_one_segment_are_one_line():
    assert templates("a.weight", "a.bias", "b.c.weight", "d") == ["a.{bias,weight}", "b.c.weight", "d"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"layer.{i}.w" for i in range(12)], ["layer.{0-11}.w"]),
        ([f"layer.{i}.w" for i in (0, 1, 2, 4, 6, 7)], ["layer.{0-2,4,6,7}.w"]),  # a gap is shown as a gap
        ([f"h.{i}.{m}.w" for i in range(3) for m in ("q", "k")], ["h.{0-2}.{k,q}.w"]),
        (["h.0.q.w", "h.0.k.w", "h.1.q.w"], ["h.0.{k,q}.w", "h.1.q.w"]),  # h.1.k is not there
        (["a.01.w", "a.1.w", "a.2.w"], ["a.01.w", "a.{1,2}.w"]),  # 01 is no number
        (["a.0", "a.b"], ["a.0", "a.b"]),  # numbers and words stay apart
        (["w"], ["w"]),
        ([], []),
    ],
)
def test_templates_show_what_is_there(names, expected):
    assert templates(*names) == expected


def test_other_tags_are_other_groups():
    groups = grouped([("a.0.w", (2, 2)), ("a.1.w", (2, 2)), ("a.2.w", (3, 2))])
    assert [(g.template, g.tag, g.names) for g in groups] == [
        ("a.{0,1}.w", (2, 2), ("a.0.w", "a.1.w")), ("a.2.w", (3, 2), ("a.2.w",))]  # fmt: skip


def test_long_alternatives_are_cut_and_say_so():
    assert templates(*(f"m.w{i:02}" for i in range(15)))[0].endswith("w11,... 3 more}")
    assert templates(*(f"m.{i}" for i in range(0, 60, 2)))[0].endswith("22,... 18 more}")


SEGMENT = st.sampled_from(["0", "1", "2", "3", "01", "10", "a", "b", "q", "weight"])
NAMES = st.lists(st.lists(SEGMENT, min_size=1, max_size=4).map(".".join), unique=True, max_size=25)


def expanded(template: str) -> list[str]:
    choices = []
    for segment in template.split("."):
        values = []
        for part in segment.strip("{}").split(","):
            run = re.fullmatch(r"(\d+)-(\d+)", part)
            values += [str(i) for i in range(int(run[1]), int(run[2]) + 1)] if run else [part]
        choices.append(values)
    return [".".join(parts) for parts in itertools.product(*choices)]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(NAMES)
def test_a_template_stands_for_exactly_its_names_and_every_name_is_in_one(names):
    groups = grouped((name, len(name) % 2) for name in names)
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    for group in groups:
        assert sorted(expanded(group.template)) == sorted(group.names)
        assert {len(name) % 2 for name in group.names} == {group.tag}


@settings(max_examples=300, derandomize=True, deadline=None)
@given(NAMES, NAMES)
def test_covering_patterns_match_all_the_names_and_no_other(names, others):
    others = [other for other in others if other not in names]
    # A name that is itself the path of another (a parameter `a` beside `a.b`) cannot be told apart by any pattern.
    names = [name for name in names if not any(other.startswith(name + ".") for other in others)]
    patterns = [Pattern(text) for text in covering(names, others)]
    assert [name for name in names if not any(p.matches(name) for p in patterns)] == []
    assert [other for other in others if any(p.matches(other) for p in patterns)] == []


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (["head.weight", "head.bias"], ["body.weight"], ["head"]),
        (["head.weight"], ["head.bias"], ["head.weight"]),
        ([f"l.{i}.lora.{x}" for i in range(9) for x in "ab"], [f"l.{i}.w" for i in range(9)], ["l.*.lora"]),
        (["l.0.x", "l.1.x"], ["l.0.w", "l.1.w", "l.2.x"], ["l.0.x", "l.1.x"]),  # l.*.x would take l.2.x
        (["a.w", "b.w"], [], ["a", "b"]),  # never a bare *
    ],
)
def test_covering_finds_the_highest_paths(names, others, expected):
    assert covering(names, others) == expected


@pytest.mark.parametrize("name", ["x[0].w", "?x.w", "a*b", 'say"so".w', "back\\slash", "new\nline", "\x1b[31m", "é.ü"])
def test_a_pasted_pattern_means_the_name_whatever_its_characters(name):
    line = pasteable("allow_unexpected", [name], ["x0.w", "xx.w", "ab"])
    assert "\n" not in line
    assert "\x1b" not in line
    (pattern,) = eval(line.removeprefix("allow_unexpected="))
    assert Pattern(pattern).matches(name)
    assert not Pattern(pattern).optional
    assert not any(Pattern(pattern).matches(other) for other in ["x0.w", "xx.w", "ab", "yx.w"])


def test_a_line_holds_eight_patterns_and_says_how_many_are_left():
    names = [f"{c}{c}.w" for c in "abcdefghij"]
    line = pasteable("allow_missing", names, ["zz.w", *(f"{c}{c}.v" for c in "abcdefghij")])
    assert line == 'allow_missing=["aa.w", "bb.w", "cc.w", "dd.w", "ee.w", "ff.w", "gg.w", "hh.w"] and 2 more patterns'


def test_lists_are_indented_counted_and_cut():
    text = listed([(f"a{i}.w", f"({i}, 2)") for i in range(20)] + [("b.0.w", "(1,)"), ("b.1.w", "(1,)")], limit=3)
    assert text.splitlines() == [
        "    a0.w  (0, 2)", "    a1.w  (1, 2)", "    a2.w  (2, 2)", "    ... and 19 more in 18 groups"]  # fmt: skip
    assert listed([("b.0.w", "(1,)"), ("b.1.w", "(1,)")]) == "    b.{0,1}.w  (1,)  x2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain.name", "plain.name"),
        ("new\nline", "new\\nline"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("right\u202eleft", "right\\u202eleft"),
        ("x" * 400, "x" * 300 + "... (400 characters)"),
    ],
)
def test_hostile_names_are_harmless_on_a_terminal(text, shown):
    assert printable(text) == shown
