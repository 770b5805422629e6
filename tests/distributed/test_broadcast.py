"""One rank reads for the others: the values are those of a load on every rank, and so are the errors."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import save_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SCRIPT = Path(__file__).with_name("broadcast_ranks.py")
WORLD = 3


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    blocks = {
        f"blocks.{i}.{leaf}": torch.randn(shape)
        for i in range(2)
        for leaf, shape in (("qkv.weight", (18, 6)), ("out.weight", (7, 6)), ("out.bias", (7,)))
    }
    return blocks | {"head.weight": torch.randn(2, 7).bfloat16(), "head.bias": torch.randn(2), "steps": torch.tensor(9)}


@pytest.fixture(scope="module")
def table(good, tmp_path_factory):
    """By cell, what each rank saw; one launch for all of them."""
    folder = tmp_path_factory.mktemp("broadcast")
    save_file(good, folder / "good.safetensors")
    torch.save(good, folder / "good.pt")
    told = {"WarmStart": {"lineage": {"sources": [{"location": "first.pt"}]}}}
    torch.save({"state_dict": good, "callbacks": told}, folder / "run.ckpt")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-8])
    forked.run_well(SCRIPT, WORLD, folder, folder)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


ALONE = -1
LOADED = {  # how often each rank reads the file; ALONE: for itself, comparing what lies there plainly as it goes
    "file_on_the_first_rank_only": [2, 0, 0],
    "file_on_the_last_rank_only": [0, 0, 2],
    "file_on_one_node_only": [2, 0, 0],
    "a_reader_on_each_node": [ALONE, 2, 0],
    "fully_sharded": [2, 0, 0],
    "fully_sharded_on_meta": [2, 0, 0],
    "torch_file": [0, 2, 0],
    "a_plan_that_every_rank_made": [2, 0, 0],
}


@pytest.mark.parametrize("name", LOADED)
def test_every_rank_holds_what_one_reads(table, good, name):
    """field_note_25, field_note_26."""
    expected = {key: value.float().tolist() for key, value in good.items() if "qkv" not in key} | {"steps": 9}
    for i in range(2):
        for part, value in zip("qkv", good[f"blocks.{i}.qkv.weight"].split(6), strict=True):
            expected[f"blocks.{i}.{part}.weight"] = value.tolist()
    size = sum(value.nbytes for value in good.values())
    twice = sum(value.nbytes for key, value in good.items() if "qkv" in key or value.dtype == torch.bfloat16)
    for rank, seen in enumerate(table[name]):
        assert seen["values"] == expected
        assert seen["status"] == "applied"
        times = LOADED[name][rank]
        assert seen["read"] == (twice + size if times == ALONE else times * size)
        assert seen.get("meta", []) == []


def test_every_rank_knows_what_the_file_says_of_its_past(table):
    assert table["a_run_s_checkpoint"] == [[[{"location": "first.pt"}]]] * WORLD


REFUSED = {
    "nobody_has_it": ("CheckpointError", "", "good.safetensors"),
    "reader_cannot_open_it": ("CheckpointError", "on rank 0 of 3: ", 'read for itself: read="local"'),
    "planning_fails": ("MappingError", "", "'nothing'"),
    "in_memory": ("MappingError", "on rank 0 of 3: ", "this is in memory"),
    "no_such_mode": ("MappingError", "read='scatter'", "'local' or 'broadcast'"),
    "other_modes": ("TimingError", "ranks 0, 2 at 'load: who reads', rank 1 at 'load'", "same calls"),
    "local_without_a_file": ("CheckpointError", "on ranks 1, 2 of 3: ", 'read="broadcast"'),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_is_the_same_on_all_and_suggests_the_other_mode(table, name):
    kind, start, part = REFUSED[name]
    for seen in table[name]:
        assert seen["type"] == kind, seen
        assert start in seen["message"]
        assert part in seen["message"]
        assert seen["message"] == table[name][0]["message"]
        assert seen["untouched"]


@pytest.mark.parametrize(("name", "rank"), [("reader_fails_midway", 0), ("receiver_fails_midway", 2)])
def test_a_rank_that_fails_midway_takes_the_others_along(table, name, rank):
    for seen in table[name]:
        assert seen["type"] == "CheckpointError", seen
        assert seen["message"].startswith(f"on rank {rank} of 3: [Errno 5] Input/output error")
        assert "the model is half loaded" in seen["message"]
        assert seen["message"] == table[name][0]["message"]
        assert seen["written"]
