"""Rename rules: few, readable, and right for every name."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart.mapping.planning.renames import Renamer
from warmstart.mapping.suggesting.rules import renames
from warmstart.mapping.suggesting.words import INDEX


def _path(text: str) -> tuple[str, ...]:
    return tuple(text.replace("#", INDEX).split("."))


def ruled(pairs: dict[str, str]) -> dict[str, str]:
    found = renames({_path(key): _path(entry) for key, entry in pairs.items()})
    renamer = Renamer([found])
    for key, entry in pairs.items():
        assert renamer(key.replace("#", "3")) == entry.replace("#", "3")
    return found


def test_equal_names_need_no_rule():
    assert ruled({"a.weight": "a.weight"}) == {}


def test_one_word_is_one_rule_everywhere():
    pairs = {
        f"{side}.layers.#.attn.{x}.weight": f"{side}.layers.#.self_attn.{x}.weight" for side in "ab" for x in "qkv"
    }
    assert ruled(pairs) == {"attn": "self_attn"}


def test_a_prefix_for_all_is_the_start():
    assert ruled({"a.weight": "model.a.weight", "b.#.c": "model.b.#.c"}) == {"^": "model."}


def test_a_prefix_for_some_names_them_in_one_rule():
    pairs = {
        "layers.#.a": "text.layers.#.a",
        "norm.weight": "text.norm.weight",
        "vision.layers.#.a": "vision.layers.#.a",
    }
    assert ruled(pairs) == {"^(layers|norm)": r"text.\1"}


def test_a_word_of_two_meanings_is_told_by_its_neighbour():
    pairs = {
        "layer.#.attention.output.dense.weight": "layer.#.attention.o_proj.weight",
        "layer.#.output.dense.weight": "layer.#.mlp.fc2.weight",
    }
    assert ruled(pairs) == {r"attention\.output\.dense": "attention.o_proj", r"(\d+)\.output\.dense": r"\1.mlp.fc2"}


def test_a_number_is_never_renamed_alone():
    pairs = {"seq.0.weight": "seq.fc1.weight", "seq.2.weight": "seq.fc2.weight", "layers.#.a": "layers.#.a"}
    assert ruled(pairs) == {r"seq\.0": "seq.fc1", r"seq\.2": "seq.fc2"}


def test_a_swap_is_a_swap():
    assert ruled({"a.weight": "b.weight", "b.weight": "a.weight"}) == {"a": "b", "b": "a"}


def test_characters_of_a_regex_mean_themselves():
    ruled({"a+b(c.weight": r"x\1.weight", "a*.weight": "a*.weight", "[a].{b}.w": "c.{b}.w"})


words = st.sampled_from(["a", "b", "c", "0", "1", "#", "x_y"])
paths = st.lists(words, min_size=1, max_size=4).map(tuple).filter(lambda p: p[0] != "#")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(paths, paths, min_size=1, max_size=8))
def test_every_name_becomes_its_image(pairs):
    pairs = {k: v for k, v in pairs.items() if k.count("#") == v.count("#")}
    images = [".".join(v) for v in pairs.values()]
    if len(set(images)) < len(images):
        return
    if any(p != q and len(p) == len(q) and all(map(_meet, p, q)) for p in pairs for q in pairs):
        return  # `a.#` and `a.0` are one name: real templates never meet
    renamer = Renamer([renames({_path(".".join(k)): _path(".".join(v)) for k, v in pairs.items()})])
    for key, entry in pairs.items():
        assert renamer(_filled(key, "34567")) == _filled(entry, "34567")


def _meet(a: str, b: str) -> bool:
    return a == b or ("#" in (a, b) and all(x == "#" or x.isdecimal() for x in (a, b)))


def _filled(path, numbers: str) -> str:
    turn = iter(numbers)
    return ".".join(next(turn) if segment == "#" else segment for segment in path)
