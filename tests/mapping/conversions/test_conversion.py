from __future__ import annotations

import pytest
import torch

from warmstart import MappingError
from warmstart.mapping.conversions.conversion import Conversion, conversion
from warmstart.mapping.conversions.ops.applying import Apply
from warmstart.mapping.conversions.ops.joining import Concat, Split
from warmstart.mapping.conversions.ops.layout import Permute, Reshape, RopePermute, Transpose
from warmstart.mapping.conversions.ops.stacking import Stack, Unstack
from warmstart.mapping.declared import plain

GATE_UP = Conversion(["l.{i}.experts.{e}.w1", "l.{i}.experts.{e}.w3"], "l.{i}.gate_up", [Stack("e", 0), Concat(1)])


def test_plain_data_and_objects_are_the_same_conversion():
    as_yaml = {
        "sources": ["l.{i}.experts.{e}.w1", "l.{i}.experts.{e}.w3"],
        "targets": "l.{i}.gate_up",
        "ops": [{"stack": {"over": "e", "dim": 0}}, {"concat": {"dim": 1}}],
    }
    assert conversion(as_yaml, "convert[0]") == GATE_UP
    assert conversion(GATE_UP, "convert[0]") is GATE_UP
    assert hash(conversion(as_yaml, "convert[0]")) == hash(GATE_UP)
    assert conversion(plain(GATE_UP)["conversion"], "convert[0]") == GATE_UP


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ({"split": {"dim": 0, "sizes": [4, 2, 2]}}, Split(0, (4, 2, 2))),
        ({"unstack": {"over": "e", "dim": 1}}, Unstack("e", 1)),
        ({"transpose": {"a": 0, "b": 1}}, Transpose(0, 1)),
        ({"permute": {"dims": [3, 2, 0, 1]}}, Permute((3, 2, 0, 1))),
        ({"reshape": {"shape": [-1, 64]}}, Reshape((-1, 64))),
        ({"rope_permute": {"heads": 8}}, RopePermute(8)),
        ({"rope_permute": {"heads": 8, "to": "interleaved"}}, RopePermute(8, to="interleaved")),
        ({"apply": {"fn": "torch:atleast_1d"}}, Apply("torch:atleast_1d")),
    ],
)
def test_every_op_can_be_written_in_yaml(op, expected):
    made = Conversion("a", ["b", "c", "d.{e}"] if "unstack" in op else "b", [op])
    assert made.ops == (expected,)
    assert Conversion(made.sources, made.targets, plain(made.ops)) == made


@pytest.mark.parametrize(
    ("value", "kind", "why"),
    [
        ("a -> b", TypeError, "a Conversion or a mapping with sources, targets, ops"),
        ({"sources": "a"}, MappingError, "sources and targets are both needed"),
        ({"sources": "a", "targets": "b", "op": []}, MappingError, "op is no field"),
        ({"sources": [], "targets": "b"}, MappingError, "names nothing"),
        ({"sources": 3, "targets": "b"}, TypeError, "a name template is a string"),
        ({"sources": ["a", 3], "targets": "b"}, TypeError, "a name template is a string"),
        ({"sources": "a", "targets": "b", "ops": "concat"}, TypeError, "a list of ops"),
        ({"sources": "a", "targets": "b", "ops": {"concat": {"dim": 0}}}, TypeError, "a list of ops"),
        ({"sources": "a", "targets": "b", "ops": [{"join": {}}]}, MappingError, r"ops\[0\]: 'join' is none of split"),
        ({"sources": "a", "targets": "b", "ops": ["concat"]}, MappingError, r"ops\[0\].*'dim'"),
        ({"sources": "a.{", "targets": "b"}, MappingError, "without its partner"),
        ({"sources": "?", "targets": "b"}, MappingError, "it is empty"),
        ({"sources": ["a", "a"], "targets": "b"}, MappingError, "the same template twice in sources="),
        ({"sources": "a", "targets": ["b", "b"]}, MappingError, "the same template twice in targets="),
        ({"sources": "a.{r}", "targets": "b.{r...}"}, MappingError, r"both \{r\} and \{r...\}"),
        ({"sources": ["a.{i}", "b.{j}"], "targets": "c.{i}.{j}"}, MappingError, r"must have all of \{i\}, \{j\}"),
        ({"sources": "a.{e}", "targets": "b"}, MappingError, r"add Stack\(over='e', dim=0\)"),
        ({"sources": "a", "targets": "b.{e}"}, MappingError, r"Unstack\(over='e', dim=0\)"),
        (
            {"sources": "a.{e}", "targets": "b", "ops": [{"stack": {"over": "f", "dim": 0}}]},
            MappingError,
            r"a placeholder \{f\} that only the sources have; those are e",
        ),
        (
            {"sources": "a.{e}", "targets": "b.{e}", "ops": [{"unstack": {"over": "e", "dim": 0}}]},
            MappingError,
            "which the sources have already",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_was_written(value, kind, why):
    with pytest.raises(kind, match=why) as error:
        conversion(value, "convert[2]")
    assert str(error.value).startswith("convert[2]: ")


def test_a_question_mark_on_any_source_makes_it_optional():
    assert Conversion(["a", "?b"], "c", [Concat(0)]).optional
    assert not Conversion(["a", "b"], "c", [Concat(0)]).optional


def test_the_declared_inverse_brings_everything_back(run):
    tensors = {f"l.{i}.experts.{e}.w{n}": torch.randn(3, 2) for i in range(2) for e in range(12) for n in (1, 3)}
    fused = run(tensors, GATE_UP).made
    assert GATE_UP.inverse().ops == (Split(1), Unstack("e", 0))
    assert GATE_UP.inverse().inverse() == GATE_UP
    back = run(fused, GATE_UP.inverse(), entries=dict.fromkeys(tensors, (3, 2))).made
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_the_declared_inverse_of_arithmetic_and_of_a_function():
    every_second = Conversion("?t.{2*i}.{r...}", "s.{i}.{r...}")
    assert every_second.inverse() == Conversion("?s.{i}.{r...}", "t.{2*i}.{r...}")
    there = Conversion("a", "b", [Apply("torch:atleast_1d", "torch:atleast_2d"), RopePermute(2), Permute([1, 2, 0])])
    assert there.inverse().ops == (
        Permute((2, 0, 1)),
        RopePermute(2, to="interleaved"),
        Apply("torch:atleast_2d", "torch:atleast_1d"),
    )


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (Conversion("a", "b", [Reshape([-1])]), r"Reshape\(shape=\(-1,\)\) has no declared inverse"),
        (Conversion("a", "b", [Apply("torch:atleast_1d")]), r"Apply\(torch:atleast_1d\) has no inverse="),
        (Conversion("a.{e}", "b", [Concat(0)]), r"the inverse of Concat\(dim=0\) needs to know the tensors"),
        (Conversion("a", "b", [Split(0, [1, 2]), Concat(0)]), r"the inverse of Concat\(dim=0\) needs to know the tensors"),
        (Conversion("a", ["b", "c"]), "a copy to several targets has no declared inverse"),
    ],
)  # fmt: skip
def test_what_has_no_declared_inverse_names_the_op(there, why):
    with pytest.raises(MappingError, match=why):
        there.inverse()


def test_a_conversion_prints_as_it_was_written_and_safely():
    assert str(GATE_UP) == (
        "l.{i}.experts.{e}.w1, l.{i}.experts.{e}.w3 -> l.{i}.gate_up by Stack(over='e', dim=0), Concat(dim=1)"
    )
    assert "\x1b" not in str(Conversion("\x1b[31m", "b"))
