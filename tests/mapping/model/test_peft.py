"""PEFT models: which side a source sees, under which names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart import MappingError, Pretrained
from warmstart.mapping.model.peft import AdapterEntry, cleaner, is_slot
from warmstart.mapping.model.targets import Targets

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{w}") for w in ("FutureWarning", "UserWarning", "DeprecationWarning")
]

QUERY = "bert.encoder.layer.0.attention.self.query"


def bert(seed=0):
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config).eval()


def llama(seed=0, tied=True):
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, max_position_embeddings=6, tie_word_embeddings=tied)  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def lora(**fields):
    return peft.LoraConfig(**{"target_modules": ["query"], "r": 2, **fields})


def trained(model):
    torch.manual_seed(100)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def held(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


CONFIGS = {
    "lora": lambda: lora(),
    "lora with embeddings, biases and a trained head": lambda: lora(
        target_modules=["query", "word_embeddings"], task_type="SEQ_CLS", bias="lora_only"
    ),
    "lora with all biases": lambda: lora(bias="all"),
    "dora and trained tokens": lambda: lora(use_dora=True, trainable_token_indices=[1, 2]),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "ia3": lambda: peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "vera": lambda: peft.VeraConfig(target_modules=["query"], r=2),
    "loha": lambda: peft.LoHaConfig(target_modules=["query"], r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=["query"], r=2),
    "oft": lambda: peft.OFTConfig(target_modules=["query"], oft_block_size=4),
    "boft": lambda: peft.BOFTConfig(target_modules=["query"], boft_block_size=4),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    "vb-lora": lambda: peft.VBLoRAConfig(target_modules=["query"], num_vectors=4, vector_length=4, topk=2, r=2),
    "trained tokens": lambda: peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[1, 2]),
}
configs = pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items()])


@configs
def test_an_adapter_file_gives_what_from_pretrained_gives(config, tmp_path):
    trained(peft.get_peft_model(bert(), config())).save_pretrained(tmp_path)
    expected = peft.PeftModel.from_pretrained(bert(), tmp_path).state_dict()
    torch.manual_seed(7)
    model = peft.get_peft_model(bert(), config())
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    report = warmstart.load(model, tmp_path / "adapter_model.safetensors")
    found = model.state_dict()
    # A prompt encoder made for inference has no parameters that only training needs.
    assert set(expected) <= set(found)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert report.plan.coverage == 1.0
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads


@configs
def test_a_base_file_fills_the_base_and_leaves_the_adapter(config):
    model, source = peft.get_peft_model(bert(1), config()), bert().state_dict()
    targets = Targets.of(model)
    before = held(model)
    report = warmstart.load(model, source)
    base = {t.clean: t for t in targets.entries.values() if t.adapter is None and t.alias_of is None}
    assert set(base) == set(source)
    for name, target in base.items():
        assert torch.equal(target.tensor, source[name])
    adapter = {name for name, t in targets.entries.items() if t.adapter is not None and t.alias_of is None}
    assert adapter
    assert differing(model, before).isdisjoint(adapter)
    assert adapter <= set(report.plan.excluded)
    assert set(report.plan.unexpected) == set(report.plan.missing) == set()


@configs
def test_a_whole_state_dict_gives_back_the_whole_model(config):
    source = trained(peft.get_peft_model(bert(), config()))
    model = peft.get_peft_model(bert(1), config())
    report = warmstart.load(model, source.state_dict())
    assert differing(model, source.state_dict()) == set()
    assert set(report.plan.excluded) == set()


def test_a_new_adapter_on_a_loaded_base_computes_what_the_base_computes():
    ids = torch.tensor([[1, 2, 3]])
    source = bert()
    model = peft.get_peft_model(bert(1), lora()).eval()
    warmstart.load(model, source.state_dict())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)


def test_field_note_31_coverage_counts_the_base_and_each_adapter_apart():
    source = trained(peft.get_peft_model(bert(), lora()))
    state = source.state_dict()
    del state[f"base_model.model.{QUERY}.lora_B.default.weight"]
    model = peft.get_peft_model(bert(1), lora())
    plan = warmstart.plan(model, state)
    assert [problem.kind for problem in plan.errors] == ["missing"]
    assert "loaded, by elements: 100.00% of the base, 50.00% of adapter 'default'" in plan.notes
    adapter = peft.get_peft_model_state_dict(source)
    assert warmstart.plan(model, adapter).coverage == 1.0
    del adapter[f"base_model.model.{QUERY}.lora_B.weight"]
    plan = warmstart.plan(model, adapter)
    assert plan.coverage == 0.5
    assert plan.missing == (f"base_model.model.{QUERY}.lora_B.default.weight",)


def test_field_note_31_an_adapter_that_was_never_trained_is_flagged():
    adapter = peft.get_peft_model_state_dict(peft.get_peft_model(bert(), lora()))
    report = warmstart.load(peft.get_peft_model(bert(), lora()), adapter)
    assert any("adapter 'default' has no effect" in note for note in report.notes)
    adapter = peft.get_peft_model_state_dict(trained(peft.get_peft_model(bert(), lora())))
    report = warmstart.load(peft.get_peft_model(bert(), lora()), adapter)
    assert not any("no effect" in note for note in report.notes)


def test_field_note_31_a_wrong_adapter_name_is_an_error_whose_line_works():
    config = lora(target_modules=["query", "word_embeddings"], task_type="SEQ_CLS")
    source = trained(peft.get_peft_model(bert(), config, adapter_name="0"))  # a name that layers have, too
    model = peft.get_peft_model(bert(1), config, adapter_name="mine")
    before = held(model)
    with pytest.raises(MappingError) as caught:
        warmstart.load(model, source.state_dict())
    assert "of an adapter named '0', and the model has 'mine'" in str(caught.value)
    line = str(caught.value).rpartition("rename=")[2]
    assert line == r'{r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|modules_to_save)\.0": r"\1.mine"}'
    assert differing(model, before) == set()
    warmstart.load(model, source.state_dict(), rename=eval(line))
    after = {name.replace("lora_A.mine", "lora_A.0"): t for name, t in model.state_dict().items()}
    state = source.state_dict()
    name = f"base_model.model.{QUERY}.lora_A.0.weight"
    assert torch.equal(after[name], state[name])
    assert torch.equal(
        model.state_dict()["base_model.model.classifier.modules_to_save.mine.weight"],
        state["base_model.model.classifier.modules_to_save.0.weight"],
    )


def test_the_wrong_adapters_keys_may_be_left_out_on_purpose():
    source = trained(peft.get_peft_model(bert(), lora(), adapter_name="other")).state_dict()
    model = peft.get_peft_model(bert(1), lora())
    before = held(model)
    warmstart.load(model, source, allow_unexpected=["*.other"], allow_missing=["*.default"])
    assert torch.equal(
        model.state_dict()[f"base_model.model.{QUERY}.base_layer.weight"], bert().get_parameter(f"{QUERY}.weight")
    )
    assert not any("lora" in name for name in differing(model, before))


def test_an_adapter_file_for_two_adapters_asks_which_one():
    file = peft.get_peft_model_state_dict(trained(peft.get_peft_model(bert(), lora(task_type="SEQ_CLS"))))
    model = peft.get_peft_model(bert(1), lora(task_type="SEQ_CLS"), adapter_name="first")
    model.add_adapter("second", lora(task_type="SEQ_CLS"))
    plan = warmstart.plan(model, file)
    assert [problem.kind for problem in plan.errors] == ["ambiguous"]
    assert "the model has 'first', 'second'" in plan.explain()
    assert plan.explain().endswith('include=["*.first"]')
    before = held(model)
    warmstart.load(model, file, include=["*.second"])
    assert differing(model, before) == {
        f"base_model.model.{QUERY}.lora_A.second.weight",
        f"base_model.model.{QUERY}.lora_B.second.weight",
        "base_model.model.classifier.modules_to_save.second.weight",
        "base_model.model.classifier.modules_to_save.second.bias",
    }
    expected = file["base_model.model.classifier.weight"]
    assert torch.equal(model.base_model.model.classifier.modules_to_save["second"].weight, expected)


def test_a_state_dict_of_two_adapters_is_told_by_their_names():
    def two(seed):
        model = peft.get_peft_model(bert(seed), lora(), adapter_name="first")
        model.add_adapter("second", lora())
        return model

    source = trained(two(0))
    model = two(1)
    warmstart.load(model, source.state_dict())
    assert differing(model, source.state_dict()) == set()
    one = {name: tensor for name, tensor in source.state_dict().items() if ".first." in name}
    model = two(1)
    before = held(model)
    plan = warmstart.load(model, one).plan
    assert differing(model, before) == set(one)
    assert any("adapter 'second' are left as they are" in note for note in plan.notes)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter file", "state dict"])
def test_a_plain_model_is_told_to_merge_an_adapter(whole):
    source = trained(peft.get_peft_model(bert(), lora()))
    model = bert(1)
    before = held(model)
    with pytest.raises(MappingError) as caught:
        warmstart.load(model, source.state_dict() if whole else peft.get_peft_model_state_dict(source))
    assert "lora_A" in str(caught.value)
    assert "model.merge_and_unload()" in str(caught.value).splitlines()[-1]
    assert differing(model, before) == set()
    # What the line says works.
    warmstart.load(model, source.merge_and_unload().state_dict())
    assert differing(model, source.base_model.model.state_dict()) == set()


def test_the_base_of_a_whole_state_dict_goes_into_a_plain_model():
    source = peft.get_peft_model(bert(), lora(task_type="SEQ_CLS"))
    model = bert(1)
    warmstart.load(model, source.state_dict(), allow_unexpected=["*.default"])
    assert differing(model, bert().state_dict()) == set()


def test_another_kind_of_adapter_is_named():
    file = peft.get_peft_model_state_dict(peft.get_peft_model(bert(), lora()))
    model = peft.get_peft_model(bert(), CONFIGS["ia3"]())
    with pytest.raises(MappingError, match="'lora_A', 'lora_B' are of another kind of adapter than the model's"):
        warmstart.load(model, file)


def test_modules_to_save_keeps_its_copy_and_says_so():
    model = peft.get_peft_model(bert(1), lora(task_type="SEQ_CLS"))
    head = model.base_model.model.classifier
    before = head.modules_to_save["default"].weight.clone()
    plan = warmstart.load(model, bert().state_dict()).plan
    assert torch.equal(head.original_module.weight, bert().classifier.weight)
    assert torch.equal(head.modules_to_save["default"].weight, before)
    assert any("modules_to_save were made from the base's values" in note for note in plan.notes)
    for into in ("classifier.modules_to_save.default", "base_model.model.classifier.modules_to_save.default"):
        with torch.no_grad():
            head.modules_to_save["default"].weight.zero_()
        warmstart.load(model, bert().state_dict(), select=["classifier"], into=into)
        assert torch.equal(head.modules_to_save["default"].weight, bert().classifier.weight)


@pytest.mark.parametrize("into", ["bert", "base_model.model.bert"])
def test_into_takes_either_spelling(into):
    model = peft.get_peft_model(bert(1), lora())
    encoder = {name.removeprefix("bert."): t for name, t in bert().state_dict().items() if name.startswith("bert.")}
    before = held(model)
    warmstart.load(model, encoder, into=into)
    changed = differing(model, before)
    assert changed
    assert all(".bert." in name and "lora" not in name for name in changed)
    file = peft.get_peft_model_state_dict(trained(peft.get_peft_model(bert(), lora())))
    before = held(model)
    warmstart.load(model, file, into=into)
    assert {name.partition(".lora_")[0] for name in differing(model, before)} == {f"base_model.model.{QUERY}"}


def test_a_peft_model_inside_another_module():
    class Task(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = peft.get_peft_model(bert(seed), lora(task_type="SEQ_CLS"))
            self.loss = nn.Linear(2, 2)

    source, model = trained(Task(0)), Task(1)
    file = peft.get_peft_model_state_dict(source.model)
    before = held(model)
    warmstart.load(model, file)
    changed = differing(model, before)
    assert {name.rpartition(".")[0] for name in changed} == {
        f"model.base_model.model.{QUERY}.lora_A.default",
        f"model.base_model.model.{QUERY}.lora_B.default",
        "model.base_model.model.classifier.modules_to_save.default",
    }
    assert all(torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in changed)
    warmstart.load(model, source.state_dict())
    assert differing(model, source.state_dict()) == set()


def test_injected_layers_have_the_names_of_a_peft_model():
    model, source = bert(1), trained(peft.get_peft_model(bert(), lora()))
    peft.inject_adapter_in_model(lora(), model)
    warmstart.load(model, [Pretrained(bert().state_dict()), Pretrained(peft.get_peft_model_state_dict(source))])
    assert differing(model, source.base_model.model.state_dict()) == set()


def test_ties_hold_across_wraps():
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2)
    model, source = peft.get_peft_model(llama(1), config), llama()
    state = source.state_dict()
    del state["lm_head.weight"]  # as a tied model is saved
    warmstart.load(model, state)
    assert model.base_model.model.lm_head.base_layer.weight is model.base_model.model.model.embed_tokens.weight
    assert torch.equal(model.base_model.model.lm_head.base_layer.weight, source.lm_head.weight)


def test_a_base_whose_own_names_start_with_model():
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for config in (peft.LoraConfig(target_modules=["q_proj"], r=2), prompt):
        source = trained(peft.get_peft_model(llama(), config))
        model = peft.get_peft_model(llama(1), config)
        warmstart.load(model, source.state_dict(), strip_prefix="")
        assert differing(model, source.state_dict()) == set()
        model = peft.get_peft_model(llama(1), config)
        warmstart.load(model, llama().state_dict(), strip_prefix="")
        assert {t.clean for t in Targets.of(model).entries.values() if not t.adapter} >= set(llama().state_dict())


def test_names_of_entries():
    entries = Targets.of(peft.get_peft_model(bert(), lora(task_type="SEQ_CLS"))).entries
    base = entries[f"base_model.model.{QUERY}.base_layer.weight"]
    assert (base.clean, base.adapter) == (f"{QUERY}.weight", None)
    factor = entries[f"base_model.model.{QUERY}.lora_A.default.weight"]
    assert factor.clean == f"{QUERY}.lora_A.default.weight"
    assert factor.adapter == AdapterEntry(QUERY, "lora_A", "default", "weight")
    copy = entries["base_model.model.classifier.modules_to_save.default.weight"]
    assert copy.adapter == AdapterEntry("classifier", "modules_to_save", "default", "weight")
    assert entries["base_model.model.classifier.original_module.weight"].clean == "classifier.weight"


@pytest.mark.parametrize(
    ("entry", "saved"),
    [
        (AdapterEntry("a.q", "lora_A", "x", "weight"), "a.q.lora_A.weight"),
        (AdapterEntry("a.e", "lora_embedding_A", "x"), "a.e.lora_embedding_A"),
        (AdapterEntry("a.q", "lora_magnitude_vector", "x", "weight"), "a.q.lora_magnitude_vector"),
        (AdapterEntry("head", "modules_to_save", "x", "out.weight"), "head.out.weight"),
        (AdapterEntry("", "prompt_encoder", "x", "embedding.weight"), "prompt_embeddings"),
        (AdapterEntry("model", "prompt_encoder", "x", "prompt_task_cols"), "model.prompt_task_cols"),
        (AdapterEntry("", "prompt_encoder", "x", "transform.0.weight"), "prompt_encoder.transform.0.weight"),
        (AdapterEntry("", "vera_A", "x"), "vera_A"),
    ],
)
def test_names_in_an_adapters_own_file(entry, saved):
    assert entry.saved == saved


@pytest.mark.parametrize(
    ("prefixes", "segments", "key", "clean"),
    [
        (["", "base_model.model"], {"q"}, "base_model.model.q.base_layer.weight", "q.weight"),
        (["base_model", "base_model.model"], {"q"}, "net.base_model.model.model.q.weight", "net.model.q.weight"),
        (["base_model.model"], set(), "base_model.vera_A", "vera_A"),
        (["base_model"], {"model"}, "base_model.model.q.weight", "model.q.weight"),
        (["base_model.model"], {"base_model"}, "base_model.model.q.weight", "base_model.model.q.weight"),
        ([""], set(), "base_model.model.head.original_module.weight", "base_model.model.head.weight"),
        ([""], {"base_layer"}, "q.base_layer.weight", "q.base_layer.weight"),
        (["base_model.model"], set(), "base_model.model", "base_model.model"),
        ([], set(), "base_layer.0.weight", "base_layer.0.weight"),
        ([], set(), "a.base_layer", "a.base_layer"),
        ([], set(), "a.e.token_adapter.base_layer.weight", "a.e.weight"),
        ([], set(), "a.e.token_adapter.trainable_tokens_delta", "a.e.trainable_tokens_delta"),
        ([], set(), "a.token_adapter.weight", "a.token_adapter.weight"),
        ([], set(), "a.base_layer.base_layer.weight", "a.weight"),
        ([], {"base_layer", "original_module", "token_adapter"}, "a.base_layer.weight", "a.base_layer.weight"),
        (["base_model.model"], set(), ".base_model.model..x.", "..x."),
    ],
)
def test_keys_without_the_segments_of_peft(prefixes, segments, key, clean):
    assert cleaner(prefixes, segments)(key) == clean


def test_only_adapters_have_their_segments():
    assert all(map(is_slot, ("lora_A", "lora_embedding_B", "ia3_l", "modules_to_save", "prompt_embeddings", "oft_R")))
    assert not any(map(is_slot, ("lora", "prompt_encoder", "lora_Ax", "weight", "embeddings")))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_other_wrappers_around_a_peft_model(wrap):
    source = trained(peft.get_peft_model(bert(), lora()))
    for state in (source.state_dict(), wrap(source).state_dict()):
        model = wrap(peft.get_peft_model(bert(1), lora()))
        warmstart.load(model, state)
        assert differing(model.module if wrap is nn.DataParallel else model._orig_mod, source.state_dict()) == set()


def test_lora_on_bare_parameters():
    config = peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight", "up_proj.weight"], r=2)
    source = trained(peft.get_peft_model(llama(), config))
    model = peft.get_peft_model(llama(1), config)
    warmstart.load(model, [Pretrained(llama().state_dict()), Pretrained(peft.get_peft_model_state_dict(source))])
    assert differing(model, source.state_dict()) == set()


def test_the_trainable_parameters_alone_leave_the_base():
    source = trained(peft.get_peft_model(bert(), lora(task_type="SEQ_CLS")))
    model = peft.get_peft_model(bert(1), lora(task_type="SEQ_CLS"))
    state = {name: parameter for name, parameter in source.named_parameters() if parameter.requires_grad}
    before = held(model)
    warmstart.load(model, state)
    assert differing(model, before) == set(state)


def test_an_adapter_trained_on_a_base_with_other_names():
    source = trained(peft.get_peft_model(bert(), lora(bias="lora_only")))
    state = {n.replace("model.bert", "model.net"): t for n, t in peft.get_peft_model_state_dict(source).items()}
    model = peft.get_peft_model(bert(1), lora(bias="lora_only"))
    before = held(model)
    warmstart.load(model, state, rename={"net": "bert"})
    assert differing(model, before) == {
        f"base_model.model.{QUERY}.{leaf}"
        for leaf in ("base_layer.bias", "lora_A.default.weight", "lora_B.default.weight")
    }
    expected = held(model)
    with torch.no_grad():
        for name in differing(model, before):
            model.get_parameter(name).zero_()
    warmstart.load(model, state)  # the prefix is inferred
    assert differing(model, expected) == set()


def test_freeze_takes_what_was_loaded():
    model = peft.get_peft_model(bert(1), lora())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    warmstart.load(model, bert().state_dict(), freeze=True)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    warmstart.load(model, peft.get_peft_model_state_dict(trained(peft.get_peft_model(bert(), lora()))), freeze=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
