"""The report: one line first, then few rows, as text, Markdown and JSON; lineage in plain types."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import warmstart
from warmstart.lineage import public


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 3)


def backbone() -> dict[str, torch.Tensor]:
    return {f"backbone.{k}": v + 1 for k, v in nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).state_dict().items()}


def test_field_note_45_the_verdict_comes_first_and_names_what_keeps_its_own_init():
    report = warmstart.load(Net(), backbone(), allow_missing="head", freeze=True)
    line = str(report).splitlines()[0]
    assert line.startswith(
        "warmstart: 7/9 tensors, 71.15 % of elements, verified, 7 frozen, 2 keep their own init (head."
    )
    assert report.verdict() == line


def test_a_share_is_never_rounded_up_to_all():
    big = nn.ModuleDict({"a": nn.Linear(1000, 1000, bias=False), "b": nn.Linear(1, 1, bias=False)})
    report = warmstart.load(big, {"a.weight": torch.zeros(1000, 1000)}, allow_missing="b")
    assert "99.99 % of elements" in report.verdict()


@pytest.mark.parametrize(
    ("verify", "words"), [("full", "verified"), ("sample", "verified by sample"), ("off", "not verified")]
)
def test_the_verdict_says_how_it_was_verified(verify, words):
    assert f", {words} <- " in warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2), verify=verify).verdict()


def test_ten_thousand_tensors_print_at_most_forty_rows():
    layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}) for _ in range(2500))
    report = warmstart.load(layers, dict(layers.state_dict().items()))
    rows = str(report).splitlines()
    assert len(report.assignments) == 10_000
    assert len(rows) <= 41
    assert any("5,000  {0-2499}.{k,q}.weight" in row for row in rows)


def test_gaps_in_the_indices_are_shown():
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(6))
    state = {k: v for k, v in model.state_dict().items() if k[0] != "3"}
    text = str(warmstart.load(model, state, allow_missing="3"))
    assert "5  {0-2,4,5}.weight" in text


def test_metrics_are_flat_numbers_under_one_name():
    metrics = warmstart.load(Net(), backbone(), allow_missing="head").metrics()
    assert all(name.startswith("warmstart/") and isinstance(value, float) for name, value in metrics.items())
    assert metrics["warmstart/loaded_tensors"] == 7
    assert metrics["warmstart/own_init_tensors"] == 2


def test_metrics_and_dict_have_the_keys_that_dashboards_and_scripts_rely_on():
    report = warmstart.load(Net(), backbone(), allow_missing="head")
    names = "coverage loaded_tensors own_init_tensors unused_keys frozen_tensors superseded bytes_read seconds"
    assert list(report.metrics()) == [f"warmstart/{name}" for name in names.split()]
    written = report.to_dict()
    assert list(written) == ["verdict", "status", "verified", "bytes_read", "seconds", "frozen", "lineage", "plan"]
    assert list(written["plan"]) == [
        "model", "parts", "assignments", "missing", "unexpected", "excluded", "ignored", "mismatched", "freeze", "coverage",
        "errors", "notes",
    ]  # fmt: skip


def test_the_json_is_whole_and_says_where_everything_came_from(tmp_path):
    torch.save({"model": backbone()}, tmp_path / "source.pt")
    report = warmstart.load(Net(), tmp_path / "source.pt", allow_missing="head", freeze=True)
    path = report.to_json(tmp_path / "deep" / "report.json")
    written = json.loads(path.read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    source = written["lineage"]["sources"][0]
    assert source["location"] == str(tmp_path / "source.pt")
    assert source["checkpoint_key"] == "model"
    assert source["files"][0]["bytes"] == (tmp_path / "source.pt").stat().st_size
    assert source["rules"] == {"allow_missing": "head", "freeze": True}
    assert written["plan"]["missing"] == ["head.bias", "head.weight"]
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_equal_mappings_have_equal_digests_whatever_the_path_and_order(tmp_path):
    state = backbone()
    torch.save(state, tmp_path / "a.pt")
    torch.save(dict(reversed(state.items())), tmp_path / "b.pt")
    a, b = (warmstart.plan(Net(), tmp_path / f"{n}.pt", allow_missing="head") for n in "ab")
    assert a.digest() == b.digest()
    assert a.digest() != warmstart.plan(Net(), tmp_path / "a.pt", allow_missing="head", freeze=True).digest()


def test_hostile_key_names_stay_harmless_in_text_and_markdown():
    evil = "<script>alert(1)</script>|`x`\x1b[2J\n"
    state = backbone() | {evil: torch.zeros(1), "a" * 1_000_000: torch.zeros(1)}
    report = warmstart.load(Net(), state, allow_missing="head", allow_unexpected="*")
    text, markdown = str(report), report.to_markdown()
    assert "\x1b" not in text + markdown
    assert len(text) < 10_000
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 6 for line in table)
    error = warmstart.plan(Net(), state, allow_missing="head").explain()
    assert "\x1b" not in error
    assert len(error) < 10_000


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://user:secret@host/path/model.safetensors?token=abc#frag", "https://host/path/model.safetensors"),
        ("s3://bucket/key.pt", "s3://bucket/key.pt"),
        ("/home/me/model.pt", "/home/me/model.pt"),
        ("C:\\models\\x.pt", "C:\\models\\x.pt"),
    ],
)
def test_x_29_locations_are_shown_without_secrets(location, shown):
    assert public(location) == shown


def test_print_plan_shows_the_rows_or_the_errors():
    assert "own init" in str(warmstart.plan(Net(), backbone(), allow_missing="head"))
    assert 'allow_missing=["head"]' in str(warmstart.plan(Net(), backbone()))


def test_a_url_s_secrets_are_in_no_text():
    url = "memory://user:hunter2@bucket/model.pt?token=hunter3"
    with pytest.raises(warmstart.WarmStartError) as caught:
        warmstart.load(Net(), url)
    pretrained = warmstart.Pretrained(url, allow_missing="head")
    shown = [str(caught.value), repr(pretrained), pretrained.label, pretrained.short_label]
    assert not any("hunter" in text for text in shown)
