"""Lineage: ancestors from every place a source may carry them, and never anything secret, executed or refused for it."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import warmstart
from warmstart.lineage import METADATA_KEY, as_metadata, lineage_of_copy, recorded, recorded_in_json


def record(location: str = "s3://bucket/first.safetensors", **more) -> dict:
    return {
        "sources": [{"location": location, "header_sha256": "ab" * 32, "rules": {}}],
        "loaded": 2,
        "ancestors": [],
    } | more


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in nn.Linear(3, 2).state_dict().items()}


def ancestors(path, **fields) -> list[dict]:
    return warmstart.load(nn.Linear(3, 2), path, **fields).lineage["ancestors"]


def test_field_note_44_a_fresh_source_has_no_ancestors(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    report = warmstart.load(nn.Linear(3, 2), tmp_path / "a.safetensors")
    assert report.lineage["ancestors"] == []
    assert report.lineage == json.loads(json.dumps(report.lineage))


def test_three_generations_of_safetensors_files(tmp_path, state):
    path = tmp_path / "0.safetensors"
    save_file(state, path)
    for generation in (1, 2, 3):
        report = warmstart.load(nn.Linear(3, 2), path)
        path = tmp_path / f"{generation}.safetensors"
        save_file(state, path, as_metadata(report.lineage))
    first = ancestors(path)
    seen = []
    while first:
        (one,) = first
        assert one["of_source"] == 0
        seen.append(Path(one["sources"][0]["location"]).name)
        first = one["ancestors"]
    assert seen == ["2.safetensors", "1.safetensors", "0.safetensors"]


def test_with_several_sources_each_ancestor_says_whose_it_is(tmp_path, state):
    save_file({"a.weight": state["weight"]}, tmp_path / "plain.safetensors")
    save_file({"a.bias": state["bias"]}, tmp_path / "child.safetensors", as_metadata(record()))
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    sources = [
        warmstart.Pretrained(tmp_path / f"{n}.safetensors", include=p)
        for n, p in (("plain", "a.weight"), ("child", "a.bias"))
    ]
    (ancestor,) = warmstart.load(model, sources).lineage["ancestors"]
    assert ancestor == {"of_source": 1, **record()}


def test_the_states_of_callbacks_in_a_lightning_checkpoint(tmp_path, state):
    callbacks = {
        "WarmStart{'into': 'a'}": {"format": 1, "lineage": record("a.pt"), "frozen": []},
        "WarmStart{'into': 'b'}": {"format": 1, "lineage": record("b.pt")},
        "ModelCheckpoint{'monitor': None}": {"best_model_path": "x"},
        "WarmStart{'into': 'c'}": {"format": 1, "lineage": None},
    }
    torch.save({"state_dict": state, "callbacks": callbacks, "epoch": 3}, tmp_path / "run.ckpt")
    assert ancestors(tmp_path / "run.ckpt") == [{"of_source": 0, **record("a.pt")}, {"of_source": 0, **record("b.pt")}]


def test_a_real_lightning_run_from_a_run(tmp_path, state):
    lightning = pytest.importorskip("lightning.pytorch")
    from warmstart_lightning import WarmStart

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

    torch.save({f"layer.{k}": v for k, v in state.items()}, tmp_path / "first.pt")
    callback = WarmStart(tmp_path / "first.pt", log=False)
    callback._life.apply(module := Module())
    saved = {"state_dict": module.state_dict(), "callbacks": {callback.state_key: callback.state_dict()}}
    torch.save(saved, tmp_path / "run.ckpt")
    second = WarmStart(tmp_path / "run.ckpt", log=False)
    second._life.apply(Module())
    lineage = second.state_dict()["lineage"]
    assert lineage["sources"][0]["location"] == str(tmp_path / "run.ckpt")
    assert lineage["ancestors"][0]["sources"][0]["location"] == str(tmp_path / "first.pt")


@pytest.mark.parametrize(("name", "content"), [
    ("warmstart.json", {"lineage": record(), "plan": {}}),
    ("trainer_state.json", {"stateful_callbacks": {"WarmStartCallback": {"args": {}, "attributes": {"lineage": record()}}}}),
    ("trainer_state.json", {"stateful_callbacks": {"WarmStartCallback": [{"attributes": {"lineage": record()}}]}}),
])  # fmt: skip
@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_json_in_the_folder_of_a_transformers_checkpoint(tmp_path, state, name, content, source):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(content))
    assert ancestors(tmp_path / source) == [{"of_source": 0, **record()}]


def test_json_beside_a_file_that_is_no_checkpoint_s_own_folder_is_another_s(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "warmstart.json").write_text(json.dumps({"lineage": record()}))
    assert ancestors(tmp_path / "model.safetensors") == []


def test_what_the_file_itself_says_stands_over_what_lies_beside_it(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors", as_metadata(record("inside")))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "warmstart.json").write_text(json.dumps({"lineage": record("beside")}))
    assert ancestors(tmp_path)[0]["sources"][0]["location"] == "inside"


def test_uris_stay_without_user_names_tokens_and_queries(tmp_path, state):
    secret = "https://user:token@host.org/a/model.pt?X-Amz-Signature=secret#part"
    save_file(state, tmp_path / "a.safetensors", as_metadata(record(secret, ancestors=[record(secret)], note=[secret])))
    (ancestor,) = ancestors(tmp_path / "a.safetensors")
    assert ancestor["sources"][0]["location"] == "https://host.org/a/model.pt"
    assert not any(word in json.dumps(ancestor) for word in ("user", "token", "secret"))


@pytest.mark.parametrize(("text", "why"), [
    ("{", "is not valid JSON"),
    ('{"a": 1, "a": 2}', "is not valid JSON"),
    ('{"sources": [' + "[" * 500 + "]" * 500 + "]}", "nested too deeply"),
    ("[" * 100_000, "is not valid JSON"),
])  # fmt: skip
def test_a_lineage_that_cannot_be_read_is_said_so_and_the_weights_are_taken(tmp_path, state, text, why):
    save_file(state, tmp_path / "a.safetensors", {METADATA_KEY: text})
    (ancestor,) = ancestors(tmp_path / "a.safetensors")
    assert why in ancestor["unreadable"]


@pytest.mark.parametrize("text", ["3", "null", '"text"', "{}", '{"sources": 3}', "[]"])
def test_what_is_no_lineage_is_none(tmp_path, state, text):
    save_file(state, tmp_path / "a.safetensors", {METADATA_KEY: text})
    assert ancestors(tmp_path / "a.safetensors") == []


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_not_executed_and_its_objects_are_left_out(tmp_path, state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop: dict = {"lineage": record(evil=Evil(), tensor=torch.ones(2), number=float("nan"))}
    loop["callbacks"] = loop
    torch.save({"state_dict": state, "callbacks": {"WarmStart": loop}}, tmp_path / "evil.ckpt")
    (ancestor,) = ancestors(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()
    assert ancestor["evil"] is None
    assert ancestor["tensor"] is None
    assert ancestor["number"] == "nan"
    json.dumps(ancestor, allow_nan=False)


def test_a_pickle_that_holds_itself_ends(tmp_path, state):
    loop: dict = {"a": []}
    loop["a"].append(loop)
    torch.save({"state_dict": state, "callbacks": {"lineage": 1, "x": loop}}, tmp_path / "loop.ckpt")
    (ancestor,) = ancestors(tmp_path / "loop.ckpt")
    assert "nested too deeply" in ancestor["unreadable"]


def _circle() -> list[object]:
    circle: list[object] = []
    circle.append(circle)
    return circle


def _chain() -> list[object]:
    chain: list[object] = []
    for _ in range(150):
        chain = [chain]
    return chain


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("other", [_circle(), _chain(), [[] for _ in range(100_001)]])
def test_callbacks_without_a_lineage_leave_the_word_to_what_lies_beside(tmp_path, state, other, trust):
    torch.save({"state_dict": state, "callbacks": {"other": other}}, tmp_path / "a.ckpt")
    assert ancestors(tmp_path / "a.ckpt", trust_pickle=trust) == []
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "warmstart.json").write_text(json.dumps({"lineage": record("beside")}))
    (ancestor,) = ancestors(tmp_path / "a.ckpt", trust_pickle=trust)
    assert ancestor["sources"][0]["location"] == "beside"


def test_a_container_that_is_held_many_times_is_searched_once(tmp_path, state):
    many = [*range(300_000), []]
    callbacks = {"other": [many] * 20_000, "WarmStart": {"lineage": record("a.pt")}}
    torch.save({"state_dict": state, "callbacks": callbacks}, tmp_path / "a.ckpt")
    started = time.monotonic()
    (ancestor,) = ancestors(tmp_path / "a.ckpt")
    assert ancestor["sources"][0]["location"] == "a.pt"
    assert time.monotonic() - started < 30  # minutes, if each time


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_lineage_of_a_torch_file_is_known_once_it_is_open(tmp_path, state, trust, legacy):
    path = tmp_path / "run.ckpt"
    saved = {"state_dict": state, "callbacks": {"WarmStart": {"lineage": record("a.pt")}}}
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = warmstart.open_checkpoint(path, trust_pickle=trust)
    path.unlink()
    assert recorded(checkpoint) == [record("a.pt")]


def test_an_average_has_the_lineages_of_all_its_checkpoints(tmp_path, state):
    for name in "ab":
        saved = {"state_dict": state, "callbacks": {"WarmStart": {"lineage": record(f"{name}.pt")}}}
        torch.save(saved, tmp_path / f"{name}.ckpt")
    averaged = warmstart.average([tmp_path / "a.ckpt", tmp_path / "b.ckpt"])
    assert ancestors(averaged) == [{"of_source": 0, **record("a.pt")}, {"of_source": 0, **record("b.pt")}]


def test_sources_in_memory_have_no_lineage(state):
    assert recorded(warmstart.open_checkpoint(state)) == []


def test_a_report_as_json_gives_its_lineage(tmp_path, state):
    report = warmstart.load(nn.Linear(3, 2), state)
    path = report.to_json(tmp_path / "report.json")
    assert recorded_in_json(path) == [report.lineage]


def test_the_lineage_of_a_copy_has_the_same_keys(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    rules = warmstart.Pretrained(tmp_path / "a.safetensors", rename={"weight": "w"})
    copy = lineage_of_copy(rules, warmstart.open_checkpoint(rules.source), 2, "1.0")
    loaded = warmstart.load(nn.Linear(3, 2), tmp_path / "a.safetensors").lineage
    assert copy.keys() == loaded.keys()
    assert copy["sources"][0]["rules"] == {"rename": {"weight": "w"}}
    assert copy["sources"][0]["header_sha256"] == loaded["sources"][0]["header_sha256"]
    assert load_file(tmp_path / "a.safetensors").keys() == state.keys()
    pickle.dumps(copy)
