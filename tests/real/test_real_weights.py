"""Weights that others trained, each value-equal tensor by tensor to what torch, numpy and safetensors read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mobilenetv2
import real_weights
import warmstart
from warmstart.tensors import same_bits

pytestmark = pytest.mark.slow


def assert_value_equal(model: nn.Module, report: warmstart.Report, source: dict[str, torch.Tensor]) -> None:
    entries = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    assert len(report.mapping) > 0
    for name, (key,) in report.mapping.items():
        assert same_bits(entries[name].detach(), source[key]), name


def test_mobilenetv2_with_every_name_different():
    path = real_weights.MOBILENETV2.fetch()
    source = torch.load(path, weights_only=True)
    model = mobilenetv2.MobileNetV2()
    report = warmstart.load(model, path, rename=mobilenetv2.RENAMES)
    assert len(report.assignments) == len(source) == 312
    assert report.coverage == 1
    assert report.missing == report.unexpected == report.ignored == ()
    assert_value_equal(model, report, source)


def test_minilm_into_bert_model_and_under_a_classifier():
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    path = real_weights.MINILM.fetch()
    source = load_file(path)
    config = BertConfig(**json.loads(real_weights.MINILM.fetch("config.json").read_text()))

    model = BertModel(config)
    report = warmstart.load(model, path)
    assert report.coverage == 1
    assert report.ignored == ("embeddings.position_ids",)
    assert any("non-persistent" in note and "embeddings.position_ids" in note for note in report.notes)
    assert_value_equal(model, report, source)

    classifier = BertForSequenceClassification(config)
    fresh = classifier.classifier.weight.detach().clone()
    report = warmstart.load(classifier, path, into="bert")
    assert report.coverage == 1
    assert report.excluded == ("classifier.bias", "classifier.weight")
    assert_value_equal(classifier, report, source)
    assert torch.equal(classifier.classifier.weight, fresh)
    # and the report is short enough to read
    assert len(str(report).splitlines()) < 30


def test_minilm_the_errors_of_a_first_try(fingerprint):
    from transformers import BertConfig, BertForSequenceClassification

    path = real_weights.MINILM.fetch()
    config = BertConfig(**json.loads(real_weights.MINILM.fetch("config.json").read_text()))
    model = BertForSequenceClassification(config)
    before = fingerprint(model)
    with pytest.raises(warmstart.MappingError, match=r'allow_missing=\["classifier"\]'):
        warmstart.load(model, path)
    with pytest.raises(warmstart.MappingError, match="did you mean 'bert'"):
        warmstart.load(model, path, into="brt")
    with pytest.raises(
        warmstart.MappingError, match=r"leave strip_prefix= out: add 'bert' is inferred then, and 103 of 104"
    ):
        warmstart.load(model, path, strip_prefix="encoder.layer")
    assert fingerprint(model) == before


def test_albert_with_a_tied_decoder_saved_on_cuda():
    from transformers import AlbertConfig, AlbertForMaskedLM

    path = real_weights.ALBERT.fetch()
    source = torch.load(path, weights_only=True, map_location="cpu")
    raw = json.loads(real_weights.ALBERT.fetch("config.json").read_text())
    model = AlbertForMaskedLM(AlbertConfig(**raw))
    embedding = model.albert.embeddings.word_embeddings.weight
    assert model.predictions.decoder.weight is embedding
    report = warmstart.load(model, path, allow_unexpected=["albert.pooler"])
    assert model.predictions.decoder.weight is embedding
    assert model.albert.embeddings.word_embeddings.weight is embedding
    assert report.coverage == 1
    assert report.missing == ()
    assert_value_equal(model, report, source)


def test_g2p_npz_into_torch_layers():
    class Seq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc_emb, self.dec_emb = nn.Embedding(29, 256), nn.Embedding(74, 256)
            self.enc, self.dec = nn.GRU(256, 256), nn.GRU(256, 256)
            self.fc = nn.Linear(256, 74)

    path = real_weights.G2P.fetch()
    with np.load(path) as arrays:
        source = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    model = Seq2Seq()
    rules = {
        r"(enc|dec)_w_ih": r"\1.weight_ih_l0",
        r"(enc|dec)_w_hh": r"\1.weight_hh_l0",
        r"(enc|dec)_b_ih": r"\1.bias_ih_l0",
        r"(enc|dec)_b_hh": r"\1.bias_hh_l0",
        r"(enc|dec)_emb": r"\1_emb.weight",
        r"fc_w": "fc.weight",
        r"fc_b": "fc.bias",
    }
    report = warmstart.load(model, path, rename=rules)
    assert len(report.assignments) == 12
    assert_value_equal(model, report, source)


def test_resemblyzer_takes_the_weights_and_leaves_the_optimizer():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    path = real_weights.RESEMBLYZER.fetch()
    source = torch.load(path, weights_only=True, map_location="cpu")["model_state"]
    model = Encoder()
    unused = [key for key in source if not key.startswith(("lstm", "linear"))]
    report = warmstart.load(model, path, allow_unexpected=unused)
    assert report.plan.parts[0].checkpoint.checkpoint_key == "model_state"
    assert report.coverage == 1
    assert_value_equal(model, report, source)


@pytest.mark.parametrize("weights", [real_weights.EFFICIENTNET_LITE0, real_weights.PESTO], ids=["lite0", "pesto"])
def test_the_other_files_read_as_torch_reads_them(weights):
    path = weights.fetch()
    checkpoint = warmstart.open_checkpoint(path)
    raw = torch.load(path, weights_only=True, map_location="cpu")
    source = raw.get("state_dict", raw)
    assert set(checkpoint.keys()) == set(source)
    assert all(same_bits(checkpoint.read(key), value) for key, value in source.items())
