"""Rules that are suggested for weights that others trained: value-equal, or said not to be known."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import mobilenetv2
import real_weights
import warmstart
from warmstart.tensors import same_bits

pytestmark = pytest.mark.slow


class G2p(nn.Module):
    """Letters to phonemes: two embeddings, two GRUs, one linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_embedding = nn.Embedding(29, 256)
        self.encoder = nn.GRU(256, 256)
        self.decoder_embedding = nn.Embedding(74, 256)
        self.decoder = nn.GRU(256, 256)
        self.output = nn.Linear(256, 74)


KEYS = {"encoder_embedding.weight": "enc_emb", "decoder_embedding.weight": "dec_emb"} | {
    f"{name}.{tensor}_{part}_l0": f"{name[:3]}_{tensor[0]}_{part}"
    for name in ("encoder", "decoder")
    for tensor in ("weight", "bias")
    for part in ("ih", "hh")
}


def test_g2p_into_torch_layers_is_right_where_it_is_sure_and_where_it_is_asked():
    path = real_weights.G2P.fetch()
    with np.load(path) as arrays:
        source = {key: torch.from_numpy(arrays[key].astype(np.float32)) for key in arrays.files}
    sure = warmstart.suggest(G2p(), path)
    assert sure.mapping == {entry: (KEYS[entry],) for entry in sure.mapping}
    asked = warmstart.suggest(G2p(), path, accept=["encoder", "decoder"])
    assert asked.mapping == {entry: (key,) for entry, key in KEYS.items()}
    assert asked.unexplained == (("fc_b", "fc_w"), ("output.weight", "output.bias"))
    model = G2p()
    rules = dataclasses.replace(asked.pretrained, allow_missing="output", allow_unexpected="fc_*")
    warmstart.load(model, rules)
    state = model.state_dict()
    assert all(same_bits(state[entry], source[key]) for entry, key in KEYS.items())


def test_mobilenetv2_by_numbers_into_names_is_said_not_to_be_known():
    """Numbered layers and named ones share no word: it refuses, with what it could pair, rather than guess."""
    with pytest.raises(warmstart.MappingError, match=r"too little in common to suggest rules: \d+ of 312 keys"):
        warmstart.suggest(mobilenetv2.MobileNetV2(), real_weights.MOBILENETV2.fetch())


def test_albert_under_a_wrapper_and_older_words():
    """A tied decoder, one layer that is shared, an own spelling of the attention: every tensor is sure and value-equal."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    path = real_weights.ALBERT.fetch()
    source = torch.load(path, weights_only=True, map_location="cpu")
    words = {
        "albert.": "net.encoder_.",
        "attention.query": "attn.q",
        "attention.key": "attn.k",
        "attention.value": "attn.v",
    }
    foreign = {}
    for name, tensor in source.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        foreign[name] = tensor
    model = AlbertForMaskedLM(AlbertConfig(**json.loads(real_weights.ALBERT.fetch("config.json").read_text())))
    suggestion = warmstart.suggest(model, foreign)
    assert suggestion.proposed == ()
    assert suggestion.unexplained.entries == ()
    assert all("pooler" in key for key in suggestion.unexplained.keys)  # the class has none
    report = warmstart.load(model, dataclasses.replace(suggestion.pretrained, allow_unexpected="net.encoder_.pooler"))
    assert report.coverage == 1
    state = model.state_dict()
    assert all(same_bits(state[name], tensor) for name, tensor in source.items() if name in state)
    assert len(suggestion.mapping) >= 24
