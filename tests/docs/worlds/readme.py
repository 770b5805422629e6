"""A MobileNetV2 in a Lightning module and its file, a run to resume, a small BERT for the Trainer, and sources to average."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, TrainingArguments

from mobilenetv2 import MobileNetV2
from warmstart_lightning import WarmStart


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = MobileNetV2(), nn.Linear(1280, 10)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.01)


pretrained = {f"module.{key}": value for key, value in MobileNetV2().state_dict().items()}
torch.save(pretrained, "mobilenetv2.pt")
torch.save(pretrained | {"module.head_old.weight": torch.randn(1000, 1280)}, "old.pt")
module, classifier = Classifier(), Classifier()
data = torch.utils.data.DataLoader([(torch.randn(3, 32, 32), 1), (torch.randn(3, 32, 32), 2)], batch_size=2)
warm = WarmStart("mobilenetv2.pt", into="backbone", freeze=True)
before = Trainer(max_epochs=4, callbacks=[warm], logger=False, enable_checkpointing=False, enable_progress_bar=False)
before.fit(Classifier(), data)
before.save_checkpoint("last.ckpt")

small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
bert = {key: value for key, value in BertModel(BertConfig(**small)).state_dict().items() if "position_ids" not in key}
save_file(bert, "bert.safetensors")
model = BertForSequenceClassification(BertConfig(**small))
texts = [{"input_ids": torch.arange(5), "labels": i % 2} for i in range(4)]
batches = torch.utils.data.DataLoader(texts, batch_size=2)
args = TrainingArguments("run", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
Path("net.py").write_text(
    "from transformers import BertConfig, BertForSequenceClassification\n"
    f"def Net(): return BertForSequenceClassification(BertConfig(**{small}))\n"
)
sys.path.insert(0, "")

from net import Net  # noqa: F401 - made just now, for the page
