"""Quantised models are refused with the reason, whoever quantised them, and stay as they are."""

from __future__ import annotations

import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import bert, bert_config
from transformers import BertForSequenceClassification, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from warmstart import MappingError
from warmstart_transformers import WarmStartCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT asks transformers by an old name
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
)
REASON = r"BertForSequenceClassification is quantised \(%s\): its weights are packed integers with scales"


def configuration(kind: str):
    match kind:
        case "quanto":
            importlib.import_module("optimum.quanto")
            return QuantoConfig(weights="int8")
        case "torchao":
            quantization = importlib.import_module("torchao.quantization")
            return TorchAoConfig(quantization.Int8WeightOnlyConfig())
        case "bitsandbytes 8":
            importlib.import_module("bitsandbytes")
            return BitsAndBytesConfig(load_in_8bit=True)
        case _:
            importlib.import_module("bitsandbytes")
            return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quantiser"),
    [
        ("quanto", "QuantoHfQuantizer"),
        ("torchao", "TorchAoHfQuantizer"),
        ("bitsandbytes 8", "Bnb8BitHfQuantizer"),
        ("bitsandbytes 4", "Bnb4BitHfQuantizer"),
    ],
)
def test_what_transformers_quantised(make_trainer, bert_source, tmp_path, kind, quantiser):
    """The Trainer itself refuses those without an adapter on top; with one, they come to us."""
    try:
        quantization = configuration(kind)
    except ImportError as error:
        pytest.skip(str(error))
    config = bert_config()
    config.hidden_size = config.intermediate_size = 64  # a multiple of 32, as bitsandbytes has it of all that it takes
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "model", quantization_config=quantization)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"])).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with pytest.raises(MappingError, match=REASON % quantiser):
            make_trainer(model, WarmStartCallback(bert_source))
        assert torch.equal(model(tokens).logits, before)


def test_what_torch_quantised(make_trainer, bert_source):
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization is deprecated"):
        model = torch.ao.quantization.quantize_dynamic(bert(), {torch.nn.Linear}, torch.qint8)
    tokens = torch.arange(6)[None]
    before = model(tokens).logits
    with pytest.raises(MappingError, match=REASON % "Linear"):
        make_trainer(model, WarmStartCallback(bert_source))
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["quanto", "torchao"])
def test_what_is_quantised_by_its_tensors_alone(make_trainer, bert_source, kind):
    """By hand, not through transformers, which would have marked it."""
    model = bert()
    if kind == "quanto":
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    else:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(MappingError, match=REASON % r"\w+Tensor"):
        make_trainer(model, WarmStartCallback(bert_source))
