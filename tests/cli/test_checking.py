"""`warmstart check`: started from that, or not, or it cannot be told; by lineage and by values."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart.lineage import as_metadata


def fine_tuned(state: dict[str, torch.Tensor], step: float = 0.1) -> dict[str, torch.Tensor]:
    return {k: v + step * torch.randn_like(v) for k, v in state.items()}


def test_a_fine_tuned_run_without_lineage_is_kin_by_its_values(run, source, state, tmp_path):
    torch.save({"state_dict": {f"model.{k}": v for k, v in fine_tuned(state).items()}}, tmp_path / "run.ckpt")
    data = (ran := run("check", "run.ckpt", source, "--json")).data
    assert ran.code == 0
    assert (data["verdict"], data["by_lineage"], data["by_values"]) == ("yes", "none", "yes")
    assert data["compared"] == 18
    assert data["equal"] == 0
    assert data["correlation"] > 0.9
    assert data["distance"] == pytest.approx(0.1, rel=0.2)
    assert run("check", "run.ckpt", source).out.startswith("yes: run.ckpt <- ")


def test_a_run_from_other_weights_is_not(run, source, state, tmp_path):
    save_file({k: torch.randn_like(v) for k, v in state.items()}, tmp_path / "run.safetensors")
    data = (ran := run("check", "run.safetensors", source, "--json")).data
    assert ran.code == 1
    assert (data["verdict"], data["by_values"]) == ("no", "no")


def test_constant_weights_say_nothing(run, tmp_path):
    save_file({"norm.weight": torch.ones(200), "norm.bias": torch.zeros(200)}, tmp_path / "a.safetensors")
    save_file({"norm.weight": torch.ones(200) * 1.01, "norm.bias": torch.ones(200)}, tmp_path / "b.safetensors")
    ran = run("check", "a.safetensors", "b.safetensors")
    assert ran.code == 1
    assert ran.out.startswith("cannot tell")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"query": nn.Linear(16, 16), "key": nn.Linear(16, 16)})
        self.head = nn.Linear(16, 2)


def test_the_lineage_is_believed_and_its_rules_match_the_names(run, tmp_path):
    pretrained = {f"{part}.{leaf}": torch.randn(16, 16) if leaf == "weight" else torch.randn(16)
                  for part in "qk" for leaf in ("weight", "bias")}  # fmt: skip
    torch.save({"model": pretrained, "ema": pretrained}, tmp_path / "pretrained.pt")
    model = Net()
    rules = {"checkpoint_key": "model", "into": "backbone", "rename": {"q": "query", "k": "key"}}
    report = warmstart.load(model, tmp_path / "pretrained.pt", **rules)
    save_file(fine_tuned(dict(model.state_dict())), tmp_path / "run.safetensors", as_metadata(report.lineage))
    data = (ran := run("check", "run.safetensors", "pretrained.pt", "--json")).data
    assert ran.code == 0
    assert (data["verdict"], data["by_lineage"], data["by_values"], data["compared"]) == ("yes", "source", "yes", 4)
    # a descendant of the descendant
    assert run("convert", "run.safetensors", "later.safetensors").code == 0
    data = run("check", "later.safetensors", "pretrained.pt", "--into", "backbone",
               "--rename", '{"q": "query", "k": "key"}', "--json").data  # fmt: skip
    assert (data["verdict"], data["by_lineage"], data["by_values"]) == ("yes", "ancestor", "yes")


def test_lineage_and_values_that_contradict_each_other_are_told(run, source, state, tmp_path):
    report = warmstart.load(nn.Linear(16, 16), source, select="encoder.layer.0.q", strip_prefix="encoder.layer.0.q")
    save_file(
        {"weight": torch.randn(16, 16), "bias": torch.randn(16)},
        tmp_path / "run.safetensors",
        as_metadata(report.lineage),
    )
    ran = run("check", "run.safetensors", source)
    assert ran.code == 1
    assert ran.out.startswith("cannot tell")
    assert "contradict each other" in ran.out


def test_another_source_than_the_recorded_one(run, source, state, tmp_path):
    report = warmstart.load(nn.Linear(16, 16), source, select="encoder.layer.0.q", strip_prefix="encoder.layer.0.q")
    save_file({"weight": torch.randn(16, 16)}, tmp_path / "wrong.safetensors")
    save_file({"weight": state["encoder.layer.0.q.weight"]}, tmp_path / "run.safetensors", as_metadata(report.lineage))
    data = run("check", "run.safetensors", "wrong.safetensors", "--json").data
    assert (data["verdict"], data["by_lineage"]) == ("no", "other")


def test_recorded_rules_neither_import_nor_trust_anything(run, source, state, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = warmstart.open_checkpoint(source)
    (tmp_path / "evil_rules.py").write_text("import pathlib\npathlib.Path('executed').touch()\ndef f(x): return x\n")
    for op in ("apply", "Apply"):
        convert = [{"sources": "encoder.layer.0.q.bias", "targets": "x", "ops": [{op: {"fn": "evil_rules:f"}}]}]
        rules = {"convert": convert, "trust_pickle": True}
        record = {"sources": [{"header_sha256": checkpoint.header_digest(), "rules": rules}], "ancestors": 3}
        save_file(state, tmp_path / "run.safetensors", as_metadata(record))
        ran = run("check", "run.safetensors", source)
        assert ran.code == 0
        assert not (tmp_path / "executed").exists()


def test_nothing_in_common(run, source, tmp_path):
    save_file({"x": torch.ones(3, 5)}, tmp_path / "run.safetensors")
    ran = run("check", "run.safetensors", source)
    assert ran.code == 1
    assert "no tensor of the one has a counterpart in the other" in ran.out


def test_recorded_rules_that_cannot_be_used_are_told(run, source, state, tmp_path):
    checkpoint = warmstart.open_checkpoint(source)
    record = {"sources": [{"header_sha256": checkpoint.header_digest(), "rules": {"match": "sufix"}}], "ancestors": 3}
    save_file(state, tmp_path / "run.safetensors", as_metadata(record))
    ran = run("check", "run.safetensors", source)
    assert ran.code == 0
    assert "the rules that the lineage records cannot be used" in ran.out
