"""`warmstart convert`: rules without a model, every format bit-equal, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import warmstart
from warmstart.tensors import same_bits

FUSE = json.dumps(
    [
        {
            "sources": [f"encoder.layer.{{i}}.{part}.{{leaf}}" for part in "qkv"],
            "targets": "layers.{i}.qkv.{leaf}",
            "ops": [{"concat": {"dim": 0}}],
        }
    ]
)
PART = json.dumps(
    [
        {
            "sources": "layers.{i}.qkv.{leaf}",
            "targets": [f"encoder.layer.{{i}}.{part}.{{leaf}}" for part in "qkv"],
            "ops": [{"split": {"dim": 0}}],
        }
    ]
)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(same_bits(found[key], wanted[key]) for key in wanted)


def read(path) -> dict[str, torch.Tensor]:
    checkpoint = warmstart.open_checkpoint(path)
    return {key: checkpoint.read(key) for key in checkpoint.keys()}


def test_a_fusion_and_its_inverse_give_the_same_bits(run, source, state):
    assert run("convert", source, "fused.safetensors", "--convert", FUSE).code == 0
    fused = load_file("fused.safetensors")
    wanted = torch.cat([state[f"encoder.layer.1.{part}.weight"] for part in "qkv"])
    assert same_bits(fused["layers.1.qkv.weight"], wanted)
    assert len(fused) == 6
    assert run("convert", "fused.safetensors", "back.safetensors", "--convert", PART).code == 0
    assert equal(load_file("back.safetensors"), state)


@pytest.mark.parametrize(("out", "options"), [
    ("out.safetensors", ()),
    ("sharded", ("--format", "sharded", "--max_shard_size", "2KB")),
    ("dcp", ("--format", "dcp")),
])  # fmt: skip
def test_every_format_holds_the_same_bits_and_the_lineage(run, source, state, out, options):
    ran = run("convert", source, out, *options, "--json")
    assert ran.code == 0
    assert ran.data["tensors"] == len(state)
    assert equal(read(out), state)
    (lineage,) = run("lineage", out, "--json").data["lineages"]
    assert lineage["sources"][0]["location"] == str(source)
    assert lineage == ran.data["lineage"]


def test_all_dtypes_survive_and_every_tensor_is_aligned(run, tmp_path):
    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "half": torch.randn(5).half(),
        "brain": torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16),
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "complex": torch.randn(2, dtype=torch.complex64),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "strange \N{GREEK SMALL LETTER ALPHA}\x1b": torch.ones(1),
    }
    torch.save(tensors, tmp_path / "mixed.pt")
    assert run("convert", "mixed.pt", "mixed.safetensors").code == 0
    assert equal(read("mixed.safetensors"), tensors)
    checkpoint = warmstart.open_checkpoint("mixed.safetensors")
    assert all(checkpoint.info(k).offset % checkpoint.info(k).dtype.itemsize == 0 for k in checkpoint.keys())
    with safe_open("mixed.safetensors", "pt") as theirs:
        assert same_bits(theirs.get_tensor("half"), tensors["half"])


def test_shards_are_at_most_as_large_as_asked_and_named_as_in_a_transformers_folder(run, source, state, tmp_path):
    assert run("convert", source, "out", "--format", "sharded", "--max_shard_size", "2KB").code == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / name)
        assert sum(t.nbytes for t in tensors.values()) <= 2000
        with safe_open(tmp_path / "out" / name, "pt") as shard:
            assert shard.metadata()["format"] == "pt"


def test_select_strip_prefix_rename_and_dtype(run, source, state):
    ran = run("convert", source, "out.safetensors", "--select", "encoder.layer.0", "--strip_prefix", "encoder",
              "--rename", '{"q": "query"}', "--dtype", "bfloat16", "--json")  # fmt: skip
    assert ran.code == 0
    assert len(ran.data["left_out"]) == 12
    found = load_file("out.safetensors")
    assert same_bits(found["layer.0.query.bias"], state["encoder.layer.0.q.bias"].bfloat16())
    assert len(found) == 6


def test_a_value_that_overflows_its_new_dtype_is_refused_and_nothing_is_left(run, tmp_path):
    save_file({"a": torch.tensor([1e6])}, tmp_path / "big.safetensors")
    ran = run("convert", "big.safetensors", "out.safetensors", "--dtype", "float16")
    assert ran.code == 1
    assert "'a' holds values beyond the range of float16" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["big.safetensors"]


@pytest.mark.parametrize(("options", "words"), [
    (("--rename", '{"nothing": "x"}'), "matches no checkpoint key"),
    (("--select", "decoder"), "--select decoder matches no checkpoint key"),
    (("--rename", r'{"(q|k)": "x"}'), "would both become 'encoder.layer.0.x.bias'"),
    (("--convert", '[{sources: "encoder.layer.{i}.q.bias", targets: "encoder.layer.{i}.k.bias"}]'),
     "there is a key of that name already"),
    (("--convert", '[{sources: "encoder.layer.{i}.q.bias", targets: ["{i}.a", "{i}.b", "{i}.c"], ops: [{split: {dim: 0}}]}]'),
     "split"),
])  # fmt: skip
def test_rules_that_do_not_work_out_are_refused_before_anything_is_written(run, source, options, words):
    ran = run("convert", source, "out.safetensors", *options)
    assert ran.code == 1
    assert words.lower() in ran.err.lower()
    assert [p.name for p in source.parent.iterdir()] == [source.name]


def test_nothing_is_replaced_unasked(run, source, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"old")
    ran = run("convert", source, "out.safetensors")
    assert ran.code == 3
    assert "is there already; give another name, or --force to replace it" in ran.err
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert run("convert", source, "out.safetensors", "--force").code == 0
    assert len(load_file(tmp_path / "out.safetensors")) == 18


def test_a_source_may_be_replaced_by_what_is_made_of_it(run, source, state):
    assert run("convert", source, source, "--rename", '{"encoder": "e"}', "--force").code == 0
    assert same_bits(load_file(source)["e.layer.0.q.bias"], state["encoder.layer.0.q.bias"])


def test_a_folder_is_replaced_only_if_it_holds_a_checkpoint_and_nothing_else(run, source, tmp_path):
    assert run("convert", source, "out", "--format", "dcp").code == 0
    assert run("convert", source, "out", "--format", "sharded").code == 3
    assert run("convert", source, "out", "--format", "sharded", "--force").code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    ran = run("convert", source, tmp_path, "--format", "dcp", "--force")
    assert ran.code == 3
    assert "holds more than a checkpoint" in ran.err
    assert source.exists()


def test_a_device_is_not_replaced(run, source):
    assert run("convert", source, "/dev/null", "--format", "safetensors", "--force").code == 3


def test_a_source_that_changes_meanwhile_is_refused(run, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.pt")
    (tmp_path / "touching.py").write_text(
        "import os, pathlib\n"
        "def touch(tensors):\n"
        "    if tensors[0].device.type != 'meta':\n"
        "        os.utime('x.pt', (1, 1))\n"
        "    return tensors\n"
    )
    ran = run("convert", "x.pt", "out.safetensors", "--convert",
              "[{sources: a, targets: c, ops: [{apply: {fn: 'touching:touch'}}]}]")  # fmt: skip
    assert ran.code == 3
    assert "was written to after it was opened" in ran.err
    assert not (tmp_path / "out.safetensors").exists()


def test_wrapper_segments_stay_and_the_rule_that_takes_them_out_is_named(run, tmp_path):
    torch.save({"module.a": torch.ones(2)}, tmp_path / "ddp.pt")
    ran = run("convert", "ddp.pt", "out.safetensors")
    assert ran.code == 0
    assert """--rename '{"module": ""}'""" in ran.out
    assert run("convert", "ddp.pt", "clean.safetensors", "--rename", '{"module": ""}').code == 0
    assert list(load_file("clean.safetensors")) == ["a"]
