"""Two real processes whose Trainer trains by DeepSpeed, ZeRO-3 and 2, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in each run, and the pretrained values; one launch for all, since a launch costs seconds."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    import tiny
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("deepspeed")
    torch.manual_seed(7)
    save_file(BertModel(tiny.bert_config()).state_dict(), folder / "bert.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    set_to = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    done = subprocess.run(
        [*command, str(FOLDER / "deepspeed_script.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, **set_to, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return seen, load_file(folder / "bert.safetensors")


def base(values: dict[str, object]) -> dict[str, object]:
    return {name.removeprefix("bert."): value for name, value in values.items() if name.startswith("bert.")}


@pytest.mark.parametrize("run", ["plain 3", "plain 2", "frozen 3", "frozen 2", "partitioned", "bf16"])
def test_field_note_8_training_starts_from_the_pretrained_values_and_goes_on_from_there(ranks, run):
    seen, source = ranks
    for rank in seen:
        assert "error" not in rank[run], rank[run]["trace"]
        assert rank[run]["made"] == [run == "partitioned"]
        assert rank[run]["kind"] == ("DeepSpeedZeroOptimizer" if run.endswith("2") else "DeepSpeedZeroOptimizer_Stage3")
        assert rank[run]["status"] == "applied"
        start, end = base(rank[run]["start"]), base(rank[run]["end"])
        for name, value in source.items():
            assert start[name] == (value.bfloat16().float() if run == "bf16" else value).tolist(), name
            assert (torch.tensor(end[name]) - value).abs().max() < 0.1, name
        assert end["pooler.dense.weight"] != start["pooler.dense.weight"]
        assert rank[run]["end"] == seen[0][run]["end"]


@pytest.mark.parametrize("run", ["frozen 3", "frozen 2", "partitioned"])
def test_field_note_21_what_is_frozen_stays_and_is_held(ranks, run):
    seen, source = ranks
    for rank in seen:
        end = base(rank[run]["end"])
        assert all(end[name] == value.tolist() for name, value in source.items() if name.startswith("encoder."))
        assert "bert.encoder.layer.1.output" in rank[run]["eval"]


@pytest.mark.parametrize("run", ["resumed 3", "resumed 2", "resumed without 3", "resumed without 2"])
def test_a_resumed_run_keeps_its_own_also_without_the_file(ranks, run):
    for rank in ranks[0]:
        assert "error" not in rank[run], rank[run]["trace"]
        assert rank[run]["start"] == rank[f"frozen {run[-1]}"]["end"]
        if "without" in run:
            assert rank[run]["status"] is None
        else:
            assert rank[run]["status"] == "superseded-by-resume"


@pytest.mark.parametrize("run", ["another freeze 3", "another freeze 2"])
def test_field_note_13_another_freeze_is_our_error_before_deepspeed_s(ranks, run):
    """Attached; without it DeepSpeed's load raises a `KeyError` with the first name."""
    for rank in ranks[0]:
        assert rank[run]["error"] == "FrozenChangedError"
        assert "bert.embeddings" in rank[run]["message"]


@pytest.mark.parametrize("run", ["other values", "other copies"])
def test_what_rank_1_alone_has_otherwise_is_named_on_both(ranks, run):
    for rank in ranks[0]:
        assert rank[run]["error"] == "VerificationError"
        assert rank[run]["message"].startswith("on rank 1 of 2: 1 loaded tensors do not hold")
        assert rank[run]["tensors"] == ["bert.pooler.dense.weight"]
        assert ("the optimizer's fp32 copy" in rank[run]["message"]) == (run == "other copies")


def test_a_schedule_is_refused_in_words(ranks):
    for rank in ranks[0]:
        assert rank["unfreeze"]["error"] == "TimingError"
        assert "freeze for the whole run" in rank["unfreeze"]["message"]
