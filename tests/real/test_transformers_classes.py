"""Classes that people fine-tune, with tiny configs: what is planned for their state dicts is what torch then does."""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import warmstart
from warmstart.mapping.model.names import WRAPPER_SEGMENTS
from warmstart.tensors import same_bits

pytestmark = pytest.mark.slow

VOCAB, LENGTH = 24, 6
IDS = torch.arange(2 * LENGTH).reshape(2, LENGTH) % (VOCAB - 4) + 3
IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
WAVE = torch.sin(torch.linspace(0, 99, 2 * 800)).reshape(2, 800)
MEL = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32)
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
PIXELS = {"pixel_values": IMAGE}

BASE = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**LAYERS, "intermediate_size": 24}
TEXT_MODEL = {**BASE, **WIDE, "max_position_embeddings": 16}
GROUPED = {**TEXT_MODEL, "num_key_value_heads": 1, "head_dim": 8}
TWO_STACKS = {
    **BASE,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 1,
}
VISION = {**WIDE, "image_size": 32, "patch_size": 16}
STAGES = {"depths": [1, 1], "num_labels": 3}
SPEECH = {
    **WIDE,
    "vocab_size": VOCAB,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
ROUTED = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}

# Class of the model: the fields of its config, and what it is called with.
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "BertForMaskedLM": (TEXT_MODEL, TEXT),
    "RobertaForSequenceClassification": ({**TEXT_MODEL, "num_labels": 3}, TEXT),
    "DistilBertForQuestionAnswering": (
        {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16},
        TEXT,
    ),
    "ElectraForPreTraining": ({**TEXT_MODEL, "embedding_size": 8}, TEXT),
    "AlbertForMaskedLM": ({**TEXT_MODEL, "embedding_size": 8}, TEXT),
    "DebertaV2ForTokenClassification": (
        {**TEXT_MODEL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        TEXT,
    ),
    "ModernBertForMaskedLM": ({**TEXT_MODEL, "cls_token_id": 1, "sep_token_id": 2}, TEXT),
    "GPT2LMHeadModel": ({**BASE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}, TEXT),
    "GPTNeoXForCausalLM": (TEXT_MODEL, TEXT),
    "OPTForCausalLM": (
        {**BASE, **LAYERS, "ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 16},
        TEXT,
    ),
    "BloomForCausalLM": ({**BASE, "hidden_size": 16, "n_layer": 2, "n_head": 2}, TEXT),
    "FalconForCausalLM": ({**TEXT_MODEL, "new_decoder_architecture": True, "num_kv_heads": 1}, TEXT),
    "LlamaForCausalLM": (GROUPED, TEXT),
    "MistralForSequenceClassification": (GROUPED, TEXT),
    "Qwen2ForCausalLM": ({**GROUPED, "tie_word_embeddings": True}, TEXT),
    "Qwen3ForCausalLM": (GROUPED, TEXT),
    "Gemma2ForCausalLM": ({**GROUPED, "query_pre_attn_scalar": 8}, TEXT),
    "PhiForCausalLM": (TEXT_MODEL, TEXT),
    "MixtralForCausalLM": (ROUTED, TEXT),
    "MambaForCausalLM": ({**BASE, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, TEXT),
    "T5ForConditionalGeneration": (
        {**BASE, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        PAIR,
    ),
    "BartForConditionalGeneration": (TWO_STACKS, PAIR),
    "MarianMTModel": (TWO_STACKS, PAIR),
    "WhisperForConditionalGeneration": (
        {**TWO_STACKS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        {"input_features": MEL, "decoder_input_ids": IDS[:, :4]},
    ),
    "Wav2Vec2ForCTC": (SPEECH, {"input_values": WAVE}),
    "HubertModel": (SPEECH, {"input_values": WAVE}),
    "ViTForImageClassification": (VISION, PIXELS),
    "DeiTForImageClassificationWithTeacher": (VISION, PIXELS),
    "Dinov2Model": (VISION, PIXELS),
    "SwinForImageClassification": (
        {**STAGES, "image_size": 32, "patch_size": 4, "embed_dim": 8, "num_heads": [1, 2], "window_size": 4},
        PIXELS,
    ),
    "ConvNextForImageClassification": ({**STAGES, "hidden_sizes": [8, 16], "num_stages": 2}, PIXELS),
    "ResNetForImageClassification": (
        {**STAGES, "embedding_size": 8, "hidden_sizes": [16, 16], "layer_type": "basic"},
        PIXELS,
    ),
    "CLIPModel": (
        {"text_config": TEXT_MODEL, "vision_config": VISION, "projection_dim": 8},
        {**TEXT, **PIXELS},
    ),
}


every_class = pytest.mark.parametrize("name", CASES)


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**CASES[name][0])).eval()


@functools.cache
def trained(name: str) -> nn.Module:
    """The model that a file was saved from: no entry has the value that a fresh model starts with."""
    model = build(name, seed=1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) / 8 + 1 / 64)
        elif tensor.ndim == 0:
            tensor.add_(7)  # BatchNorm's counter
    return model


def outputs(name: str, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        out = model(**CASES[name][1]).to_tuple()
    tensors = [value for value in out if isinstance(value, Tensor)]
    assert tensors
    return tensors


def twins(model: nn.Module) -> list[list[str]]:
    """The names of each tensor of the state dict that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@dataclass(frozen=True)
class Disguised:
    """A state dict under other names, and the rules that give its own back."""

    state: dict[str, Tensor]
    key_of: dict[str, str]  # entry to key, of those that are in the file
    prefix: str
    renames: dict[str, str]


def disguised(model: nn.Module, rng: random.Random, *, rename: bool) -> Disguised:
    """Segments renamed (some to new names, some among each other), one prefix, wrappers anywhere, some twins left out."""
    left_out: set[str] = set()
    for group in twins(model):
        left_out.update(rng.sample(group, k=rng.randrange(len(group))))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    segments = sorted({segment for name in state for segment in name.split(".")})
    chosen = rng.sample(segments, k=min(len(segments), rng.randint(4, 8))) if rename else []
    new, turned = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    spelled = {segment: f"new{i}" for i, segment in enumerate(new)}
    spelled |= dict(zip(turned, turned[1:] + turned[:1], strict=True))
    prefix = ".".join(rng.sample(["ema", "net", "student", "p0"], k=rng.randint(1, 2)))
    wrapped: dict[str, list[str]] = {}

    def key(name: str) -> str:
        out: list[str] = []
        clean = ""
        for segment in [*prefix.split("."), *(spelled.get(part, part) for part in name.split("."))]:
            if clean not in wrapped:
                count = rng.choice([0, 0, 0, 1, 2])
                wrapped[clean] = [rng.choice(sorted(WRAPPER_SEGMENTS)) for _ in range(count)]
            out += [*wrapped[clean], segment]
            clean += f".{segment}"
        return ".".join(out)

    key_of = {name: key(name) for name in state}
    items = [(key_of[name], tensor) for name, tensor in state.items()]
    rng.shuffle(items)
    back = {re.escape(new_name): segment for segment, new_name in spelled.items()}
    return Disguised(dict(items), key_of, prefix, back)


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert [name for name in state if not same_bits(state[name], expected[name])] == []


def assert_accounted_for(report: warmstart.Report, model: nn.Module, file: Disguised) -> None:
    """Every entry got its value from its own key, or from a twin's; every key was used."""
    twin = {name: group for group in twins(model) for name in group}
    assert list(report.mapping) == [name for name, _ in entries(model)]
    for name, keys in report.mapping.items():
        if name in file.key_of:
            assert keys == (file.key_of[name],)
        else:
            assert keys[0] in {file.key_of.get(other) for other in twin[name]}
    aliases = {a.target: a.alias_of for a in report.assignments if a.alias_of is not None}
    assert aliases.keys() == report.mapping.keys() - file.key_of.keys()
    assert all(other in twin[name] for name, other in aliases.items())
    assert sorted(key for a in report.assignments for key in a.sources) == sorted(file.state)
    assert report.missing == report.unexpected == report.excluded == report.ignored == ()
    assert report.mismatched == {}
    assert report.coverage == 1


def entries(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()]


@every_class
def test_under_other_names_every_class_comes_back_bit_for_bit(name):
    source, model, by_torch = trained(name), build(name, seed=2), build(name, seed=3)
    before = [(entry, id(tensor), tensor.requires_grad) for entry, tensor in entries(model)]
    file = disguised(source, random.Random(name), rename=True)
    report = warmstart.load(model, file.state, strip_prefix=file.prefix, rename=file.renames)
    assert_accounted_for(report, model, file)
    by_torch.load_state_dict(source.state_dict(), strict=False)
    assert_same_state(model, source)
    assert_same_state(model, by_torch)
    assert [(entry, id(tensor), tensor.requires_grad) for entry, tensor in entries(model)] == before
    assert twins(model) == twins(source)
    back = report.plan.reverse()
    assert set(back.keys()) == set(file.state)
    assert all(same_bits(back.read(key), tensor) for key, tensor in file.state.items())
    for ours, theirs in zip(outputs(name, model), outputs(name, source), strict=True):
        assert same_bits(ours, theirs)


@every_class
def test_one_prefix_and_any_wrappers_need_no_rules(name):
    source, model = trained(name), build(name, seed=2)
    file = disguised(source, random.Random(name), rename=False)
    report = warmstart.load(model, file.state)
    assert report.prefix == (file.prefix, "")
    assert_accounted_for(report, model, file)
    assert_same_state(model, source)


@every_class
def test_one_rename_left_out_is_an_error_and_nothing_is_written(name, fingerprint):
    model, rng = build(name, seed=2), random.Random(name)
    file = disguised(trained(name), rng, rename=True)
    left_out = rng.choice(sorted(file.renames))
    rules = {rule: text for rule, text in file.renames.items() if rule != left_out}
    before = fingerprint(model)
    with pytest.raises(warmstart.MappingError) as caught:
        warmstart.load(model, file.state, strip_prefix=file.prefix, rename=rules)
    kinds = {problem.kind for problem in caught.value.plan.errors}
    assert kinds <= {"missing", "unexpected", "mismatched", "collision", "nothing matched"}
    assert fingerprint(model) == before


@every_class
def test_what_is_missing_and_unexpected_is_what_torch_says(name):
    source, model, by_torch = trained(name), build(name, seed=2), build(name, seed=2)
    rng, state = random.Random(name), trained(name).state_dict()
    for entry in rng.sample(sorted(state), k=3):
        del state[entry]
    extra = rng.choice(sorted(state))
    state[f"{extra}2"] = state[extra]
    report = warmstart.load(model, state, strip_prefix="", allow_missing="*", allow_unexpected=f"{extra}2")
    said = by_torch.load_state_dict(state, strict=False)
    given = {entry for group in twins(source) if state.keys() & group for entry in group}
    assert set(report.missing) == set(said.missing_keys) - given
    assert list(report.unexpected) == said.unexpected_keys == [f"{extra}2"]
    assert_same_state(model, by_torch)
