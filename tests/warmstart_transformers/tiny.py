"""Real Trainers over tiny models: a BERT with a head, and a plain module with BatchNorm and dropout."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

BEFORE_5 = int(transformers.__version__.partition(".")[0]) < 5


class Plain(nn.Module):
    """An encoder that has everything that moves when it should not, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.LayerNorm(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.encoder(x))
        out = {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), **out} if labels is not None else out


def bert_config(**kwargs) -> BertConfig:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return BertConfig(**sizes, max_position_embeddings=16, **kwargs)


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config())


def numbers(count: int = 16) -> list[dict]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": int(row.sum() > 0)} for row in x]


def texts(count: int = 16) -> list[dict]:
    ids = torch.randint(0, 40, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row[0] % 2)} for row in ids]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_trainer(
    folder: Path, model=None, *callbacks, data=None, model_init=None, optimizers=(None, None), **kwargs
) -> Trainer:
    """A Trainer on the CPU, four steps an epoch, that says and saves nothing unless it is told to."""
    given = {
        "num_train_epochs": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no",
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "weight_decay": 0.1, "use_cpu": True, **kwargs,
    }  # fmt: skip
    if data is None:
        data = numbers() if isinstance(model, Plain) or model_init is not None else texts()
    return Trainer(
        model, TrainingArguments(str(folder), **given), train_dataset=data, eval_dataset=data, model_init=model_init,
        optimizers=optimizers, callbacks=list(callbacks),
    )  # fmt: skip
