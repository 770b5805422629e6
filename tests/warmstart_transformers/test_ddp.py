"""Two real processes under DistributedDataParallel, as torchrun starts them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BEFORE_5

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in each run; one launch for all, since a launch costs seconds."""
    import tiny
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("ddp")
    torch.manual_seed(7)
    save_file(BertModel(tiny.bert_config()).state_dict(), folder / "bert.safetensors")
    encoder = tiny.Plain().encoder
    encoder(torch.randn(64, 4) * 3)
    torch.save(encoder.state_dict(), folder / "encoder.pt")
    shutil.copy(folder / "bert.safetensors", folder / "only-0.safetensors")
    shutil.copy(folder / "bert.safetensors", folder / "other-0.safetensors")
    save_file({"x": torch.ones(1)}, folder / "other-1.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(FOLDER / "ddp_script.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return seen, {name: value.tolist() for name, value in load_file(folder / "bert.safetensors").items()}


pytestmark = pytest.mark.slow


def base(values: dict[str, object]) -> dict[str, object]:
    return {name.removeprefix("bert."): value for name, value in values.items() if name.startswith("bert.")}


def test_all_ranks_start_from_the_pretrained_values(ranks):
    (zero, one), source = ranks
    assert zero["frozen"]["wrapped"] == one["frozen"]["wrapped"] == "DistributedDataParallel"
    assert base(zero["frozen"]["start"]) == source
    assert zero["frozen"]["start"] == one["frozen"]["start"]
    assert zero["frozen"]["status"] == one["frozen"]["status"] == "applied"


def test_frozen_parts_stay_and_the_others_train_alike(ranks):
    (zero, one), source = ranks
    end = base(zero["frozen"]["end"])
    assert zero["frozen"]["end"] == one["frozen"]["end"]
    assert all(end[name] == source[name] for name in source if name.startswith("encoder."))
    assert end["pooler.dense.weight"] != source["pooler.dense.weight"]


@pytest.mark.skipif(BEFORE_5, reason="releases before 5 restore no optimizer to several CPUs: torch knows no 'cpu:0'")
def test_a_resumed_run_keeps_its_own_on_all_ranks(ranks):
    (zero, one), _ = ranks
    assert zero["resumed"]["start"] == one["resumed"]["start"] == zero["frozen"]["end"]
    assert zero["resumed"]["status"] == one["resumed"]["status"] == "superseded-by-resume"


def test_what_is_released_under_ddp_trains_alike(ranks):
    (zero, one), source = ranks
    end = base(zero["unfrozen"]["end"])
    assert zero["unfrozen"]["end"] == one["unfrozen"]["end"]
    assert "bert.encoder.layer.1.output.dense.weight" in zero["unfrozen"]["trainable"]
    assert end["encoder.layer.1.output.dense.weight"] != source["encoder.layer.1.output.dense.weight"]
    assert end["encoder.layer.0.output.dense.weight"] == source["encoder.layer.0.output.dense.weight"]


def test_ddp_must_bear_what_is_released_later(ranks):
    for seen in ranks[0]:
        assert seen["cannot bear unused"]["error"] == "TimingError"
        assert "find_unused_parameters=True" in seen["cannot bear unused"]["message"]


def test_what_is_corrupted_on_rank_1_alone_is_named_on_both(ranks):
    for seen in ranks[0]:
        assert seen["corrupted"]["error"] == "VerificationError"
        assert seen["corrupted"]["message"].startswith("on rank 1 of 2: 1 loaded tensors do not hold")
        assert seen["corrupted"]["tensors"] == ["bert.pooler.dense.weight"]


def test_what_drifts_on_rank_1_alone_is_named_on_both(ranks):
    for seen in ranks[0]:
        assert seen["drifted"]["error"] == "FrozenChangedError"
        assert seen["drifted"]["message"].startswith("on rank 1 of 2")
        assert seen["drifted"]["tensors"] == ["encoder.1.running_mean"]


def test_a_file_that_one_rank_has_is_enough_if_it_reads_for_the_others(ranks):
    seen, source = ranks
    for each in seen:
        assert each["rank 0 reads for rank 1"]["status"] == "applied"
        assert base(each["rank 0 reads for rank 1"]["start"]) == source
        assert each["rank 0 reads for rank 1"]["end"] == seen[0]["frozen"]["end"]


def test_a_file_that_one_rank_lacks_is_an_error_on_both(ranks):
    for seen in ranks[0]:
        assert seen["rank 1 has no file"]["error"] == "CheckpointError"
        assert "only-1.safetensors" in seen["rank 1 has no file"]["message"]
        assert seen["rank 1 has another file"]["error"] == "MappingError"
        assert seen["rank 1 has another file"]["message"].startswith("on rank 1 of 2")
