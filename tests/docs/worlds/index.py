"""A model with an encoder, and the encoder as a file; a transformers model has its base, which is found by itself."""

from safetensors.torch import save_file
from torch import nn, randn
from transformers import TrainingArguments

model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
save_file({"encoder.weight": randn(4, 4), "encoder.bias": randn(4)}, "bert.safetensors")
args = TrainingArguments("run", report_to=[], use_cpu=True)
