"""`warmstart lineage`: the tree of a file's ancestors."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart.lineage import METADATA_KEY


def test_the_tree_of_three_generations(run, source):
    assert run("convert", source, "one.safetensors", "--rename", '{"encoder": "e"}').code == 0
    assert run("convert", "one.safetensors", "two", "--format", "dcp").code == 0
    ran = run("lineage", "two")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == "two"
    arrows = [line for line in lines if line.lstrip().startswith("<-")]
    assert [line.split()[-1] for line in arrows] == ["one.safetensors", str(source)]
    assert arrows[1].index("<-") > arrows[0].index("<-")
    assert "rename={'encoder': 'e'}" in ran.out
    (lineage,) = run("lineage", "two", "--json").data["lineages"]
    assert lineage["ancestors"][0]["sources"][0]["location"] == str(source)


def test_a_report_is_read_too(run, tmp_path, source):
    report = warmstart.load(nn.Linear(16, 16), source, select="encoder.layer.0.q", strip_prefix="encoder.layer.0.q")
    report.to_json(tmp_path / "warmstart.json")
    ran = run("lineage", "warmstart.json")
    assert ran.code == 0
    assert "2 tensors into Linear" in ran.out
    assert run("lineage", "warmstart.json", "--json").data["lineages"] == [json.loads(json.dumps(report.lineage))]


def test_a_file_without_lineage_says_so(run, source):
    ran = run("lineage", source)
    assert ran.code == 1
    assert ran.out == f"{source} carries no lineage\n"


def test_a_checkpoint_with_several_trees_needs_no_choice(run, tmp_path, state):
    record = {"sources": [{"location": "x.pt", "rules": {}}], "ancestors": []}
    torch.save({"model": state, "ema": state, "callbacks": {"WarmStart": {"lineage": record}}}, tmp_path / "run.ckpt")
    assert "<- x.pt" in run("lineage", "run.ckpt").out


def test_a_hostile_lineage_is_printed_and_harmless(run, tmp_path):
    evil = {"sources": [3, {"location": ["a\x1b[2J"], "rules": "x", "checkpoint_key": {"a": 1}}], "versions": 3,
            "loaded": [], "ancestors": [4, {"sources": 3}, {"of_source": 0, "sources": [{}]}], "model": "\x1b[0m"}  # fmt: skip
    save_file({"x": torch.ones(1)}, tmp_path / "evil.safetensors", {METADATA_KEY: json.dumps(evil)})
    ran = run("lineage", "evil.safetensors")
    assert ran.code == 0
    assert "\x1b" not in ran.out
