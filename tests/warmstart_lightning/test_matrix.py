"""{layers in three places} x {one device, DDP, FSDP2, tensor parallel} x {fit, resume, last, validate then fit, second fit}.

One launch of real processes for each number of them runs all cells of its strategies.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("matrix_script.py")
SHARDED = ("fsdp2", "tp")
PLACES = ("init", "setup", "configure_model")
WORLDS = {1: ["single"], 2: ["ddp", "fsdp2", "tp"]}
LIMIT = 480  # seconds
CELLS = ("fit", "second fit", "resume", "last", "validate then fit")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs the cells of all strategies of one number of processes, once: their folder, and what the source holds."""

    @functools.cache
    def launch(world: int) -> tuple[Path, dict[str, torch.Tensor]]:
        arguments = [",".join(WORLDS[world]), str(folder := tmp_path_factory.mktemp("matrix")), str(LIMIT)]
        spec = importlib.util.spec_from_file_location("matrix_script", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
            spec.loader.exec_module(script)
        torch.manual_seed(7)
        encoder = script.Encoder()
        encoder(torch.randn(64, 4) * 3 + 1)  # statistics that no fresh BatchNorm has
        torch.save(encoder.state_dict(), folder / "source.pt")
        command = [sys.executable, str(SCRIPT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT + 20, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        return folder, encoder.state_dict()

    return launch


@pytest.fixture(scope="module", params=[name for names in WORLDS.values() for name in names])
def ran(request, launched):
    """The strategy, what the source holds, and what each rank saw."""
    strategy = request.param
    world = next(world for world, names in WORLDS.items() if strategy in names)
    folder, source = launched(world)
    ranks = [json.loads((folder / strategy / f"rank-{rank}.json").read_text()) for rank in range(world)]
    held = {k: v.tolist() for k, v in source.items() if strategy != "tp" or not k.startswith("norm")}
    return strategy, held, ranks


def parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Without statistics: of those a checkpoint has rank 0's, and each rank its own before."""
    return {k: v for k, v in values.items() if "running" not in k and "tracked" not in k}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("place", PLACES)
def test_field_note_3_the_matrix(ran, place, cell):
    strategy, source, ranks = ran
    if strategy == "tp" and place != "configure_model":
        pytest.skip("parallelize_module is asked for in configure_model alone")
    for rank in ranks:
        cells = rank[place]
        seen, before = cells[cell], cells["fit"]
        assert seen["meta"] == 0  # nothing is left for Lightning to initialise
        if cell in ("fit", "validate then fit"):
            assert seen["start"] == source
            assert seen["status"] == "applied"
        elif cell == "second fit":
            assert parameters(seen["start"]) == parameters(before["end"])
            assert seen["status"] == "already-applied"
        else:
            assert parameters(seen["start"]) == parameters(before["end"])
            assert seen["status"] == "superseded-by-resume"
        if cell == "validate then fit":
            assert seen["validated"] != source  # validate alone loads nothing
        assert parameters(seen["end"]) != parameters(seen["start"])
    assert len({json.dumps(parameters(rank[place][cell]["end"])) for rank in ranks}) == 1


def test_field_note_11_three_epochs_with_weight_decay_and_statistics_leave_the_frozen_bit_equal(ran):
    _, source, ranks = ran
    for rank in ranks:
        seen = rank["frozen"]
        assert seen["start"] == seen["end"] == source
        assert seen["held"] == ["head.bias", "head.weight"]
        in_training, in_eval = seen["outputs"]
        assert in_training == in_eval


def test_field_note_12_a_schedule_resumed_equals_one_that_was_not_stopped(ran):
    strategy, source, ranks = ran
    for rank in ranks:
        whole = rank["staged"]["whole"]
        head = ["head.bias", "head.weight"]
        down = ["encoder.down.bias", "encoder.down.weight", *head]
        every = sorted(f"encoder.{name}" for name in parameters(source)) + head
        assert whole["trainable"] == [head, down, every]
        assert whole["held"] == every
        for epoch in (1, 2):
            resumed = rank["staged"][str(epoch)]
            assert resumed["trainable"] == whole["trainable"][epoch:]
            assert resumed["held"] == every
            exact = whole["end"] if strategy == "single" else parameters(whole["end"])
            assert exact == (resumed["end"] if strategy == "single" else parameters(resumed["end"]))


def test_what_is_refused_is_refused_in_words_on_every_rank(ran):
    strategy, _, ranks = ran
    for rank in ranks:
        assert rank["refused"]["typo"].startswith("MappingError: ")
        assert "did you mean 'encoder'" in rank["refused"]["typo"]
        if strategy == "ddp":
            assert rank["refused"]["unused"].startswith("TimingError: ")
            assert "set find_unused_parameters=True" in rank["refused"]["unused"]
        else:
            assert rank["refused"]["unused"] == ""


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_field_note_10_what_one_rank_overwrites_is_named_on_every_rank(ran, hook):
    _, _, ranks = ran
    for rank in ranks:
        assert rank["refused"][f"overwritten in {hook}"].startswith("VerificationError: ")
        assert "encoder.down.weight" in rank["refused"][f"overwritten in {hook}"]


def test_a_tuner_is_refused_where_the_memory_is_made_after_it(ran):
    strategy, _, ranks = ran
    if strategy in SHARDED:
        for rank in ranks:
            assert rank["refused"]["tuner"].startswith("TimingError: LearningRateFinder takes the model before")


def test_a_file_that_one_rank_has_is_enough_if_it_reads_for_the_others(ran):
    _, source, ranks = ran
    for rank in ranks:
        assert rank["read by one"]["start"] == source
        assert parameters(rank["read by one"]["end"]) == parameters(rank["configure_model"]["fit"]["end"])


@pytest.mark.parametrize("saved", ["folder", "file"])
def test_field_note_43_a_resume_without_the_source(ran, saved):
    """Lightning reads a checkpoint of one file into the modules of a sharded model one by one, past the hooks of the whole."""
    strategy, _, ranks = ran
    for rank in ranks:
        if strategy not in SHARDED and saved == "file":
            assert "file, named" not in rank["gone"]
            continue
        named, loose, every = (rank["gone"][f"{saved}, {case}"] for case in ("named", "loose", "all"))
        assert parameters(named["start"]) == parameters(named["before"])
        assert (named["error"], named["status"]) == ("", "superseded-by-resume")
        assert "encoder.up.weight" not in named["held"]
        if strategy in SHARDED and saved == "file":
            assert loose["error"].startswith("CheckpointError: ")
            assert "strictly" in loose["error"]
        else:
            assert (loose["error"], loose["status"]) == ("", "superseded-by-resume")
        if strategy in SHARDED:  # the optimizer comes before the checkpoint that says what was frozen
            assert every["error"].startswith("CheckpointError: ")
            assert 'freeze=["encoder"], or lock=' in every["error"]
        else:
            assert every["held"] == named["held"]
