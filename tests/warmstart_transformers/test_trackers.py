"""The report in whatever trackers `report_to` made active, in the run's folder, its checkpoints and the model card."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Plain, bert

from warmstart_transformers import WarmStartCallback, trackers

TAGS = {"coverage", "loaded_tensors", "own_init_tensors", "unused_keys", "frozen_tensors", "superseded"}


def events(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    scalars, texts = {}, {}
    for file in folder.rglob("events.out.tfevents.*"):
        found = EventAccumulator(str(file.parent)).Reload()
        scalars |= {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
        texts |= {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    return scalars, texts


def images(folder: Path) -> set[str]:
    files = folder.rglob("events.out.tfevents.*")
    return {tag for file in files for tag in EventAccumulator(str(file.parent)).Reload().Tags()["images"]}


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    module = pytest.importorskip("mlflow")
    module.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield module
    while module.active_run() is not None:
        module.end_run()


@pytest.mark.parametrize("attached", [False, True])
def test_tensorboard(make_trainer, plain_source, tmp_path, attached):
    callback = WarmStartCallback(plain_source, into="encoder", freeze=True)
    trainer = make_trainer(Plain(), callback, report_to=["tensorboard"])
    if attached:
        callback.attach(trainer)
    trainer.train()
    scalars, texts = events(tmp_path / "run")
    prefix = "train/warmstart/" if attached else "warmstart/"
    assert {prefix + tag for tag in TAGS} <= scalars.keys()
    assert scalars[prefix + "coverage"] == 1
    assert scalars[prefix + "frozen_tensors"] == 9
    assert "encoder.pt" in texts["warmstart/report/text_summary"]
    assert "encoder.pt" in texts["warmstart/lineage/text_summary"]
    assert images(tmp_path / "run") == {"warmstart/coverage"}
    assert (tmp_path / "run" / "runs" / "warmstart").exists() != attached


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow(make_trainer, plain_source, mlflow, attached):
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback, report_to=["mlflow"])
    if attached:
        callback.attach(trainer)
    with mlflow.start_run() as run:
        trainer.train()
    found = mlflow.get_run(run.info.run_id).data
    assert {f"warmstart/{tag}" for tag in TAGS} <= found.metrics.keys()
    assert found.metrics["warmstart/coverage"] == 1
    assert found.params["warmstart.source"].endswith("encoder.pt")
    assert len(found.params["warmstart.header_sha256"]) == 64
    text = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/warmstart/report.md")
    assert text == callback.report.to_markdown()
    assert "coverage.png" in {
        Path(a.path).name for a in mlflow.artifacts.list_artifacts(f"runs:/{run.info.run_id}/warmstart")
    }
    assert mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/warmstart/lineage.json") == callback.report.lineage


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow_is_not_read_while_another_thread_still_writes(make_trainer, plain_source, mlflow, monkeypatch):
    from mlflow.store.tracking import file_store

    append = file_store.append_to

    def slowly(path, data):
        Path(path).touch()
        time.sleep(0.05)
        append(path, data)

    monkeypatch.setattr(file_store, "append_to", slowly)
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback, report_to=["mlflow"])
    callback.attach(trainer)
    with mlflow.start_run() as run:
        trainer.train()  # a warning, that the report was not taken, is an error here
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/warmstart/report.md") == callback.report.to_markdown()


@pytest.mark.slow
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_wandb_offline(make_trainer, plain_source, tmp_path, monkeypatch, attached):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback, report_to=["wandb"])
    if attached:
        callback.attach(trainer)
    trainer.train()
    config, summary = dict(wandb.run.config), dict(wandb.run.summary)
    wandb.finish()
    assert config["warmstart"]["source"].endswith("encoder.pt")
    assert summary["train/warmstart/coverage" if attached else "warmstart/coverage"] == 1
    assert {"warmstart/report", "warmstart/coverage_map"} <= summary.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_any_other_tracker_gets_the_scalars_when_attached(make_trainer, plain_source, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback, report_to=["trackio"], project="tiny")
    callback.attach(trainer)
    trainer.train()
    with sqlite3.connect(tmp_path / "trackio" / "tiny.db") as database:
        rows = [str(row[0]) for row in database.execute("SELECT metrics FROM metrics")]
    assert any("warmstart/coverage" in row for row in rows)


def test_nothing_goes_where_nothing_reports(make_trainer, plain_source, tmp_path):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"), report_to=[]).train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"warmstart.json", "warmstart.html"}


def test_without_log_nothing_is_said_or_written(make_trainer, plain_source, tmp_path, capsys):
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder", log=False), report_to=["tensorboard"]).train()
    assert not list((tmp_path / "run").glob("warmstart*"))
    assert not any("warmstart" in tag for found in events(tmp_path / "run") for tag in found)
    assert "encoder" not in capsys.readouterr().out


def test_a_tracker_that_fails_costs_its_entry_and_not_the_run(make_trainer, plain_source, monkeypatch):
    def fail(*args):
        raise RuntimeError("no disk")

    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", fail)
    trainer = make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"), report_to=["tensorboard"])
    with pytest.warns(UserWarning, match="tensorboard did not take the report: no disk"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_the_scalars_are_in_the_trainer_s_history_when_attached(make_trainer, plain_source, tmp_path):
    callback = WarmStartCallback(plain_source, into="encoder")
    trainer = make_trainer(Plain(), callback, report_to=["tensorboard"], save_strategy="epoch")
    callback.attach(trainer)
    trainer.train()
    history = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [row["warmstart/coverage"] for row in history if "warmstart/coverage" in row] == [1]


def test_the_report_and_the_lineage_are_json_in_the_run_s_folder(make_trainer, plain_source, tmp_path):
    callback = WarmStartCallback(plain_source, into="encoder", freeze="encoder.0")
    make_trainer(Plain(), callback, save_strategy="steps", save_steps=2).train()
    report = json.loads((tmp_path / "run" / "warmstart.json").read_text())
    assert report["status"] == "applied"
    assert report["lineage"] == callback.report.lineage
    page = (tmp_path / "run" / "warmstart.html").read_text()
    assert "encoder.3.weight" in page
    assert callback.report.lineage["sources"][0]["header_sha256"] in page
    for step in (2, 4):
        state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "warmstart.json").read_text())
        assert state.keys() == {"WarmStartCallback[encoder]"}
        (found,) = state.values()
        assert found["lineage"] == callback.report.lineage
        assert found["frozen"] == ["encoder.0.bias", "encoder.0.weight"]


def test_two_callbacks_share_a_manifest_and_have_a_report_each(make_trainer, plain_source, tmp_path):
    head = {"weight": Plain().head.weight, "bias": Plain().head.bias}
    callbacks = [WarmStartCallback(plain_source, into="encoder"), WarmStartCallback(head, into="head", name="mine")]
    make_trainer(Plain(), *callbacks, save_strategy="epoch").train()
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "warmstart.json").read_text())
    assert state.keys() == {"WarmStartCallback[encoder]", "WarmStartCallback[mine]"}
    found = {path.name for path in (tmp_path / "run").glob("warmstart*")}
    assert found == {f"warmstart-{name}.{kind}" for name in ("encoder", "mine") for kind in ("json", "html")}


def test_without_jinja2_and_matplotlib_there_is_no_page_and_no_picture(
    make_trainer, plain_source, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"), report_to=["tensorboard"]).train()
    assert {path.name for path in (tmp_path / "run").glob("warmstart*")} == {"warmstart.json"}
    assert "warmstart/coverage" not in images(tmp_path / "run")


def test_a_folder_that_takes_no_file_costs_a_warning(make_trainer, plain_source, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "warmstart.json").mkdir()
    trainer = make_trainer(Plain(), WarmStartCallback(plain_source, into="encoder"))
    with pytest.warns(UserWarning, match="the report could not be written to"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_the_model_card_lists_the_ancestor(make_trainer, bert_source, tmp_path):
    callback = WarmStartCallback(bert_source)
    trainer = make_trainer(bert(), callback)
    callback.attach(trainer)
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.count("## Initial weights") == 1
    assert "bert.safetensors" in card
    assert callback.report.lineage["sources"][0]["header_sha256"] in card
    assert "tiny" in card
