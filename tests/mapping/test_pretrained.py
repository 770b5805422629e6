from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import nn

import warmstart
from warmstart import MappingError, Pretrained
from warmstart.mapping.pretrained import PretrainedFields, as_parts

PATTERN_FIELDS = ["select", "include", "exclude", "allow_missing", "allow_unexpected", "allow_mismatched", "freeze"]


class ListConfig(Sequence):
    """As OmegaConf's: a Sequence that is no list."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


class DictConfig(Mapping):
    """As OmegaConf's: a Mapping that is no dict."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def test_the_typed_fields_are_the_dataclass_s_but_the_source():
    assert set(PretrainedFields.__annotations__) == {f.name for f in fields(Pretrained)} - {"source"}


def test_the_typed_fields_have_the_dataclass_s_types_and_are_all_optional():
    hints = get_type_hints(Pretrained)
    del hints["source"]
    assert get_type_hints(PretrainedFields) == hints
    assert PretrainedFields.__required_keys__ == frozenset()
    assert all((f.default, f.default_factory) != (MISSING, MISSING) for f in fields(Pretrained) if f.name != "source")


@pytest.mark.parametrize("name", PATTERN_FIELDS)
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("encoder", "encoder"),
        (["a", "?b"], ["a", "?b"]),
        (("a",), ["a"]),
        (ListConfig("a", "b.*"), ["a", "b.*"]),
        ([], []),
        ("", []),
    ],
)
def test_patterns_become_plain_strings_and_lists(name, given, kept):
    value = getattr(Pretrained("x", **{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


def test_a_set_of_patterns_is_taken():
    assert sorted(Pretrained("x", select={"a", "b"}).select) == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "kept", "stages"),
    [
        ((), [], ()),
        ({"a": "b"}, {"a": "b"}, ({"a": "b"},)),
        (DictConfig(a="b"), {"a": "b"}, ({"a": "b"},)),
        ([{"a": "b"}, {"b": "c"}], [{"a": "b"}, {"b": "c"}], ({"a": "b"}, {"b": "c"})),
        (ListConfig(DictConfig(a="b"), {"b": "c"}), [{"a": "b"}, {"b": "c"}], ({"a": "b"}, {"b": "c"})),
    ],
)
def test_renames_become_plain_dicts_and_stages(given, kept, stages):
    pretrained = Pretrained("x", rename=given)
    assert pretrained.rename == kept
    assert type(pretrained.rename) is type(kept)
    assert all(type(stage) is dict for stage in pretrained.stages)
    assert pretrained.stages == stages


def test_rules_are_what_differs_from_the_defaults_and_plain():
    assert Pretrained("x").rules() == {}
    pretrained = Pretrained("x", into="encoder", rename=DictConfig(a="b"), allow_missing=ListConfig("head"), freeze=True,
                            strip_prefix="")  # fmt: skip
    assert pretrained.rules() == {
        "into": "encoder", "rename": {"a": "b"}, "allow_missing": ["head"], "freeze": True, "strip_prefix": ""}  # fmt: skip
    assert repr(Pretrained("x.pt", into="encoder")) == "Pretrained('x.pt', into='encoder')"


def test_a_pretrained_survives_copies_and_pickles():
    pretrained = Pretrained("x.pt", rename=[{"a": "b"}], freeze=["a"])
    for twin in (copy.deepcopy(pretrained), pickle.loads(pickle.dumps(pretrained))):
        assert (twin.source, twin.rules()) == ("x.pt", {"rename": [{"a": "b"}], "freeze": ["a"]})


def test_the_caller_s_containers_are_copied():
    patterns, rules = ["a"], {"a": "b"}
    pretrained = Pretrained("x", select=patterns, rename=rules)
    patterns.append("b")
    rules["c"] = "d"
    assert (pretrained.select, pretrained.rename) == (["a"], {"a": "b"})


def test_it_is_frozen_and_compares_by_identity():
    pretrained = Pretrained({"a": torch.zeros(1)})
    assert pretrained != Pretrained(pretrained.source)
    assert hash(pretrained) == hash(pretrained)
    with pytest.raises(FrozenInstanceError):
        pretrained.into = "x"


@pytest.mark.parametrize(
    ("given", "kept"), [("encoder.", "encoder"), (".encoder", "encoder"), ("", ""), ("a.b", "a.b")]
)
def test_into_may_end_in_a_dot(given, kept):
    assert Pretrained("x", into=given).into == kept


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("dir/bert.pt", "dir/bert.pt"),
        (Path("dir/bert.pt"), "dir/bert.pt"),
        ({}, "a state dict in memory"),
        (nn.Linear(1, 1), "a Linear in memory"),
    ],
)
def test_a_source_is_named_in_a_few_words(source, label):
    assert Pretrained(source).label == label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, r'dtype=\'float16\': write dtype="model" or dtype="checkpoint"'),
        ({"min_coverage": 90}, r"min_coverage=90: a share between 0 and 1, such as min_coverage=0.9"),
        ({"min_coverage": -0.1}, r"min_coverage=-0.1: a share"),
        ({"min_coverage": float("nan")}, r"min_coverage=nan: a share"),
        ({"sha256": "abc"}, r"sha256='abc': 64 hexadecimal digits, as `sha256sum FILE` prints them"),
        (
            {"include": ["a", ""]},
            r"include: an empty pattern matches nothing; leave it out, or write '\*' for everything",
        ),
        ({"freeze": ["?"]}, r"freeze: an empty pattern"),
    ],
)
def test_values_that_cannot_be_meant_are_mapping_errors(options, message):
    with pytest.raises(MappingError, match=message):
        Pretrained("x", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": 3}, r"include=3: a pattern is a string, several are a list of strings"),
        ({"include": {"a": "b"}}, r"include=\{'a': 'b'\}: a pattern is a string"),
        ({"select": ["a", 3]}, r"select: a pattern is a string such as 'encoder\.\*', not 3"),
        ({"freeze": None}, r"freeze=None: a pattern is a string"),
        ({"rename": "a"}, r"rename='a': a mapping of regex to replacement, or a list of such mappings"),
        ({"rename": ["a"]}, r"rename: a stage is a mapping of regex to replacement, not 'a'"),
        ({"rename": [("a", "b")]}, r"rename: a stage is a mapping of regex to replacement, not \('a', 'b'\)"),
        ({"rename": {"a": None}}, r"rename: 'a': None must be two strings"),
        ({"into": None}, r'into=None: the path of a submodule, such as into="encoder"; "" is the whole model'),
        ({"strip_prefix": 3}, r"strip_prefix=3: a leading path; None infers one"),
    ],
)
def test_values_of_another_type_are_type_errors(options, message):
    with pytest.raises(TypeError, match=message):
        Pretrained("x", **options)


@pytest.mark.parametrize("source", [3, None, ["a"], torch.zeros(1)])
def test_a_source_is_one_of_five_things(source):
    with pytest.raises(TypeError, match=r"source must be a path, a state dict, a module or a Checkpoint, not"):
        Pretrained(source)
    with pytest.raises(TypeError, match=r"source is a Pretrained already; pass it as it is"):
        Pretrained(Pretrained("x"))


def test_the_verbs_take_a_source_a_pretrained_or_a_list_of_both():
    one = Pretrained("a.pt")
    assert [p.source for p in as_parts("a.pt", {})] == ["a.pt"]
    assert as_parts("a.pt", {"into": "x"})[0].into == "x"
    assert as_parts(one, {}) == [one]
    mixed = as_parts([one, Path("b.pt"), {"w": torch.zeros(1)}], {})
    assert mixed[0] is one
    assert [type(p) for p in mixed] == [Pretrained] * 3
    assert as_parts((one,), {}) == as_parts(ListConfig(one), {}) == [one]


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        (Pretrained("x"), r"into=\.\.\. cannot be given beside a Pretrained; write Pretrained\(\.\.\., into=\.\.\.\)"),
        (
            [Pretrained("x")],
            r"into=\.\.\. cannot be given beside a list; give each Pretrained\(\.\.\.\) its own fields",
        ),
        (["x"], r"cannot be given beside a list"),
    ],
)
def test_fields_beside_anything_but_a_bare_source_are_a_type_error(pretrained, message):
    with pytest.raises(TypeError, match=message):
        warmstart.load(nn.Linear(1, 1), pretrained, into="x")


def test_an_unknown_field_is_a_type_error_that_lists_the_known():
    with pytest.raises(TypeError, match=r"unknown field strict; the fields are .*allow_missing.*trust_pickle"):
        warmstart.load(nn.Linear(1, 1), {"weight": torch.zeros(1, 1)}, strict=False)


def test_an_7_a_pattern_that_is_a_string_is_one_pattern_not_its_letters():
    model = nn.ModuleDict({"ab": nn.Linear(2, 2), "a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    plan = warmstart.plan(model, {k: v for k, v in model.state_dict().items() if k[:2] == "ab"}, include="ab")
    assert plan.errors == ()
    assert sorted(plan.mapping) == ["ab.bias", "ab.weight"]


def test_an_empty_list_of_sources_is_an_error():
    with pytest.raises(MappingError, match="an empty list of sources: pass at least one"):
        warmstart.plan(nn.Linear(1, 1), [])
