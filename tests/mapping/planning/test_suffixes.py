"""Matching by suffix: the longest whole-segment end first, shapes count, and a draw is never decided."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart.mapping.planning.suffixes import match_suffixes

SHAPE = (2,)


def match(keys, entries):
    """Pairs and ties; names alone all have one shape."""
    keys, entries = (names if isinstance(names, dict) else dict.fromkeys(names, SHAPE) for names in (keys, entries))
    found = match_suffixes(keys, entries)
    return found.pairs, found.ties


def test_d2_1_the_longest_suffix_wins_and_layer2_does_not_steal_res_layer2():
    entries = {
        "block1.layer1.weight": (3, 2), "block1.layer1.bias": (3,),
        "layer2.weight": (2, 3), "layer2.bias": (2,),
        "res.layer2.weight": (2, 3), "res.layer2.bias": (2,),
    }  # fmt: skip
    keys = {name.removeprefix("block1."): shape for name, shape in entries.items()}
    assert match(keys, entries) == ({name.removeprefix("block1."): name for name in entries}, [])


def test_d2_1_without_the_exact_key_layer2_goes_to_one_of_two_and_is_a_tie():
    keys = ["layer2.weight"]
    assert match(keys, ["net.layer2.weight", "net.res.layer2.weight"]) == (
        {}, [(("layer2.weight",), ("net.layer2.weight", "net.res.layer2.weight"))])  # fmt: skip
    # With the longer key there, the longer end is settled first and the rest is clear.
    assert match([*keys, "res.layer2.weight"], ["net.layer2.weight", "net.res.layer2.weight"]) == (
        {"layer2.weight": "net.layer2.weight", "res.layer2.weight": "net.res.layer2.weight"}, [])  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "entries", "pairs"),
    [
        (["conv.weight"], ["a.b.conv.weight"], {"conv.weight": "a.b.conv.weight"}),  # the model's name is longer
        (["a.b.conv.weight"], ["conv.weight"], {"a.b.conv.weight": "conv.weight"}),  # or the key
        (["a.w", "y.b.w"], ["x.a.w", "b.w"], {"a.w": "x.a.w", "y.b.w": "b.w"}),  # or both, in one model
        (["w"], ["a.b.w"], {"w": "a.b.w"}),  # one segment is enough where nothing else fits
        (["w"], ["a.sw", "a.b_w", "w2"], {}),  # whole segments
        (["conv.w"], ["a.preconv.w"], {}),
        (["a.conv.w"], ["b.conv.w"], {}),  # a shared end: strangers
        (["head.w"], ["fc.w"], {}),
        (["a"], ["a"], {"a": "a"}),
        ([], ["a"], {}),
        (["a"], [], {}),
    ],
)
def test_one_name_is_the_end_of_the_other_in_whole_segments(keys, entries, pairs):
    assert match(keys, entries) == (pairs, [])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("short", "longer"),
    [
        ("conv.weight", ("a.conv.weight", "b.conv.weight")),
        ("conv.weight", ("a.conv.weight", "b.c.conv.weight", "x.y.z.conv.weight")),  # how much longer is no reason
        ("w", tuple(f"layers.{i}.w" for i in range(9))),
    ],
)
def test_rivals_are_named_and_never_picked(short, longer, turned):
    if turned:
        assert match(longer, [short]) == ({}, [(longer, (short,))])
    else:
        assert match([short], longer) == ({}, [((short,), longer)])


def test_shapes_decide_before_a_tie_is_one():
    entries = {"a.conv.w": (2, 2), "b.conv.w": (3, 3)}
    assert match({"conv.w": (3, 3)}, entries) == ({"conv.w": "b.conv.w"}, [])
    assert match({"conv.w": (4, 4)}, entries) == ({}, [])


def test_a_longer_end_of_another_shape_does_not_block_a_shorter_one():
    keys = {"layer.w": (9,), "w": (2,)}
    assert match(keys, {"net.layer.w": (2,)}) == ({"w": "net.layer.w"}, [])


def test_equal_names_belong_together_whatever_their_shapes():
    # The head of another size must turn up as one of another shape: neither goes to something else that fits.
    keys = {"head.w": (1000, 4), "old.head.w": (10, 4)}
    entries = {"head.w": (10, 4), "aux.head.w": (1000, 4)}
    assert match(keys, entries) == ({"head.w": "head.w"}, [])


def test_greedy_by_length_is_repeated_until_nothing_is_left():
    keys = ["w", "b.w", "c.b.w"]
    entries = ["x.c.b.w", "y.b.w", "z.w"]
    assert match(keys, entries) == ({"w": "z.w", "b.w": "y.b.w", "c.b.w": "x.c.b.w"}, [])
    assert match(entries, keys) == ({"z.w": "w", "y.b.w": "b.w", "x.c.b.w": "c.b.w"}, [])
    # Both ways at once: `b.w` is the end of an entry while an entry is the end of another key.
    assert match(["b.w", "q.z.w"], ["y.b.w", "w", "z.w"]) == ({"b.w": "y.b.w", "q.z.w": "z.w"}, [])


def test_who_tied_at_a_longer_end_is_not_given_away_at_a_shorter_one():
    keys = ["conv.w", "w"]
    entries = ["a.conv.w", "b.conv.w"]
    assert match(keys, entries) == ({}, [(("conv.w",), ("a.conv.w", "b.conv.w"))])


@pytest.mark.parametrize("shape", [(2,), (3, 3), ()])
def test_a_shape_that_is_not_known_yet_fits_any(shape):
    assert match({"q.w": None}, {"attn.q.w": shape}) == ({"q.w": "attn.q.w"}, [])
    assert match({"attn.q.w": None}, {"q.w": shape}) == ({"attn.q.w": "q.w"}, [])


def test_a_shape_that_is_not_known_yet_is_a_rival_like_another():
    assert match({"q.w": None}, {"a.q.w": (1,), "b.q.w": (2,)}) == ({}, [(("q.w",), ("a.q.w", "b.q.w"))])
    assert match({"a.q.w": None, "b.q.w": (2,)}, {"q.w": (2,)}) == ({}, [(("a.q.w", "b.q.w"), ("q.w",))])


@pytest.mark.parametrize("name", ["", ".", "a..w", ".w", "w.", "\n.w", "\ud800.w", "*.w", "a" * 10_000 + ".w"])
def test_hostile_names_are_only_names(name):
    assert match([name], [name]) == ({name: name}, [])
    assert match([name], [f"net.{name}"]) == ({name: f"net.{name}"}, [])


def test_twenty_thousand_keys_and_a_name_of_many_segments_take_no_time():
    entries = {f"net.{i % 3}.layers.{i // 10}.{i % 10}.attention.weight": (i % 7,) for i in range(20_000)}
    keys = {name.split(".", 2)[2]: shape for name, shape in entries.items()}
    keys[".".join(["s"] * 100_000)] = SHAPE
    start = time.perf_counter()
    pairs, ties = match(keys, entries)
    assert time.perf_counter() - start < 5  # 0.2 s alone on one core
    assert pairs == {name.split(".", 2)[2]: name for name in entries}
    assert ties == []


# ---- whatever the names ----

MANY = settings(max_examples=150, derandomize=True, deadline=None)
NAME = st.lists(st.sampled_from(["a", "b", "0", "w"]), min_size=1, max_size=4).map(".".join)
ENTRIES = st.dictionaries(NAME, st.sampled_from([(), (2,), (3,)]), max_size=12)
KEYS = st.dictionaries(NAME, st.sampled_from([(), (2,), (3,), None]), max_size=12)


def is_end(short: str, name: str) -> bool:
    return name.endswith(f".{short}")


@MANY
@given(KEYS, ENTRIES)
def test_pairs_are_one_to_one_of_equal_shape_and_one_name_ends_the_other(keys, entries):
    pairs, ties = match(keys, entries)
    tied = [name for left, right in ties for name in (*left, *right)]
    assert len(set(pairs.values())) == len(pairs)
    assert len(set(tied)) == len(tied)
    assert not {*pairs, *pairs.values()} & set(tied)
    assert keys.keys() & entries.keys() == {key for key, entry in pairs.items() if key == entry}
    for key, entry in pairs.items():
        if key != entry:
            assert keys[key] in (None, entries[entry])
            assert is_end(key, entry) or is_end(entry, key)
    for left, right in ties:
        assert min(len(left), len(right)) == 1 < max(len(left), len(right))
        for key, entry in itertools.product(left, right):
            assert keys[key] in (None, entries[entry])
            assert is_end(key, entry) or is_end(entry, key)


@MANY
@given(KEYS, ENTRIES)
def test_nothing_that_fits_is_left_over(keys, entries):
    pairs, ties = match(keys, entries)
    settled = {*pairs, *pairs.values(), *(name for left, right in ties for name in (*left, *right))}
    for key, entry in itertools.product(keys.keys() - settled, entries.keys() - settled):
        assert keys[key] not in (None, entries[entry]) or not (is_end(key, entry) or is_end(entry, key))


@MANY
@given(KEYS, ENTRIES, st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter_and_the_sides_are_alike(keys, entries, random):
    pairs, ties = match(keys, entries)
    shuffled = [dict(random.sample(list(side.items()), len(side))) for side in (keys, entries)]
    assert match(*shuffled) == (pairs, ties)
    assert list(pairs) == sorted(pairs)
    if None not in keys.values():
        back, back_ties = match(entries, keys)
        assert back == {entry: key for key, entry in pairs.items()}
        assert back_ties == [(right, left) for left, right in ties]


@MANY
@given(ENTRIES, st.data())
def test_prefixed_copies_of_a_model_s_own_names_map_to_themselves(entries, data):
    prefixes = st.sampled_from(["", "net.", "bert.net.", "x."])  # each name has its own; none of them is in a name
    keys = {data.draw(prefixes) + name: name for name in entries}
    shapes = {key: entries[name] for key, name in keys.items()}
    assert match(shapes, entries) == (keys, [])
    assert match(entries, shapes) == ({name: key for key, name in keys.items()}, [])
