"""Names as templates: what is a list, and what is a row of different layers."""

from __future__ import annotations

from warmstart.mapping.suggesting.templates import numbered, templates
from warmstart.mapping.suggesting.words import INDEX, Lexicon


def spelled(path):
    return ".".join(path).replace(INDEX, "#")


def paths(shapes):
    return {spelled(t.path): (t.shape, sorted(t.names)) for t in templates(shapes, lexicon=Lexicon())[0]}


def test_layers_of_one_kind_are_one_template():
    shapes = {f"layers.{i}.fc.weight": (4, 2) for i in range(3)}
    assert paths(shapes) == {"layers.#.fc.weight": ((4, 2), [(0,), (1,), (2,)])}


def test_a_row_of_different_layers_keeps_its_numbers():
    shapes = {"mlp.0.weight": (8, 4), "mlp.0.bias": (8,), "mlp.2.weight": (4, 8), "mlp.2.bias": (4,)}
    assert set(paths(shapes)) == set(shapes)


def test_numbered_names_are_a_list():
    shapes = {f"block{i}.conv.weight": (4, 4) for i in range(1, 5)}
    assert paths(shapes) == {"block#.conv.weight": ((4, 4), [(1,), (2,), (3,), (4,)])}


def test_an_odd_first_layer_is_a_template_of_its_own_shape():
    shapes = {f"layers.{i}.{leaf}": (4, 4) for i in range(4) for leaf in ("a", "b", "c")} | {"layers.0.a": (4, 2)}
    found = [
        (spelled(t.path), t.shape, len(t.names)) for t in templates(shapes, lexicon=Lexicon())[0] if t.path[-1] == "a"
    ]
    assert sorted(found) == [("layers.#.a", (4, 2), 1), ("layers.#.a", (4, 4), 3)]


def test_lists_in_lists():
    shapes = {f"layers.{i}.experts.{e}.w.weight": (2, 2) for i in range(2) for e in range(4)}
    ((path, (_, indices)),) = paths(shapes).items()
    assert path == "layers.#.experts.#.w.weight"
    assert indices == [(i, e) for i in range(2) for e in range(4)]


def test_only_plain_numbers_are_indices():
    assert numbered("12") == ("", 12)
    assert numbered("norm2") == ("norm", 2)
    assert numbered("01") == ("01", None)
    assert numbered("norm") == ("norm", None)
    assert numbered("9" * 30) == ("9" * 30, None)


def test_a_list_of_one_side_is_a_list_of_the_other():
    keys = {f"layers.{i}.fc.weight": (4, 2) for i in range(3)} | {f"block{i}.a.weight": (2,) for i in range(4)}
    entries = {"layers.1.fc.weight": (4, 2), "block2.a.weight": (2,)}
    assert [[spelled(t.path) for t in side] for side in templates(keys, entries, lexicon=Lexicon())] == [
        ["layers.#.fc.weight", "block#.a.weight"]
    ] * 2


def test_a_row_of_different_layers_on_one_side_is_one_on_the_other():
    keys = {"f.0.conv.weight": (4, 2), "f.1.conv.weight": (8, 4), "f.2.conv.weight": (16, 8)}
    entries = {"f.0.conv.weight": (4, 2)}
    assert [[spelled(t.path) for t in side] for side in templates(keys, entries, lexicon=Lexicon())] == [
        list(keys),
        list(entries),
    ]
