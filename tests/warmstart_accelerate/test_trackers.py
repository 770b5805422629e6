"""The report in the accelerator's trackers, through their own methods, and in its project's folder."""

from __future__ import annotations

import json
from pathlib import Path

import loops
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {"coverage", "loaded_tensors", "own_init_tensors", "unused_keys", "frozen_tensors", "superseded"}


def tracked(source, tmp_path, log_with, **options):
    accelerator = Accelerator(cpu=True, project_dir=tmp_path / "run", log_with=log_with)
    accelerator.init_trackers("tiny", **options)
    return loops.train(source, accelerator=accelerator, freeze=True)


def test_tensorboard_gets_scalars_text_lineage_and_a_picture_in_the_run_that_is_there(source, tmp_path):
    seen = tracked(source, tmp_path, "tensorboard")
    seen.accelerator.end_training()
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert len(files) == 1
    found = EventAccumulator(str(files[0].parent)).Reload()
    scalars = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    assert {f"warmstart/{tag}" for tag in TAGS} <= scalars.keys()
    assert scalars["warmstart/coverage"] == 1
    assert scalars["warmstart/frozen_tensors"] == 9
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert texts["warmstart/report/text_summary"] == seen.report.to_markdown()
    assert "encoder.pt" in texts["warmstart/lineage/text_summary"]
    assert found.Tags()["images"] == ["warmstart/coverage_map"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    seen = tracked(source, tmp_path, "mlflow")
    run = mlflow.active_run().info.run_id
    seen.accelerator.end_training()
    found = mlflow.get_run(run).data
    assert {f"warmstart/{tag}" for tag in TAGS} <= found.metrics.keys()
    assert found.params["warmstart/source"].endswith("encoder.pt")
    assert found.params["warmstart/plan_sha256"] == seen.report.plan.digest()
    assert mlflow.artifacts.load_text(f"runs:/{run}/warmstart/report.md") == seen.report.to_markdown()
    assert mlflow.artifacts.load_dict(f"runs:/{run}/warmstart/report.json")["lineage"] == seen.report.lineage


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(source, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    seen = tracked(source, tmp_path, "wandb", config={"lr": 0.1})
    (tracker,) = seen.accelerator.trackers
    config, summary = dict(tracker.run.config), dict(tracker.run.summary)
    seen.accelerator.end_training()
    assert config["lr"] == 0.1
    assert config["warmstart/source"].endswith("encoder.pt")
    assert summary["warmstart/coverage"] == 1
    assert summary["warmstart/coverage_map"]["_type"] == "images/separated"
    assert summary["warmstart/report"]["nrows"] > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_comet_offline(source, tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    for name, value in {"OFFLINE_DIRECTORY": str(tmp_path), "START_ONLINE": "0", "API_KEY": "x" * 25}.items():
        monkeypatch.setenv(f"COMET_{name}", value)
    seen = tracked(source, tmp_path, "comet_ml", init_kwargs={"comet_ml": {"online": False}})
    (tracker,) = seen.accelerator.trackers
    assert tracker.tracker.get_metric("warmstart/coverage") == 1
    assert tracker.tracker.get_parameter("warmstart/source").endswith("encoder.pt")
    seen.accelerator.end_training()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_clearml_offline(source, tmp_path, monkeypatch):
    clearml = pytest.importorskip("clearml")
    clearml.Task.set_offline(offline_mode=True)
    seen = tracked(source, tmp_path, "clearml")
    (tracker,) = seen.accelerator.trackers
    folder = Path(tracker.tracker.get_offline_mode_folder())
    seen.accelerator.end_training()
    assert any("warmstart/coverage" in file.read_text(errors="replace") for file in folder.rglob("*.jsonl"))


class Kept(GeneralTracker):
    """A tracker of one's own."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.values: dict[str, float] = {}
        self.fail = fail

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **kwargs):
        if self.fail:
            raise RuntimeError("no disk")
        self.values |= values


def test_a_tracker_of_one_s_own_gets_the_scalars(source, tmp_path):
    tracker = Kept()
    seen = tracked(source, tmp_path, tracker)
    assert tracker.values == seen.report.metrics()


def test_a_tracker_that_fails_costs_its_entry_and_not_the_run(source, tmp_path):
    with pytest.warns(UserWarning, match="kept did not take the report: no disk"):
        seen = tracked(source, tmp_path, Kept(fail=True))
    assert len(seen.losses) == 4


def test_the_project_s_folder_gets_the_report_as_json_and_as_a_page(source, tmp_path):
    seen = loops.train(source, folder=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "warmstart.json").read_text())
    assert found == json.loads(json.dumps(seen.report.to_dict()))
    assert found["status"] == "applied"
    assert "encoder.pt" in (tmp_path / "run" / "warmstart.html").read_text()


def test_without_log_nothing_is_said_or_written(source, tmp_path, capsys):
    tracker = Kept()
    accelerator = Accelerator(cpu=True, project_dir=tmp_path / "run", log_with=tracker)
    accelerator.init_trackers("tiny")
    loops.train(source, accelerator=accelerator, log=False)
    assert not tracker.values
    assert not (tmp_path / "run").exists()
    assert "warmstart" not in capsys.readouterr().out


def test_without_a_project_s_folder_nothing_is_written(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loops.train(source)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.pt"]
    assert "9/9 tensors, 100 % of elements, verified" in capsys.readouterr().out
