"""Two real processes whose Trainer shards the model by FSDP, version 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BEFORE_5

FOLDER = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(BEFORE_5, reason="the Trainer of 4.50 prepares model and optimizer apart, which FSDP2 refuses"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in each run, and the pretrained values; one launch for all, since a launch costs seconds."""
    import tiny
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("fsdp")
    torch.manual_seed(7)
    base = BertModel(tiny.bert_config())
    base.save_pretrained(folder / "base")
    save_file(base.state_dict(), folder / "bert.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(FOLDER / "fsdp_script.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return seen, {name: value.tolist() for name, value in load_file(folder / "bert.safetensors").items()}


def base(values: dict[str, object]) -> dict[str, object]:
    return {name.removeprefix("bert."): value for name, value in values.items() if name.startswith("bert.")}


@pytest.mark.parametrize("run", ["plain", "full"])
def test_training_starts_sharded_from_the_pretrained_values(ranks, run):
    seen, source = ranks
    for rank in seen:
        assert rank[run]["sharded"]
        assert base(rank[run]["start"]) == source
        assert rank[run]["status"] == "applied"
        assert base(rank[run]["end"]) != source


def test_field_note_21_what_is_frozen_before_sharding_stays(ranks):
    seen, source = ranks
    for rank in seen:
        end = base(rank["frozen"]["end"])
        assert all(end[name] == value for name, value in source.items() if name.startswith("encoder."))
        assert end["pooler.dense.weight"] != source["pooler.dense.weight"]
        assert not any(name.startswith("bert.encoder") for name in rank["frozen"]["optimized"])
        assert "bert.encoder.layer.1.output" in rank["frozen"]["eval"]


@pytest.mark.parametrize(("run", "before"), [("resumed", "frozen"), ("full resumed", "full")])
def test_a_resumed_run_keeps_its_own(ranks, run, before):
    for rank in ranks[0]:
        assert rank[run]["start"] == rank[before]["end"]
        assert rank[run]["status"] == "superseded-by-resume"


def test_field_note_13_another_freeze_is_torch_s_error_without_attach(ranks):
    """Its optimizer state lacks what the run that saved it had frozen."""
    for rank in ranks[0]:
        assert rank["another freeze"]["error"] == "CheckpointException"


def test_what_is_released_trains(ranks):
    seen, source = ranks
    for rank in seen:
        end = base(rank["unfrozen"]["end"])
        assert end["encoder.layer.1.output.dense.weight"] != source["encoder.layer.1.output.dense.weight"]
        assert end["encoder.layer.0.output.dense.weight"] == source["encoder.layer.0.output.dense.weight"]
    assert seen[0]["unfrozen"]["end"] == seen[1]["unfrozen"]["end"]


def test_a_shard_that_is_corrupted_on_rank_1_alone_is_named_on_both(ranks):
    for rank in ranks[0]:
        assert rank["corrupted"]["error"] == "VerificationError"
        assert rank["corrupted"]["message"].startswith("on rank 1 of 2: 1 loaded tensors do not hold")
        assert rank["corrupted"]["tensors"] == ["bert.pooler.dense.weight"]


def test_a_frozen_shard_that_drifts_on_rank_1_alone_is_named_on_both(ranks):
    for rank in ranks[0]:
        assert rank["drifted"]["error"] == "FrozenChangedError"
        assert rank["drifted"]["message"].startswith("on rank 1 of 2")
        assert rank["drifted"]["tensors"] == ["bert.encoder.layer.0.output.dense.weight"]


def test_field_note_28_rows_of_a_sharded_table_are_held(ranks):
    """The old tokens' rows stay through steps with weight decay, on whichever rank they lie, and the new ones train."""
    seen, source = ranks
    table = "bert.embeddings.word_embeddings.weight"
    old = source["embeddings.word_embeddings.weight"][::-1]
    for rank in seen:
        assert rank["rows"]["sharded"]
        assert rank["rows"]["start"][table][:40] == old
        for run in ("rows", "rows resumed"):
            assert rank[run]["end"][table][:40] == old
            assert table in rank[run]["optimized"]
        assert rank["rows resumed"]["start"][table] == rank["rows"]["end"][table]
        new = [rank[run][at][table][40:] for run, at in (("rows", "start"), ("rows", "end"), ("rows resumed", "end"))]
        assert new[0] != new[1] != new[2]
        assert rank["rows drifted"]["error"] == "FrozenChangedError"
        assert rank["rows drifted"]["message"].startswith("on rank 1 of 2")
        assert rank["rows drifted"]["tensors"] == [table]


def test_field_note_1_a_checkpoint_that_matches_nothing_is_an_error(ranks):
    for rank in ranks[0]:
        assert "error" in rank["full matches nothing"]


def test_field_note_26_placeholders_of_ranks_other_than_the_first_are_refused_before_the_optimizer_mixes_them_up(ranks):
    """transformers fills on all ranks what the file has; what it lacks is on the meta device on all ranks but one."""
    seen = ranks[0]
    assert seen[0]["placeholders"] == []
    assert seen[1]["placeholders"] == ["classifier.bias", "classifier.weight"]
    for rank in seen:
        assert rank["one rank alone"]["error"] == "TimingError"
        assert "on rank 1 of 2: 2 parameters outside the scope" in rank["one rank alone"]["message"]
        assert "cpu_ram_efficient_loading" in rank["one rank alone"]["message"]


def test_version_1_is_refused_in_words(ranks):
    for rank in ranks[0]:
        assert rank["version 1"]["error"] == "TimingError"
        assert 'fsdp_config={"version": 2}' in rank["version 1"]["message"]
