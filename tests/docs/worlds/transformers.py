"""A tiny BERT with a head, its base as a file, a few rows, and both as a module that a script imports."""

from pathlib import Path

Path("task.py").write_text(
    """
import torch
from transformers import BertConfig, BertForSequenceClassification

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def make_model():
    return BertForSequenceClassification(BertConfig(vocab_size=30, **SMALL))


rows = [{"input_ids": torch.arange(6) + i, "labels": i % 2} for i in range(16)]
"""
)

import task
from safetensors.torch import save_file
from transformers import TrainingArguments

make_model, rows = task.make_model, task.rows
model = make_model()
save_file(make_model().bert.state_dict(), "bert.safetensors")
args = TrainingArguments(
    "run", num_train_epochs=1, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True
)
