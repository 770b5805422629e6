"""A model with BatchNorm and dropout, its encoder as a file, a Lightning run and a transformers run."""

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn


def encoder():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = encoder(), nn.Linear(8, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.encoder(x))
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)


save_file(encoder().state_dict(), "encoder.safetensors")
model, module = Net(), Net()
examples = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(2, (16,)))
data = torch.utils.data.DataLoader(examples, batch_size=8)
rows = [{"x": x, "labels": y} for x, y in examples]

from transformers import TrainingArguments

args = TrainingArguments(
    "run", num_train_epochs=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True
)
