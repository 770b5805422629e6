from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("transformers.conversion_mapping", reason="releases before 5 keep no conversions")

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.auto import modeling_auto

import warmstart
from warmstart import MappingError
from warmstart.mapping.planning.renames import Renamer
from warmstart_transformers import conversion_rules

TABLE = sorted(conversion_mapping._build_checkpoint_conversion_mapping())

# What no rule says: an index that is computed, a permutation of two of three outputs, an op that asks for the file's shape,
# the first half of what is gathered, and many keys that become one.
REFUSED = {
    "dory": "LayerPairCollapse",
    "ernie4_5_vl_moe": "ErnieFuseAndSplitTextVisionExperts",
    "esm": "several keys one name",
    "gradium_phonon_tts": "PermuteForRope",
    "inkling2": "Inkling2IndexOffsetWeightRename",
    "inkling2_loop": "Inkling2IndexOffsetWeightRename",
    "inkling2_loop_text": "Inkling2IndexOffsetWeightRename",
    "inkling2_text": "Inkling2IndexOffsetWeightRename",
    "inkling_mm_model": "Interleave",
    "kimi_k25": "PermuteForRope",
    "qwen3_vl_moe": "Transpose",
    "step3p7": "PermuteForRope",
}
# Models inside another one, which the library builds by no name of their own; and one that needs timm.
INSIDE = {
    "MtpModel",
    "MaskFormerDetrDecoder",
    "PPChart2TableModel",
    "UnlimitedOcrSamVisionEncoder",
    "UnlimitedOcrVisionEncoder",
    "dots3_note_audio_encoder",
    "dots3_note_vision_encoder",
    "legacy",
    "mlcd_vision",
    "qwen3_omni_moe_text",
    "step3p5_vision",
    "xCLIPTextModel",
    "xCLIPVisionModel",
}
# Models that need timm, or sizes that their configuration has no defaults for.
UNBUILT = {
    *("AyaVisionModel", "BeitForSemanticSegmentation", "ConditionalDetrForSegmentation", "ConditionalDetrModel"),
    *("DetrForSegmentation", "DetrModel", "Emu3Model", "Sapiens2ForImageMatting", "Sapiens2ForNormalEstimation"),
    *("Sapiens2ForPointmapEstimation", "Sapiens2ForPoseEstimation", "Sapiens2ForSemanticSegmentation", "aya_vision"),
    *("deepseek_ocr2", "deformable_detr", "dots1", "hunyuan_v1_moe", "hunyuan_vl", "lfm2_moe", "qwen3_omni_moe"),
    *("t5gemma2_encoder", "timm_wrapper"),
}
NEEDED = {"esm": {"vocab_size": 33, "pad_token_id": 1}}
# The library takes the one layer norm of this model for the other.
MISPLACED = {"pixio"}
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "projection_dim"), 16),
    **dict.fromkeys(("encoder_embed_dim", "decoder_embed_dim", "image_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "head_dim", "patch_size", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_local_experts", "moe_num_experts", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 3),
    **dict.fromkeys(("num_key_value_heads", "num_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 3)
EXPERTS = dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4)


def classes_of(key: str) -> list[type[PreTrainedModel]]:
    """The classes that a key of the library's table names: by its own name, or by its model type."""
    own = getattr(transformers, key, None)
    if isinstance(own, type):
        return [own]
    config = CONFIG_MAPPING[key] if key in CONFIG_MAPPING else None  # noqa: SIM401 (it is no dict)
    found: dict[type[PreTrainedModel], None] = {}
    for mapping in vars(modeling_auto).values():
        if type(mapping).__name__ == "_LazyAutoMapping" and config in mapping:
            classes = mapping[config]
            found |= dict.fromkeys(classes if isinstance(classes, tuple | list) else [classes])
    return list(found)


def small_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A configuration of small sizes, its parts too."""
    default = config_class()
    given: dict[str, Any] = {
        name: size
        for name, size in SMALL.items()
        if type(old := getattr(default, name, None)) is int and (old > size or name.endswith("_id"))
    }
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            given[name] = small_config(type(value)).to_dict()
    return config_class(**given)


def shorten(config: PretrainedConfig, counts: dict[str, int]) -> PretrainedConfig:
    """The same configuration with fewer layers and experts, its parts too."""
    for name, count in counts.items():
        if type(old := getattr(config, name, None)) is int and old > count:
            setattr(config, name, count)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            shorten(part, counts)
    return config


def on_meta(key: str) -> PreTrainedModel | None:
    """A model that a key of the table names, of its own sizes but short, without storage; None if none has defaults."""
    for model_class in classes_of(key):
        for counts in ({**LAYERS, **EXPERTS}, EXPERTS, LAYERS, {}):
            try:
                config = shorten(model_class.config_class(**NEEDED.get(key, {})), counts)
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what the library says of its own defaults
                    return model_class(config)
            except Exception:  # a configuration whose defaults are nothing to build, or that checks its counts
                continue
    return None


def random(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def same(model: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


class Library:
    """Where the library puts a key: an entry, or a name that the model does not have."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = conversion_mapping.get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.base, self.entries = model.base_model_prefix, model.state_dict()

    def __call__(self, key: str) -> str:
        renamed, _ = rename_source_key(key, self.renamings, self.converters, self.base, self.entries)
        if renamed not in self.entries and key in self.entries:
            renamed, _ = rename_source_key(key, [], [], self.base, self.entries)
        return renamed


def original_names(model: PreTrainedModel) -> Iterator[str]:
    """The names of the model's own file and of an original one; of the base model, and with its prefix."""
    transforms = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    names = {*model.state_dict(), *revert_weight_conversion(model, model.state_dict())}
    model._weight_conversions = transforms  # prefixes that a rule removes are given back only to what had them
    names |= set(revert_weight_conversion(model, model.state_dict()))
    base = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for name in sorted(names, key=dot_natural_key):
        yield from {name, base + name, name.removeprefix(base)}


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(set(TABLE) - INSIDE - UNBUILT))
def test_every_model_type_is_refused_by_name_or_each_name_lands_where_the_library_puts_it(key):
    model = on_meta(key)
    assert model is not None
    if key in REFUSED:
        with pytest.raises(MappingError, match=rf"^{type(model).__name__}: .*{REFUSED[key]}") as error:
            conversion_rules(model)
        assert str(error.value).endswith(f"warmstart.load(model, {type(model).__name__}.from_pretrained(...))")
        return
    rules = conversion_rules(model)
    rename, library = Renamer(rules["rename"]), Library(model)
    for name in original_names(model):
        wanted = library(name)
        if wanted not in library.entries:
            continue
        renamed = rename(name)
        made = [
            conversion.target_templates[0].render(values)
            for conversion in rules["convert"]
            for template in conversion.source_templates
            if (values := template.match(renamed)) is not None
        ]
        assert (made or [renamed]) == [wanted] or (key in MISPLACED and "layernorm" in name), name


def test_the_table_has_no_key_that_is_not_tested():
    assert {key for key in TABLE if not classes_of(key)} == INSIDE
    assert (REFUSED.keys() | UNBUILT) <= set(TABLE)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A file in the layout that the authors published."""
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "PhimoeForCausalLM"),
        *("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "MiniMaxM2ForCausalLM", "JambaForCausalLM"),
        *("NemotronHForCausalLM", "GraniteMoeForCausalLM", "GptOssForCausalLM"),
        *("ViTForImageClassification", "Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"),
        *("SwinForImageClassification", "SegformerForSemanticSegmentation", "LlavaForConditionalGeneration"),
        *("PaliGemmaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "CLIPVisionModel", "SiglipTextModel"),
        *("NomicBertForMaskedLM", "GteForMaskedLM", "Tipsv2Model", "RfDetrForInstanceSegmentation", "BertForMaskedLM"),
    ],
)
def test_an_original_checkpoint_loads_as_from_pretrained_does_with_a_head_and_bare(name, tmp_path):
    model_class = getattr(transformers, name)
    config = small_config(model_class.config_class)
    source = random(model_class(copy.deepcopy(config)))
    folder = saved(source, tmp_path)
    model = model_class(copy.deepcopy(config))
    assert not same(model, source)

    report = warmstart.load(model, folder, **conversion_rules(model))

    assert report.coverage == 1.0
    assert not report.missing
    assert same(model, model_class.from_pretrained(folder))
    assert same(model, source)

    if source.base_model is not source:
        bare = type(source.base_model)(copy.deepcopy(source.base_model.config))
        heads = [n for n in source.state_dict() if not n.startswith(f"{source.base_model_prefix}.")]
        warmstart.load(bare, folder, **conversion_rules(bare), allow_unexpected="*", allow_missing="?pooler")
        loaded = bare.state_dict()
        assert heads
        for entry, value in source.base_model.state_dict().items():
            assert torch.equal(loaded[entry], value), entry


def test_what_the_model_computes_is_unchanged(tmp_path):
    config = small_config(transformers.MixtralConfig)
    source = random(transformers.MixtralForCausalLM(config)).eval()
    model = transformers.MixtralForCausalLM(config).eval()
    warmstart.load(model, saved(source, tmp_path), **conversion_rules(model))
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, source(tokens).logits)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "LlavaForConditionalGeneration", "DeepseekV3ForCausalLM"])
def test_a_base_model_s_original_file_goes_into_a_model_with_a_head(name, tmp_path):
    model_class = getattr(transformers, name)
    config = small_config(model_class.config_class)
    source = random(model_class(copy.deepcopy(config)))
    model = model_class(copy.deepcopy(config))
    report = warmstart.load(
        model, saved(source.base_model, tmp_path), **conversion_rules(model), allow_missing="lm_head"
    )
    assert report.missing == ("lm_head.weight",)
    assert same(model.base_model, source.base_model)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "ViTForImageClassification", "Tipsv2Model"])
def test_a_file_in_the_model_s_own_layout_loads_by_the_same_rules(name, tmp_path):
    model_class = getattr(transformers, name)
    config = small_config(model_class.config_class)
    source = random(model_class(copy.deepcopy(config)))
    source.save_pretrained(tmp_path, save_original_format=False)
    model = model_class(copy.deepcopy(config))
    warmstart.load(model, tmp_path, **conversion_rules(model))
    assert same(model, source)


def test_gamma_and_beta_of_old_files():
    config = small_config(transformers.BertConfig)
    source = random(transformers.BertModel(config))
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in source.state_dict().items()
    }
    assert any(name.endswith("gamma") for name in old)
    model = transformers.BertModel(config)
    warmstart.load(model, old, **conversion_rules(model))
    assert same(model, source)


def test_into_a_part_of_another_module(tmp_path):
    config = small_config(transformers.MixtralConfig)
    source = random(transformers.MixtralModel(config))
    model = nn.ModuleDict({"encoder": transformers.MixtralModel(config), "head": nn.Linear(16, 2)})
    report = warmstart.load(model, saved(source, tmp_path), into="encoder", **conversion_rules(model["encoder"]))
    assert same(model["encoder"], source)
    assert set(report.excluded) == {"head.weight", "head.bias"}


def test_an_expert_that_is_not_there_is_an_error_and_never_a_shorter_stack(tmp_path):
    config = small_config(transformers.MixtralConfig)
    original = revert_weight_conversion(source := transformers.MixtralModel(config), source.state_dict())
    gone = "layers.1.block_sparse_moe.experts.2.w3.weight"
    del original[gone]
    model = transformers.MixtralModel(config)
    with pytest.raises(MappingError, match=r"layers\.1\."):
        warmstart.load(model, original, **conversion_rules(model))


def test_rules_are_plain_text_and_ops():
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(small_config(transformers.MixtralConfig))
    rules = warmstart.Pretrained("mixtral", **conversion_rules(model)).rules()
    assert list(rules["rename"][0].values()) == [r"\g<before>.mlp.\g<after>"]
    assert rules["rename"][-1] == {
        r"?^model\.(?=(?:lm_head|model)(?:\.|$))": "",
        r"?^(?=(?:embed_tokens|layers|norm)(?:\.|$))": "model.",
    }
    assert str(conversion_rules(model)["convert"][1]) == (
        "?{path...}.experts.{i}.w2.weight -> {path...}.experts.down_proj by Stack(over='i', dim=0)"
    )


def with_transforms(monkeypatch: pytest.MonkeyPatch, *transforms: Any) -> PreTrainedModel:
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: list(transforms))
    with torch.device("meta"):
        return transformers.BertModel(small_config(transformers.BertConfig))


def test_a_transform_of_another_kind_is_refused_by_name(monkeypatch):
    class Shuffle(WeightRenaming):
        pass

    model = with_transforms(monkeypatch, Shuffle("old", "new"))
    with pytest.raises(MappingError, match=r"BertModel: transformers converts its checkpoints by Shuffle.*'old'"):
        conversion_rules(model)


def test_an_op_is_refused_only_where_it_makes_an_entry_of_the_model(monkeypatch):
    op = Transpose(0, 1, check_dims=True)
    none = WeightConverter("old.weight", "elsewhere.weight", [op])
    assert conversion_rules(with_transforms(monkeypatch, none))["convert"] == []
    some = WeightConverter("old.weight", "pooler.dense.weight", [op])
    with pytest.raises(MappingError, match=r"there is no op for Transpose\(dim0=0, dim1=1, check_dims=True\)"):
        conversion_rules(with_transforms(monkeypatch, some))


def test_a_lookbehind_of_a_model_inside_is_refused(monkeypatch):
    renaming = WeightRenaming(r"(?<!model\.)stages", "model.stages")
    renaming.scope_prefix, renaming.base_model_prefix = "encoder", "bert"
    with pytest.raises(MappingError, match=r"lookbehind would see the 'bert\.encoder\.'"):
        conversion_rules(with_transforms(monkeypatch, renaming))


@pytest.mark.parametrize(
    ("pattern", "target", "key", "wanted"),
    [
        # The first place of the matched text is replaced, not the place of the match.
        ("q$", "query", "qkv.q", "querykv.q"),
        # A pattern ends where a word ends.
        ("weight", "w2", "q_proj.weight", "q_proj.w2"),
        ("weight", "w2", "q_proj.weight_scale_inv", "q_proj.weight_scale_inv"),
        ("^", "model.", "a.b", "model.a.b"),
        (r"layers\.(\d+)\.norm", r"blocks.\1.ln", "x.layers.12.norm.weight", "x.blocks.12.ln.weight"),
    ],
)
def test_a_renaming_does_what_the_library_s_does(pattern, target, key, wanted, monkeypatch):
    """HF-4: the boundary of a pattern; and what its `replace` does."""
    assert WeightRenaming(pattern, target).rename_source_key(key)[0] == wanted
    rules = conversion_rules(with_transforms(monkeypatch, WeightRenaming(pattern, target)))
    assert Renamer(rules["rename"][:1])(key) == wanted


def test_a_caret_of_a_model_inside_is_the_start_of_its_part(monkeypatch):
    renaming = WeightRenaming(r"^conv", "embeddings")
    renaming.scope_prefix, renaming.base_model_prefix = "vision", "model"
    rename = Renamer(conversion_rules(with_transforms(monkeypatch, renaming))["rename"][:1])
    for key, wanted in {
        "model.vision.conv.weight": "model.vision.embeddings.weight",
        "vision.conv.weight": "vision.embeddings.weight",
        "vision.layers.conv.weight": "vision.layers.conv.weight",
        "conv.weight": "conv.weight",
    }.items():
        assert rename(key) == renaming.rename_source_key(key)[0] == wanted


def test_a_module_that_is_no_model_of_the_library():
    with pytest.raises(TypeError, match="Linear is no model of transformers; give the part that is one"):
        conversion_rules(nn.Linear(2, 2))  # type: ignore[arg-type]
