"""What several processes do when one of them is not like the others: real ones, each on a file of its own."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import save_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SCRIPT = Path(__file__).with_name("agreement_ranks.py")
WORLD = 4


def write_files(folder: Path) -> None:
    good = {
        f"{m}.{leaf}": torch.randn(4, 4) if leaf == "weight" else torch.randn(4)
        for m in "abc"
        for leaf in ("weight", "bias")
    }
    save_file(good, folder / "good.safetensors")
    save_file(good | {"b.weight": good["b.weight"] + 1}, folder / "stale.safetensors")
    wide = {name: torch.randn([5] * value.dim()) for name, value in good.items()}
    save_file(wide, folder / "wide.safetensors")
    # safetensors sorts by dtype and name: another dtype that the model takes just as well moves the offsets
    save_file(good | {"c.bias": good["c.bias"].double()}, folder / "reordered.safetensors")
    (folder / "sharded").mkdir()
    index = {}
    for number, modules in ((1, "ab"), (2, "c")):
        shard = f"model-0000{number}-of-00002.safetensors"
        part = {name: value for name, value in good.items() if name[0] in modules}
        save_file(part, folder / "sharded" / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    torch.manual_seed(0)
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def table(folder):
    """By cell, what each rank saw; one launch for all of them."""
    forked.run_well(SCRIPT, WORLD, folder, "table", folder)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def test_ranks_that_agree_load(table):
    for seen in table["healthy"]:
        assert seen == {"loaded": True, "status": ["applied", "applied"], "frozen": True}


REFUSED = {
    "file_missing_on_one": ("CheckpointError", "on rank 1 of 4: ", "node-1/file_missing_on_one.safetensors"),
    "stale_copy_on_one": ("CheckpointError", "nothing was written: ranks 0, 1, 3 and rank 2 read", "b.weight"),
    "other_header_on_one": ("CheckpointError", "ranks 0-2 and rank 3 opened other checkpoints", "float32 at byte"),
    "stale_state_dict_on_one": ("CheckpointError", "ranks 0, 1, 3 and rank 2 read other values", "b.bias"),
    "plan_differs": ("MappingError", "ranks 0, 2, 3 and rank 1 planned otherwise", "from a.bias as float32 (4,) | excluded"),
    "model_differs": ("MappingError", "ranks 0-2 and rank 3 have other models", "extra  None | (2,) float32"),
    "call_differs": ("MappingError", "ranks 1-3 and rank 0 called with other arguments", "verify  full | off"),
    "planning_fails_on_one": ("MappingError", "on rank 2 of 4: ", "nothing"),
    "source_cannot_be_opened_anywhere": ("CheckpointError", "", "nowhere.safetensors"),
    "wrong_call_on_one": ("WarmStartError", "on rank 1 of 4: TypeError: ", "int"),
    "wrong_call_everywhere": ("TypeError", "the model comes first", "load(model, source)"),
    "file_changes_after_planning": ("CheckpointError", "on rank 1 of 4: ", "written to after it was opened"),
    "nonsense_timeout": ("MappingError", "WARMSTART_TIMEOUT='soon'", "WARMSTART_TIMEOUT=1200"),
    "another_step_on_one": ("TimingError", "ranks 0-2 at 'load', rank 3 at 'validation'", "the same calls in the same order"),
    "host_whose_file_is_gone_on_one": ("CheckpointError", "on rank 1 of 4: ", "host_whose_file_is_gone_on_one.safetensors"),
    "host_whose_file_is_gone_everywhere": ("CheckpointError", "", "nowhere.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_finds_is_the_same_error_on_all_and_nothing_is_written(table, name):
    """field_note_24, field_note_38, field_note_39."""
    kind, start, part = REFUSED[name]
    for seen in table[name]:
        assert seen["type"] == kind, seen
        assert start in seen["message"]
        assert part in seen["message"]
        assert seen["message"] == table[name][0]["message"]
        assert seen["untouched"]
        assert seen["written"] == []


def test_a_call_on_some_ranks_only_is_given_up_and_a_later_one_on_all_loads(table):
    for rank, seen in enumerate(table["called_on_rank_0_only"]):
        late = "rank 0" if rank else "ranks 1-3"
        assert len(seen["tried"]) == (1 if rank else 2)
        for each in seen["tried"]:
            assert each["type"] == "TimingError"
            assert f"{late} of 4 did not come to 'load' within" in each["message"]
            assert "not under `if rank == 0:`" in each["message"]
            assert each["untouched"]
        assert seen["loaded"]


MIDWAY = {
    "rank_raises_midway": "midway",
    "disk_error_on_one_shard": "model-00002-of-00002.safetensors: had",
}


@pytest.mark.parametrize(("name", "words"), MIDWAY.items())
def test_a_fault_midway_fails_the_run_on_all(table, name, words):
    for seen in table[name]:
        assert seen["type"] == "CheckpointError", seen
        assert seen["message"].startswith("on rank 1 of 4: ")
        assert words in seen["message"]
        assert "the model is half loaded" in seen["message"]
        assert seen["message"] == table[name][0]["message"]
        assert seen["written"] == []  # small entries wait for one another; other ranks may have written theirs
        assert seen["status"] == "failed"


def test_what_a_host_finds_on_one_is_raised_on_all(table):
    for seen in table["host_finds_corruption_on_one"]:
        assert seen["type"] == "VerificationError"
        assert seen["message"].startswith("on rank 1 of 4: 1 loaded tensors do not hold")
        assert seen["message"] == table["host_finds_corruption_on_one"][0]["message"]


@pytest.mark.parametrize("name", ["slow_planning_is_waited_for", "slow_writing_is_waited_for"])
def test_a_rank_at_work_is_waited_for(table, name):
    for seen in table[name]:
        assert seen["type"] is None, seen
        assert seen["loaded"]


def test_groups_load_their_own_models_side_by_side(table):
    for rank, seen in enumerate(table["two_groups_side_by_side"]):
        assert seen["loaded"]
        assert seen["foreign"]["type"] == "TimingError"
        assert f"rank {rank} is not in the process group" in seen["foreign"]["message"]


def test_a_group_that_fails_leaves_the_others_alone(table):
    zero, one, two, three = table["one_group_fails_alone"]
    assert zero["type"] is one["type"] is None
    assert two["message"] == three["message"]
    assert two["message"].startswith("on rank 3 of 4: ")


KILLED = {
    "killed_midway": (1, "rank 1 of 2 (process"),
    "killed_before_it_comes": (1, "rank 1 of 2 (process"),
    "killed_before_anything": (1, "rank 1 of 2 did not come to 'load' within"),
    "keeper_of_the_store_killed": (0, "the process that held it, mostly rank 0"),
}


@pytest.mark.parametrize("name", KILLED)
def test_when_a_rank_is_killed_the_other_ends_and_names_it(tmp_path, name):
    dead, words = KILLED[name]
    write_files(tmp_path)
    codes, logs = forked.run(SCRIPT, 2, tmp_path, name, tmp_path, timeout=120)
    assert codes[dead] == -9
    assert codes[1 - dead] > 0
    assert words in logs[1 - dead]


def test_a_rank_that_goes_on_without_the_load_ends_too(tmp_path):
    write_files(tmp_path)
    codes, logs = forked.run(SCRIPT, 2, tmp_path, "other_rank_goes_on_without", tmp_path, timeout=120)
    assert codes[0] > 0
    assert codes[1] > 0
    assert "TimingError: rank 1 of 2 did not come to 'load'" in logs[0]
