from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from warmstart.mapping.model.names import (
    WRAPPER_SEGMENTS,
    Prefix,
    fits,
    infer_prefix,
    join,
    matches,
    strip,
    suffixes,
    without_wrappers,
    wrapped_child,
)


@pytest.mark.parametrize(
    ("name", "prefix", "rest"),
    [
        ("encoder.weight", "encoder", "weight"),
        ("encoder.weight", "", "encoder.weight"),
        ("encoder2.weight", "encoder", None),
        ("encoder", "encoder", None),  # nothing would be left
        ("a.encoder.weight", "encoder", None),
        ("a.b.c", "a.b", "c"),
    ],
)
def test_strip_takes_a_leading_path(name, prefix, rest):
    assert strip(name, prefix) == rest


def test_join_leaves_out_what_is_empty():
    assert join("", "a", "", "b") == "a.b"
    assert join("", "") == ""


@pytest.mark.parametrize("order", list(itertools.permutations(sorted(WRAPPER_SEGMENTS))))
def test_field_note_2_all_wrapper_orders_nested_and_mid_key_are_stripped(order):
    assert set(order) == {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
    a, b, c, d, e = order
    assert without_wrappers(f"{a}.{b}.{c}.{d}.{e}.encoder.weight", WRAPPER_SEGMENTS) == "encoder.weight"
    assert without_wrappers(f"{a}.encoder.{b}.{c}.layer.{d}.weight", WRAPPER_SEGMENTS) == "encoder.layer.weight"


@pytest.mark.parametrize(
    "key", ["submodule.weight", "base_module.x", "encoder.submodule.weight", "modules.w", "_orig_mod2.w"]
)
def test_field_note_2_only_whole_segments_are_wrappers(key):
    assert without_wrappers(key, WRAPPER_SEGMENTS) == key


def test_a_key_of_nothing_but_wrappers_is_left_alone():
    assert without_wrappers("module", WRAPPER_SEGMENTS) == "module"
    assert without_wrappers("module._orig_mod", WRAPPER_SEGMENTS) == "module._orig_mod"


def test_wrappers_are_told_by_type():
    linear = nn.Linear(2, 2)

    class Subclassed(nn.DataParallel):
        pass

    class DataParallel(nn.Module):  # another's, with a real child of that name
        def __init__(self):
            super().__init__()
            self.module = linear

    assert wrapped_child(nn.DataParallel(linear)) == "module"
    assert wrapped_child(Subclassed(linear)) == "module"
    assert wrapped_child(AveragedModel(linear)) == "module"
    assert wrapped_child(torch.compile(linear, backend="eager")) == "_orig_mod"
    assert wrapped_child(checkpoint_wrapper(linear)) == "_checkpoint_wrapped_module"
    assert wrapped_child(DataParallel()) is None
    assert wrapped_child(linear) is None


def shaped(*names: str, shape: tuple[int, ...] = (2,)) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, shape)


@pytest.mark.parametrize(
    ("keys", "entries", "pairs"),
    [
        (shaped("foo.a.w", "foo.b.w"), shaped("a.w", "b.w"), [("foo", "", 2)]),
        (shaped("a.w", "b.w"), shaped("bar.a.w", "bar.b.w"), [("", "bar", 2)]),
        (shaped("foo.a.w", "foo.b.w"), shaped("bar.a.w", "bar.b.w"), [("foo", "bar", 2)]),
        (shaped("a.w", "b.w"), shaped("a.w", "b.w"), []),  # right as they are
        (shaped("foo.a", "b"), shaped("a", "b"), []),  # the identity matches as much
        (shaped("foo.a", "foo.b", "c"), shaped("a", "b", "c"), [("foo", "", 2)]),
        (shaped("w.a", "w.b", shape=(3,)), shaped("a", "b"), []),  # names alone are not enough
        (shaped("x.a", "x.b"), shaped("s.a", "s.b", "t.a", "t.b"), [("x", "s", 2), ("x", "t", 2)]),
        (shaped("x.a", "y.a"), shaped("a"), [("x", "", 1), ("y", "", 1)]),
        (shaped("x.a", "y.a", "y.b"), shaped("a", "b"), [("y", "", 2)]),
        (shaped("x.a", "y.b", "y.c") | shaped("x.b", "x.c", shape=(9,)), shaped("a", "b", "c"), [("y", "", 2)]),
        (shaped("q.r"), shaped("a"), []),
        ({"foo.a": None, "foo.b": (2,)}, {"a": (7, 7), "b": (2,)}, [("foo", "", 2)]),  # None has its entry's shape
        ({"a": None}, {"a": (7,), "m.a": (2,)}, []),
        ({"a": None}, {"m.a": (7,), "n.a": (2,)}, [("", "m", 1), ("", "n", 1)]),
        (shaped("a"), {}, []),
        ({}, shaped("a"), []),
    ],
)
def test_the_best_pair_by_names_and_shapes(keys, entries, pairs):
    assert [(p.strip, p.add, p.score) for p in infer_prefix(keys, entries)] == pairs


def test_shapes_decide_between_two_towers_of_the_same_names():
    keys = {"net.0.w": (4, 2), "net.1.w": (2, 4)}
    entries = {"a.0.w": (5, 2), "a.1.w": (2, 5), "b.0.w": (4, 2), "b.1.w": (2, 4)}
    assert infer_prefix(keys, entries) == [Prefix("net", "b", 2)]


def test_fv_6_a_prefix_is_stripped_from_all_keys_or_from_none():
    assert infer_prefix(shaped("foo.a", "b"), shaped("a", "b")) == []
    assert infer_prefix(shaped("foo.a", "foo.b"), shaped("a", "b")) == [Prefix("foo", "", 2)]


def test_many_equal_layers_do_not_hide_the_prefix():
    layers = [f"layers.{i}.{name}" for i in range(100) for name in ("attn.w", "mlp.w")]
    found = infer_prefix(shaped(*(f"model.{n}" for n in layers)), shaped(*(f"encoder.{n}" for n in layers)))
    assert found == [Prefix("model", "encoder", 200)]


@pytest.mark.parametrize(
    ("prefix", "name", "expected"),
    [
        (Prefix("a", "b", 1), "a.w", "b.w"),
        (Prefix("a", "b", 1), "ab.w", None),
        (Prefix("", "b", 1), "w", "b.w"),
        (Prefix("a", "", 1), "a.w", "w"),
        (Prefix("a", "", 1), "a", None),
    ],
)
def test_a_prefix_rewrites_leading_paths(prefix, name, expected):
    assert prefix.rewrite(name) == expected


def test_a_prefix_says_what_it_does():
    assert [str(Prefix(*p, 1)) for p in [("a", "b"), ("a", ""), ("", "b")]] == [
        "strip 'a' and add 'b'",
        "strip 'a'",
        "add 'b'",
    ]


def test_matches_counts_names_with_their_shapes():
    assert matches({"a": (1,), "b": (2,), "c": (3,)}, {"a": (1,), "b": (9,)}) == 1
    assert (
        matches({"a": None, "b": None, "c": (3,)}, {"a": (1,), "c": (9,)}) == 1
    )  # where there is no entry, None fits none


@pytest.mark.parametrize(
    ("key", "entry", "expected"),
    [
        ((2,), (2,), True),
        ((2,), (3,), False),
        (None, (2,), True),
        (None, (), True),
        (None, None, False),
        ((), None, False),
    ],
)
def test_a_shape_that_is_not_known_yet_fits_any_entry_but_none(key, entry, expected):
    assert fits(key, entry) is expected


@pytest.mark.parametrize(
    ("name", "depth", "expected"),
    [
        ("a.b.c", 9, ["a.b.c", "b.c", "c"]),
        ("a.b.c", 3, ["a.b.c", "b.c", "c"]),
        ("a.b.c", 2, ["b.c", "c"]),
        ("a.b.c", 1, ["c"]),
        ("a", 1, ["a"]),
        ("a..b", 9, ["a..b", ".b", "b"]),
        ("", 1, [""]),
    ],
)
def test_suffixes_are_whole_segments_the_longest_first(name, depth, expected):
    assert list(suffixes(name, depth)) == expected


def test_a_key_of_very_many_segments_costs_no_more_than_the_model_s_names():
    huge = ".".join(["s"] * 300_000)  # its own suffixes would be 90 GB of text
    assert infer_prefix(shaped(f"{huge}.a", f"{huge}.b"), shaped("x.a", "x.b")) == [Prefix(huge, "x", 2)]
