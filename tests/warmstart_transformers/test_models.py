"""The models that transformers has: bases and heads, tied embeddings, resized vocabularies, adapters, quantised ones."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import bert, bert_config, equal, texts, weights
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from warmstart import MappingError, Pretrained
from warmstart_transformers import WarmStartCallback, vocab_map

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LANGUAGE = [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in texts()]


def test_a_head_s_own_file_goes_into_the_whole_model(make_trainer, tmp_path):
    source = bert(7)
    source.save_pretrained(tmp_path / "source")
    model = bert()
    callback = WarmStartCallback(tmp_path / "source")
    make_trainer(model, callback)
    assert callback.report.plan.parts[0].pretrained.into == ""
    assert equal(weights(model), weights(source))


def test_field_note_16_another_number_of_classes_is_not_passed_over(make_trainer, tmp_path):
    BertForSequenceClassification(bert_config(num_labels=5)).save_pretrained(tmp_path / "source")
    with pytest.raises(MappingError, match=r"classifier\.weight"):
        make_trainer(bert(), WarmStartCallback(tmp_path / "source"))
    model = bert()
    make_trainer(model, WarmStartCallback(tmp_path / "source", allow_mismatched="classifier"))
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert all(torch.equal(v, source[n]) for n, v in model.state_dict().items() if n.startswith("bert."))


def test_another_head_s_file_must_be_allowed_by_name(make_trainer, tmp_path):
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "source")
    with pytest.raises(MappingError, match=r"cls\.predictions"):
        make_trainer(bert(), WarmStartCallback(tmp_path / "source"))
    model = bert()
    make_trainer(model, WarmStartCallback(tmp_path / "source", allow_unexpected="cls", allow_missing="bert.pooler"))
    source = load_file(tmp_path / "source" / "model.safetensors")
    loaded = {n: v for n, v in model.state_dict().items() if n.startswith("bert.") and "pooler" not in n}
    assert all(torch.equal(v, source[n]) for n, v in loaded.items())


def test_names_that_a_rule_makes_keep_the_whole_model_s_scope(make_trainer, bert_source):
    """What renames and conversions produce is relative to `into`: it is not moved under them."""
    model = bert()
    tree = {f"body.{name}": value for name, value in load_file(bert_source).items() if "position_ids" not in name}
    callback = WarmStartCallback(tree, rename={"^body": "bert"}, strip_prefix="", allow_missing="classifier")
    make_trainer(model, callback)
    assert callback.report.plan.parts[0].pretrained.into == ""
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, tree["body.embeddings.word_embeddings.weight"])


class Late(PreTrainedModel):
    """As custom models are: an init pass with plain in-place calls, here not before the first step."""

    config_class = BertConfig
    base_model_prefix = "bert"

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.classifier = BertModel(config), torch.nn.Linear(16, 2)
        for module in self.modules():
            vars(module).pop("_is_hf_initialized", None)
        for tensor in [*self.parameters(), *self.buffers()]:
            vars(tensor).pop("_is_hf_initialized", None)
        self.late = True

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data.fill_(0.125)

    def forward(self, input_ids, labels=None):
        if self.late:
            self.late = False
            self.post_init()
            self.seen = weights(self)
        logits = self.classifier(self.bert(input_ids).pooler_output)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_field_note_10_an_init_pass_that_runs_late_leaves_what_was_loaded_alone(make_trainer, bert_source):
    model, source = Late(bert_config()), load_file(bert_source)
    make_trainer(model, WarmStartCallback(bert_source)).train()
    assert torch.equal(model.seen["classifier.weight"], torch.full((2, 16), 0.125))  # it did run
    assert all(torch.equal(v, source[n.removeprefix("bert.")]) for n, v in model.seen.items() if n.startswith("bert."))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))


@pytest.mark.parametrize("whole", [False, True])
def test_field_note_14_tied_embeddings_stay_tied(make_trainer, tmp_path, whole):
    source = gpt2(7)
    (source if whole else source.transformer).save_pretrained(tmp_path / "source")
    model = gpt2()
    callback = WarmStartCallback(tmp_path / "source")
    trainer = make_trainer(model, callback, data=LANGUAGE, save_strategy="epoch")
    assert equal(weights(model), weights(source))
    trainer.train()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not torch.equal(model.lm_head.weight, source.lm_head.weight)
    # the head is not in the checkpoint: the tie says where its values are
    (tmp_path / "source" / "model.safetensors").unlink()
    again = gpt2(3)
    trainer = make_trainer(again, WarmStartCallback(tmp_path / "source" / "model.safetensors"), data=LANGUAGE)
    trainer.args.num_train_epochs = 2
    trainer.train(resume_from_checkpoint=True)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_tied_and_frozen(make_trainer, tmp_path):
    source = gpt2(7)
    source.save_pretrained(tmp_path / "source")
    model = gpt2()
    callback = WarmStartCallback(tmp_path / "source", freeze="transformer.wte")
    make_trainer(model, callback, data=LANGUAGE).train()
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert not torch.equal(model.transformer.wpe.weight, source.transformer.wpe.weight)


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: row for row, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


@pytest.mark.parametrize("freeze_old", [False, True])
def test_field_note_28_a_resized_vocabulary_goes_by_token(make_trainer, tmp_path, freeze_old):
    old, new = tokenizer([f"w{i}" for i in range(40)]), tokenizer([f"w{i}" for i in reversed(range(40))])
    new.add_tokens(["fresh", "newer"])
    base = BertModel(bert_config())
    base.save_pretrained(tmp_path / "source")
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config())
    model.resize_token_embeddings(len(new), mean_resizing=False)
    rows = vocab_map(old, new, freeze_old=freeze_old)
    callback = WarmStartCallback(tmp_path / "source", adapt={"*word_embeddings": rows})
    trainer = make_trainer(model, callback)
    before, table = base.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight
    for word in ("w0", "w7", "w39"):
        row = table[new.convert_tokens_to_ids(word)]
        assert torch.equal(row, before[old.convert_tokens_to_ids(word)])
    for word in ("fresh", "newer"):
        assert torch.allclose(table[new.convert_tokens_to_ids(word)], before.mean(0), atol=1e-6)
    loaded = table.detach().clone()
    trainer.train()
    assert torch.equal(loaded[:40], table[:40]) == freeze_old


def test_vocab_map_takes_plain_tokenizers():
    plain = tokenizer(["a", "b"])
    rows = vocab_map(plain, plain.backend_tokenizer, new_rows="keep", allow_drop=True)
    assert (rows.new_rows, rows.allow_drop, rows.freeze_old) == ("keep", True, False)


def lora(seed: int = 0):
    torch.manual_seed(seed)
    return get_peft_model(bert(seed), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))


def test_lora_on_a_warm_base_and_adapters_from_a_file(make_trainer, bert_source, tmp_path):
    given = lora(5)
    given.save_pretrained(tmp_path / "adapter")
    model = lora()
    callback = WarmStartCallback(
        [Pretrained(bert_source), Pretrained(tmp_path / "adapter" / "adapter_model.safetensors")]
    )
    trainer = make_trainer(model, callback)
    source = load_file(bert_source)
    now = weights(model)
    base = {n.removeprefix("base_model.model.bert.").replace(".base_layer", ""): v for n, v in now.items()}
    assert sum(torch.equal(base[name], value) for name, value in source.items() if name in base) == len(source) - 1
    theirs = weights(given)
    assert all(torch.equal(value, theirs[name]) for name, value in now.items() if "lora" in name)
    trainer.train()
    after = weights(model)
    assert all(torch.equal(after[name], now[name]) for name in now if "lora" not in name and "classifier" not in name)
    assert not all(torch.equal(after[name], now[name]) for name in now if "lora" in name)
