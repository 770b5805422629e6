"""A classifier over an encoder, two files of encoders, and batches."""

import torch
from safetensors.torch import save_file
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


for name in ("encoder", "other"):
    save_file(Net().encoder.state_dict(), f"{name}.safetensors")
loader = torch.utils.data.DataLoader([(torch.randn(4), i % 2) for i in range(8)], batch_size=4)
