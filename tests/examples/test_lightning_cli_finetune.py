"""The fine-tune without Python: the YAML file, as its first lines say to run it, for two batches of two epochs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from real_weights import MOBILENETV2
from warmstart_lightning import WarmStart

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CONFIG = Path(__file__).parents[2] / "examples" / "lightning_cli_finetune.yaml"


def test_it_runs_from_a_bare_pth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(MOBILENETV2.fetch(), "mobilenetv2.pth")
    short = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    release = "--trainer.callbacks.init_args.unfreeze={1: [backbone.head]}"
    cli = LightningCLI(args=["fit", "--config", str(CONFIG), *short, release])
    (warm,) = [c for c in cli.trainer.callbacks if isinstance(c, WarmStart)]
    assert warm.report.status == "applied"
    assert warm.report.coverage == 1
    assert cli.trainer.global_step == 4
    source = torch.load("mobilenetv2.pth", weights_only=True)
    source = source.get("state_dict", source)
    stem = next(v for k, v in source.items() if k.endswith("features.0.0.weight"))
    head = next(v for k, v in source.items() if k.endswith("features.18.0.weight"))
    assert torch.equal(cli.model.backbone.stem.conv.weight, stem)
    assert not torch.equal(cli.model.backbone.head.conv.weight, head)  # released for the second epoch
    assert "warmstart/drift/backbone" in (tmp_path / "runs/lightning_logs/version_0/metrics.csv").read_text()
    assert (tmp_path / "runs/lightning_logs/version_0/warmstart.json").exists()
