"""The report arrives in real loggers, several at once, and where there is none."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from warmstart_lightning import WarmStart

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.encoder(batch[0])).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(tmp_path, loggers, *, freeze=True, **kwargs) -> WarmStart:
    source = {"weight": torch.eye(3), "bias": torch.ones(3)}
    callback = WarmStart(source, into="encoder", freeze=freeze, **kwargs)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=loggers, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2))
    return callback


class OwnLogger(Logger):
    """A logger with the two methods a logger must have, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    name = "own"
    version = "0"

    def log_metrics(self, metrics, step=None):
        self.metrics.update(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        self.params = params


def test_tensorboard_has_scalars_text_and_hyperparameters(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb")
    fit(tmp_path, logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    assert events.Scalars("warmstart/coverage")[0].value == 1
    assert events.Scalars("warmstart/frozen_tensors")[0].value == 2
    text = events.Tensors("warmstart/report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "`encoder.weight`" in text
    picture = events.Images("warmstart/coverage")[0]
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert (picture.width, picture.height) > (600, 100)
    page = (tmp_path / "tb" / "version_0" / "warmstart.html").read_text()
    assert "a state dict in memory into Module" in page
    assert "a state dict in memory" in (tmp_path / "tb" / "version_0" / "hparams.yaml").read_text()


def test_several_loggers_at_once_and_one_of_the_user_s_own(tmp_path):
    own, csv = OwnLogger(), CSVLogger(tmp_path, name="csv")
    callback = fit(tmp_path, [csv, TensorBoardLogger(tmp_path, name="tb"), own])
    assert own.metrics["warmstart/loaded_tensors"] == 2
    assert own.params["warmstart"]["coverage"] == 1
    assert "warmstart/coverage" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    written = json.loads((tmp_path / "csv" / "version_0" / "warmstart.json").read_text())
    assert written["status"] == "applied"
    assert written["plan"]["assignments"][0]["target"] == "encoder.weight"
    assert callback.report.metrics()["warmstart/coverage"] == 1


def test_mlflow_with_a_real_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = f"file:{tmp_path}/mlruns"
    logger = MLFlowLogger("warm", tracking_uri=uri)
    fit(tmp_path, logger)
    client = MlflowClient(uri)
    run = client.get_run(logger.run_id)
    assert run.data.metrics["warmstart/coverage"] == 1
    assert any("plan_sha256" in name for name in run.data.params)
    (report,) = tmp_path.glob("mlruns/**/report.md")
    assert "encoder.weight" in report.read_text()
    (picture,) = tmp_path.glob("mlruns/**/coverage.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_how_far_the_loaded_layers_moved_is_a_scalar_of_each_epoch(tmp_path):
    own, csv = OwnLogger(), CSVLogger(tmp_path, name="csv")
    callback = fit(tmp_path, [own, csv], freeze=False)
    moved = own.metrics["warmstart/drift/encoder"]
    assert 0 < moved < 10
    assert callback.drift == {"encoder": moved}
    assert "warmstart/drift/encoder" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    still = fit(tmp_path, OwnLogger(), freeze=True)
    assert still.drift == {}


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("warm", save_dir=tmp_path, offline=True)
    fit(tmp_path, logger, freeze=False)
    config, summary = dict(logger.experiment.config), dict(logger.experiment.summary)
    wandb.finish()
    assert config["warmstart"]["coverage"] == 1
    assert summary["warmstart/coverage"] == 1
    assert summary["warmstart/drift/encoder"] > 0
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/warmstart/coverage_map*.png"))


def test_comet_gets_the_picture_by_its_own_method(tmp_path):
    """Comet is not installed here: its logger is known by its name."""
    got: dict[str, object] = {}

    class CometLogger(OwnLogger):
        @property
        def experiment(self):
            return self

        def log_text(self, *args, **kwargs):
            pass

        def log_figure(self, figure_name, figure, step):
            got[figure_name] = figure

    fit(tmp_path, CometLogger())
    assert type(got["warmstart/coverage"]).__name__ == "Figure"


def test_without_jinja2_and_matplotlib_the_run_is_the_same_without_page_and_picture(tmp_path, monkeypatch):
    from warmstart_lightning import loggers

    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    fit(tmp_path, TensorBoardLogger(tmp_path, name="tb"))
    assert (tmp_path / "tb" / "version_0" / "warmstart.json").exists()
    assert not (tmp_path / "tb" / "version_0" / "warmstart.html").exists()


def test_on_a_terminal_the_report_is_in_colour(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", terminal)
    fit(tmp_path, False)
    assert "\x1b[1;32mwarmstart: 2/2 tensors" in terminal.getvalue()


def test_without_a_logger_the_report_is_a_file_in_the_root_dir(tmp_path):
    fit(tmp_path, False)
    assert json.loads((tmp_path / "warmstart.json").read_text())["verified"] == "full"


def test_beside_a_logger_without_a_folder_the_report_is_a_file_in_the_root_dir(tmp_path):
    fit(tmp_path, OwnLogger())
    assert json.loads((tmp_path / "warmstart.json").read_text())["status"] == "applied"


def test_log_false_writes_nothing(tmp_path):
    own = OwnLogger()
    fit(tmp_path, own, log=False)
    assert own.metrics == {}
    assert not list(tmp_path.glob("warmstart*"))


def test_a_logger_that_fails_costs_its_entry_and_not_the_run(tmp_path):
    class Broken(OwnLogger):
        def log_metrics(self, metrics, step=None):
            if "warmstart/coverage" in metrics:
                raise ConnectionError("no route to the tracker")

    with pytest.warns(UserWarning, match="Broken did not take the report: no route"):
        callback = fit(tmp_path, Broken())
    assert callback.report.status == "applied"
