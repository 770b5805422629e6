"""`warmstart inspect`: what a checkpoint holds, without reading a tensor."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

import warmstart


def test_tensors_sizes_dtypes_and_groups(run, source):
    ran = run("inspect", source)
    assert ran.code == 0
    assert ran.out.splitlines() == [
        str(source),
        "  safetensors: 18 tensors (18 float32), 2,448 elements, 9,792 bytes",
        "  encoder.layer.{0-2}.{k,q,v}.bias    (16,) float32  x9",
        "  encoder.layer.{0-2}.{k,q,v}.weight  (16, 16) float32  x9",
    ]
    data = run("inspect", source, "--json").data
    assert data["elements"] == 2448
    assert data["tensors"][0] == {"key": "encoder.layer.0.k.bias", "shape": [16], "dtype": "float32", "bytes": 64}
    assert data["header_sha256"] == warmstart.open_checkpoint(source).header_digest()
    assert data["sha256"] is data["nonfinite"] is None
    digest = run("inspect", source, "--digest", "--json").data["sha256"]
    assert digest == warmstart.open_checkpoint(source).sha256()


def test_several_trees_are_listed_with_the_option_that_takes_each(run, tmp_path, state):
    torch.save({"model": state, "model_ema": {"x": torch.ones(2, 2)}, "epoch": 3}, tmp_path / "two.pt")
    ran = run("inspect", "two.pt")
    assert ran.code == 0
    assert '--checkpoint_key "model"  18 tensors, 2,448 elements' in ran.out
    assert '--checkpoint_key "model_ema"  1 tensors, 4 elements' in ran.out
    data = run("inspect", "two.pt", "--json").data
    assert [tree["checkpoint_key"] for tree in data["trees"]] == ["model", "model_ema"]
    assert len(data["tensors"]) == 19
    one = run("inspect", "two.pt", "--checkpoint_key", "model_ema", "--json").data
    assert one["trees"] == []
    assert one["checkpoint_key"] == "model_ema"


def test_wrappers_are_seen(run, tmp_path):
    torch.save({"module._orig_mod.a": torch.ones(2, 2), "module._orig_mod.b": torch.ones(2)}, tmp_path / "wrapped.pt")
    assert run("inspect", "wrapped.pt", "--json").data["wrappers"] == ["_orig_mod", "module"]
    assert "wrapper segments in the names: _orig_mod, module" in run("inspect", "wrapped.pt").out


def test_nan_and_infinities_on_request(run, tmp_path):
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    save_file(
        {
            "bad": values,
            "half": values.half(),
            "eight": values.to(torch.float8_e5m2),
            "fine": torch.ones(3),
            "whole": torch.ones(2, dtype=torch.int64),
        },
        tmp_path / "x.safetensors",
    )
    data = run("inspect", "x.safetensors", "--nonfinite", "--json").data
    assert data["nonfinite"] == {
        "bad": {"nan": 1, "inf": 2},
        "half": {"nan": 1, "inf": 2},
        "eight": {"nan": 1, "inf": 2},
    }
    assert "bad  1 NaN, 2 inf" in run("inspect", "x.safetensors", "--nonfinite").out


def test_ten_thousand_names_are_few_lines_and_all_on_request(run, tmp_path):
    tensors = {f"{'abcdefghij'[i % 10]}{i}.x": torch.ones(1 + i % 100) for i in range(2000)}
    torch.save(tensors, tmp_path / "many.pt")
    assert len(run("inspect", "many.pt").out.splitlines()) <= 42
    everything = run("inspect", "many.pt", "--rows", "0").out
    assert all(f"{'abcdefghij'[i % 10]}{i}" in everything for i in range(2000))


def test_it_says_that_a_file_carries_its_lineage(run, source):
    assert run("convert", source, "out.safetensors").code == 0
    assert "it carries its lineage" in run("inspect", "out.safetensors").out
    assert len(run("inspect", "out.safetensors", "--json").data["lineages"]) == 1
