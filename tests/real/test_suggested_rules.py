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


def test_mobilenetv2_by_numbers_into_names_is_what_was_written_by_hand():
    """All 312 names differ, numbered on one side and named on the other: every tensor is sure and value-equal."""
    path = real_weights.MOBILENETV2.fetch()
    model, other = mobilenetv2.MobileNetV2(), mobilenetv2.MobileNetV2()
    suggestion = warmstart.suggest(model, path)
    assert suggestion.proposed == suggestion.unexplained.keys == suggestion.unexplained.entries == ()
    assert suggestion.coverage == (1, 1)
    assert len(suggestion.pretrained.rename) == len(mobilenetv2.RENAMES)
    report = warmstart.load(model, suggestion.pretrained)
    written = warmstart.load(other, path, rename=mobilenetv2.RENAMES)
    assert report.mapping == written.mapping == suggestion.mapping
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


class Filter(nn.Module):
    """A block of an EfficientNet-Lite in the words of nobody's library."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        if expansion > 1:
            self.widen = mobilenetv2.ConvNorm(inputs, hidden)
        self.each = mobilenetv2.ConvNorm(hidden, hidden, kernel=kernel, groups=hidden)
        self.narrow = mobilenetv2.ConvNorm(hidden, outputs)


class Lite(nn.Module):
    """EfficientNet-Lite0 with a head of its own."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = mobilenetv2.ConvNorm(3, 32, kernel=3)
        self.filters = nn.ModuleList()
        width = 32
        for expansion, outputs, count, kernel in LITE0:
            for _ in range(count):
                self.filters.append(Filter(width, outputs, kernel=kernel, expansion=expansion))
                width = outputs
        self.last = mobilenetv2.ConvNorm(width, 1280)
        self.classes = nn.Linear(1280, classes)


# expansion, output channels, blocks, kernel
LITE0 = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5), (6, 192, 4, 5), (6, 320, 1, 3)]
LITE0_WORDS = {"expand": "widen", "depthwise": "each", "project": "narrow"}


def lite0_entry(key: str) -> str:
    """The entry of `Lite` that a key of the file goes to, as its code says: its norms are numbered from the expansion's 0."""
    *_, module, tensor = key.split(".")
    if not key.startswith("_blocks."):
        word = {"_conv_stem": "first.conv", "_bn0": "first.norm", "_conv_head": "last.conv", "_bn1": "last.norm"}[
            module
        ]
        return f"{word}.{tensor}"
    part = list(LITE0_WORDS)[int(module[-1])] if module.startswith("_bn") else module.split("_")[1]
    return f"filters.{key.split('.')[1]}.{LITE0_WORDS[part]}.{'norm' if module.startswith('_bn') else 'conv'}.{tensor}"


def test_efficientnet_lite0_into_a_network_of_ones_own():
    """Norms that are numbered beside maps that are named: all blocks are sure and value-equal, whatever the head."""
    path = real_weights.EFFICIENTNET_LITE0.fetch()
    source = torch.load(path, weights_only=True)
    model = Lite(classes=10)
    suggestion = warmstart.suggest(model, path)
    truth = {lite0_entry(key): (key,) for key in source if not key.startswith("_fc.")}
    assert suggestion.mapping == {entry: truth[entry] for entry in suggestion.mapping}
    assert set(suggestion.mapping) >= {entry for entry in truth if entry.startswith("filters.")}
    rules = dataclasses.replace(
        suggestion.pretrained, allow_missing=["classes", "first", "last"], allow_unexpected=["_fc", "_conv_*", "_bn*"]
    )
    warmstart.load(model, rules)
    state = model.state_dict()
    assert all(same_bits(state[entry], source[key]) for entry, (key,) in suggestion.mapping.items())


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
