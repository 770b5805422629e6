"""Checkpoints as their authors published them, key by key, through the callback into today's classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import equal, weights
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from warmstart import MappingError
from warmstart_transformers import WarmStartCallback, conversion_rules

pytest.importorskip("transformers.conversion_mapping", reason="releases before 5 keep no conversions")

Shapes = Iterator[tuple[str, tuple[int, ...]]]
D, FF, EXPERTS, VOCABULARY, LAYERS = 16, 24, 3, 40, 2
LANGUAGE = {"hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "num_attention_heads": 2}
IMAGES = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def norm(name: str) -> Shapes:
    yield f"{name}.weight", (D,)
    yield f"{name}.bias", (D,)


def decoder(experts: str, names: tuple[str, str, str], bias: bool) -> Shapes:
    gate, up, down = names
    yield "model.embed_tokens.weight", (VOCABULARY, D)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part in "qkvo":
            yield f"{layer}.self_attn.{part}_proj.weight", (D, D)
            if bias and part != "o":
                yield f"{layer}.self_attn.{part}_proj.bias", (D,)
        yield f"{layer}.{experts}.gate.weight", (EXPERTS, D)
        for expert in range(EXPERTS):
            for name, shape in ((gate, (FF, D)), (up, (FF, D)), (down, (D, FF))):
                yield f"{layer}.{experts}.experts.{expert}.{name}.weight", shape
        yield f"{layer}.input_layernorm.weight", (D,)
        yield f"{layer}.post_attention_layernorm.weight", (D,)
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (VOCABULARY, D)


def mixtral() -> Shapes:
    yield from decoder("block_sparse_moe", ("w1", "w3", "w2"), bias=False)


def qwen_moe() -> Shapes:
    yield from decoder("mlp", ("gate_proj", "up_proj", "down_proj"), bias=True)
    for i in range(LAYERS):
        shared = f"model.layers.{i}.mlp.shared_expert"
        for name, shape in (("gate_proj", (FF, D)), ("up_proj", (FF, D)), ("down_proj", (D, FF))):
            yield f"{shared}.{name}.weight", shape
        yield f"{shared}_gate.weight", (1, D)


def attention(layer: str) -> Shapes:
    for part in ("query", "key", "value"):
        yield from linear(f"{layer}.attention.attention.{part}", D, D)
    yield from linear(f"{layer}.attention.output.dense", D, D)


def embeddings(base: str) -> Shapes:
    yield f"{base}embeddings.cls_token", (1, 1, D)
    yield f"{base}embeddings.position_embeddings", (1, 5, D)
    yield f"{base}embeddings.patch_embeddings.projection.weight", (D, 3, 4, 4)
    yield f"{base}embeddings.patch_embeddings.projection.bias", (D,)


def vit() -> Shapes:
    yield from embeddings("vit.")
    for i in range(LAYERS):
        layer = f"vit.encoder.layer.{i}"
        yield from attention(layer)
        yield from linear(f"{layer}.intermediate.dense", FF, D)
        yield from linear(f"{layer}.output.dense", D, FF)
        yield from norm(f"{layer}.layernorm_before")
        yield from norm(f"{layer}.layernorm_after")
    yield from norm("vit.layernorm")
    yield from linear("classifier", 2, D)


def dinov2() -> Shapes:
    """The base alone, as it is published; the head stays the model's own."""
    yield from embeddings("")
    yield "embeddings.mask_token", (1, D)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        yield from norm(f"{layer}.norm1")
        yield from attention(layer)
        yield f"{layer}.layer_scale1.lambda1", (D,)
        yield from norm(f"{layer}.norm2")
        yield from linear(f"{layer}.mlp.fc1", 2 * D, D)
        yield from linear(f"{layer}.mlp.fc2", D, 2 * D)
        yield f"{layer}.layer_scale2.lambda1", (D,)
    yield from norm("layernorm")


def mixtral_model() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(**LANGUAGE, intermediate_size=FF, num_local_experts=EXPERTS, num_key_value_heads=2)
    )


def qwen_moe_model() -> PreTrainedModel:
    sizes = {"moe_intermediate_size": FF, "shared_expert_intermediate_size": FF, "intermediate_size": FF}
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**LANGUAGE, **sizes, num_experts=EXPERTS, num_experts_per_tok=2, num_key_value_heads=2)
    )


def vit_model() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**IMAGES, intermediate_size=FF))


def dinov2_model() -> PreTrainedModel:
    return Dinov2ForImageClassification(Dinov2Config(**IMAGES, mlp_ratio=2))


def data(model: PreTrainedModel) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    if "vocab_size" in model.config.to_dict():
        rows = torch.randint(0, VOCABULARY, (8, 6), generator=generator)
        return [{"input_ids": row, "labels": row.clone()} for row in rows]
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": number % 2} for number, image in enumerate(images)]


class Start(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.values = weights(model)


ORIGINALS = {
    "mixtral": (mixtral, mixtral_model),
    "qwen_moe": (qwen_moe, qwen_moe_model),
    "vit": (vit, vit_model),
    "dinov2": (dinov2, dinov2_model),
}


def published(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], PreTrainedModel]:
    """The file in its folder, and a model of today's class with weights of its own."""
    shapes, make = ORIGINALS[name]
    torch.manual_seed(3)
    tree = {key: torch.randn(shape) * 0.1 for key, shape in shapes()}
    model = make()
    folder.mkdir()
    save_file(tree, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    return tree, model


@pytest.mark.parametrize("name", ORIGINALS)
def test_all_of_it_arrives_as_transformers_itself_would_have_it_and_trains(make_trainer, tmp_path, name):
    tree, model = published(name, tmp_path / "original")
    own = weights(model)
    start = Start()
    callback = WarmStartCallback(tmp_path / "original", **conversion_rules(model), allow_missing="?classifier")
    trainer = make_trainer(model, callback, start, data=data(model))
    theirs = weights(type(model).from_pretrained(tmp_path / "original"))
    if name == "dinov2":  # what the file does not have is random in theirs
        theirs |= {key: value for key, value in own.items() if key.startswith("classifier")}

    assert equal(weights(model), theirs)
    assert not any(torch.equal(own[key], theirs[key]) for key in own if not key.startswith("classifier"))
    used = {key for keys in callback.report.mapping.values() for key in keys}
    assert used == tree.keys()
    assert callback.report.unexpected == callback.report.ignored == ()
    assert callback.report.mismatched == {}
    assert {key for key in tree if key in own} != tree.keys()  # today's class has other names

    trainer.train()
    assert callback.report.status == "applied"
    assert equal(start.values, theirs)
    moved = weights(model)
    assert any(not torch.equal(moved[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["mixtral", "vit"])
def test_without_the_rules_it_is_an_error_and_nothing_is_written(make_trainer, tmp_path, name, fingerprint):
    _, model = published(name, tmp_path / "original")
    before = fingerprint(model)
    with pytest.raises(MappingError, match="fit nothing in the model"):
        make_trainer(model, WarmStartCallback(tmp_path / "original"), data=data(model))
    assert fingerprint(model) == before


def test_an_expert_that_is_not_there_is_named(make_trainer, tmp_path, fingerprint):
    tree, model = published("mixtral", tmp_path / "original")
    del tree["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tree, tmp_path / "original" / "model.safetensors", {"format": "pt"})
    before = fingerprint(model)
    with pytest.raises(MappingError, match=r"layers\.1\."):
        make_trainer(model, WarmStartCallback(tmp_path / "original", **conversion_rules(model)), data=data(model))
    assert fingerprint(model) == before
