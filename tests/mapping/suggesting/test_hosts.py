"""The suggestion's YAML, unchanged, in every host: what it says arrives there."""

from __future__ import annotations

import pytest
import torch
import yaml
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments

import warmstart
from warmstart import Pretrained
from warmstart_accelerate import warm_start
from warmstart_transformers import WarmStartArguments

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = {"layers.": "net.blocks.", "mlp.up": "ffn.up_proj", "mlp.down": "ffn.down_proj"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({f"{x}_proj": nn.Linear(4, 4) for x in "qkv"})
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(sum(linear(x) for linear in self.attn.values()))
        return self.mlp["down"](self.mlp["up"](x))


class Stack(LightningModule):
    """As Lightning, the Trainer and a loop of one's own take it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer(), Layer())

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.layers(x).square().mean()}

    def training_step(self, batch: Tensor) -> Tensor:
        return self(batch)["loss"]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(2, 4), batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def ruled(tmp_path_factory):
    """A foreign checkpoint with fused projections, the YAML that `suggest` writes, and what must arrive."""
    want = {name: torch.randn_like(tensor) for name, tensor in Stack().state_dict().items()}
    foreign = {name: tensor for name, tensor in want.items() if ".attn." not in name}
    for i in range(3):
        for leaf in ("weight", "bias"):
            parts = [want[f"layers.{i}.attn.{x}_proj.{leaf}"] for x in "qkv"]
            foreign[f"layers.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
    for ours, theirs in WORDS.items():
        foreign = {name.replace(ours, theirs): tensor for name, tensor in foreign.items()}
    folder = tmp_path_factory.mktemp("suggested")
    torch.save(foreign, folder / "foreign.pt")
    text = warmstart.suggest(Stack(), folder / "foreign.pt").to_yaml()
    assert {"source", "rename", "convert"} <= yaml.safe_load(text).keys()
    return text, want


def arrived(model: nn.Module, want: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in want.items())


def nested(text: str) -> str:
    """The text as one item of `pretrained:`, without a change but its place."""
    return "pretrained:\n-\n" + "".join(f"  {line}\n" for line in text.splitlines())


def test_in_the_arguments_of_the_trainer(ruled, tmp_path):
    text, want = ruled
    (tmp_path / "warm.yaml").write_text(nested(text) + "log: false\n")
    parser = HfArgumentParser(WarmStartArguments)
    (warm,) = parser.parse_args_into_dataclasses(["--warmstart_config", str(tmp_path / "warm.yaml")])
    model = Stack()
    flags = TrainingArguments(tmp_path / "out", use_cpu=True, report_to=[], max_steps=1, learning_rate=0.0)
    Trainer(model, flags, train_dataset=[{"x": torch.ones(4)}] * 8, callbacks=warm.callbacks()).train()
    assert arrived(model, want)


def test_in_the_yaml_of_the_lightning_cli(ruled, tmp_path):
    text, want = ruled
    lines = "".join(f"        {line}\n" for line in nested(text).splitlines())
    quiet = "  logger: false\n  enable_checkpointing: false\n  enable_progress_bar: false\n  max_steps: 1\n"
    callback = f"  callbacks:\n    - class_path: warmstart_lightning.WarmStart\n      init_args:\n{lines}"
    (tmp_path / "config.yaml").write_text(
        f"trainer:\n  accelerator: cpu\n  default_root_dir: {tmp_path}\n{quiet}{callback}"
    )
    arguments = ["fit", "--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Stack, args=arguments, save_config_callback=None)
    assert cli.trainer.global_step == 1
    assert arrived(cli.model, want)


def test_in_a_loop_of_ones_own(ruled):
    text, want = ruled
    accelerator, model = Accelerator(cpu=True), Stack()
    report = warm_start(accelerator, model, Pretrained(**yaml.safe_load(text)), log=False)
    prepared = accelerator.prepare(model)
    assert prepared(torch.ones(2, 4))["loss"].isfinite()
    assert report.coverage == 1
    assert arrived(model, want)
