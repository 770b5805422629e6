"""A Lightning checkpoint of a module with a model, a loss and hyperparameters of a class that may be gone."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn


class Config(dict):
    pass


class Old(LightningModule):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.ModuleDict({"encoder": nn.Linear(4, 8), "decoder": nn.Linear(8, 4)})
        self.teacher = nn.Linear(4, 4)

    def training_step(self, batch, index):
        return self.model.decoder(self.model.encoder(batch)).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters())


trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
old = Old(Config(width=8))
trainer.fit(old, torch.utils.data.DataLoader(torch.randn(4, 4)))
trainer.save_checkpoint("last.ckpt")
state = torch.load("last.ckpt", weights_only=False)
state["model_ema"] = {key: value + 1 for key, value in state["state_dict"].items()}
torch.save(state, "with_ema.ckpt")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), nn.Linear(8, 2)


model = Net()
