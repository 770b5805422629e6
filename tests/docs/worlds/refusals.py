"""A model and a file that do not fit each other in three ways."""

from safetensors.torch import save_file
from torch import nn, randn

model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
save_file({"encoder.weight": randn(4, 4), "encoder.bias": randn(4), "fc.weight": randn(9, 4)}, "bert.safetensors")
