"""Segments as words, with the declared vocabulary and without."""

from __future__ import annotations

import pytest

from warmstart.mapping.suggesting.vocabulary import FILLERS, PHRASES, SYNONYMS
from warmstart.mapping.suggesting.words import Lexicon


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("self_attn", "attention"),
        ("q_proj", "query"),
        ("LayerNorm", "layer_norm"),
        ("layernorm1", "norm_1"),
        ("layers", "block"),
        ("feed_forward", "mlp"),
        ("conv2d", "conv"),
        ("patchEmbedding", "patch_embed"),
    ],
)
def test_spellings_of_one_thing(one, other):
    assert Lexicon().content(one) == Lexicon().content(other)


@pytest.mark.parametrize(
    ("one", "other"), [("norm1", "norm2"), ("query", "key"), ("encoder", "decoder"), ("fc1", "fc2")]
)
def test_spellings_of_two_things(one, other):
    assert Lexicon().content(one) != Lexicon().content(other)


def test_without_the_vocabulary_only_letters_count():
    plain = Lexicon(vocabulary=False)
    assert plain.segment("q_proj") == ("q", "proj")
    assert plain.content("q_proj") == ("q", "proj")
    assert plain.segment("layers") == ("layer",)


def test_hostile_segments_are_words_too():
    assert Lexicon().segment("") == ("",)
    assert Lexicon().segment("x" * 5000) == ("x" * 5000,)
    assert Lexicon().segment("\x1b[31m") != ()


def test_every_spelling_means_one_thing_and_says_why():
    words = [word for synonym in SYNONYMS for word in synonym.words]
    assert len(words) == len(set(words))
    assert not set(words) & set(FILLERS)
    assert all(synonym.reason and synonym.source for synonym in SYNONYMS)
    assert all(phrase.reason and phrase.source and len({len(row) for row in phrase.rows}) == 1 for phrase in PHRASES)
    assert len(SYNONYMS) + len(PHRASES) < 40
