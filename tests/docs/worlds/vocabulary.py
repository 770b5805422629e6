"""A language model with a tied head, its vocabulary, and a larger one; and a tiny BERT with two tokenizers."""

from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn


class LM(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.embed = nn.Embedding(words, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, words, bias=False)
        self.head.weight = self.embed.weight


def tokenizer(words):
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))


old_tokenizer = tokenizer(["[UNK]", "the", "cat", "sat", "mat"])
new_tokenizer = tokenizer(["[UNK]", "[NEW]", "mat", "sat", "cat", "the", "dog"])
save_file({k: v for k, v in LM(5).state_dict().items() if k != "head.weight"}, "lm.safetensors")
model = LM(7)

from transformers import BertConfig, BertForSequenceClassification, BertModel

small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BertModel(BertConfig(vocab_size=5, **small)).save_pretrained("bert")
bert = BertForSequenceClassification(BertConfig(vocab_size=5, **small))
