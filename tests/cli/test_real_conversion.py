"""MiniLM under renames and a fusion of q, k and v, and back: bit-equal."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import real_weights
from warmstart.tensors import same_bits

pytestmark = pytest.mark.slow

PARTS = ("query", "key", "value")
APART = [f"encoder.layer.{{i}}.attention.self.{part}.{{leaf}}" for part in PARTS]
TOGETHER = "blocks.{i}.attn.qkv.{leaf}"


def test_minilm_there_and_back(run):
    minilm = real_weights.MINILM.fetch()
    there = {
        "rename": {"embeddings": "embed", "LayerNorm": "norm"},
        "convert": [{"sources": APART, "targets": TOGETHER, "ops": [{"concat": {"dim": 0}}]}],
    }
    back = {
        "rename": {"embed": "embeddings", "norm": "LayerNorm"},
        "convert": [{"sources": TOGETHER, "targets": APART, "ops": [{"split": {"dim": 0}}]}],
    }
    for number, (source, rules) in enumerate([(minilm, there), ("0.safetensors", back)]):
        words = [word for name, rule in rules.items() for word in (f"--{name}", json.dumps(rule))]
        ran = run("convert", source, f"{number}.safetensors", *words)
        assert ran.code == 0, ran.err
    wanted, fused, found = (load_file(path) for path in (minilm, "0.safetensors", "1.safetensors"))
    assert len(fused) == len(wanted) - 6 * 2 * 2
    assert fused["blocks.5.attn.qkv.weight"].shape == (3 * 384, 384)
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[key], wanted[key]) for key in wanted)
    assert run("diff", minilm, "1.safetensors").code == 0
    ran = run("check", "1.safetensors", minilm, "--json")
    assert (ran.data["verdict"], ran.data["by_lineage"]) == ("yes", "ancestor")


def test_minilm_s_own_folder_as_the_model(run):
    pytest.importorskip("transformers")
    minilm = real_weights.MINILM.fetch()
    real_weights.MINILM.fetch("config.json")
    data = run("plan", minilm, "--model", minilm.parent, "--json").data
    assert data["fits"]
    assert data["coverage"] == 1
    assert data["model"] == "BertModel"
