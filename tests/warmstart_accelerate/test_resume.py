"""`load_state` wins, carries lineage and the frozen set, and does without the file."""

from __future__ import annotations

import json
import os

import loops
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn

from warmstart import CheckpointError, FrozenChangedError, open_checkpoint
from warmstart.lineage import recorded
from warmstart_accelerate import warm_start


def half(source, tmp_path, **options):
    seen = loops.train(source, folder=tmp_path, steps=2, save=tmp_path / "state", **options)
    loops.fresh()
    return seen


@pytest.mark.parametrize("freeze", [False, True, ["encoder.0"]])
def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(smooth, tmp_path, freeze):
    whole = loops.train(smooth, kind=loops.Smooth, freeze=freeze)
    loops.fresh()
    first = half(smooth, tmp_path, kind=loops.Smooth, freeze=freeze)
    end = loops.weights(first.model)
    rest = loops.train(smooth, kind=loops.Smooth, seed=5, freeze=freeze, resume=tmp_path / "state", skip=2)
    assert loops.equal(rest.start, end)
    assert first.losses + rest.losses == whole.losses
    assert loops.equal(loops.weights(rest.model), loops.weights(whole.model))
    assert rest.report.status == ("applied" if freeze is True else "superseded-by-resume")


def test_field_note_43_a_process_that_loads_a_state_needs_no_file(source, tmp_path):
    whole = loops.train(source, freeze=True)
    loops.fresh()
    first = half(source, tmp_path, freeze=True)
    os.remove(source)
    rest = loops.train(source, seed=5, folder=tmp_path, freeze=True, resume=tmp_path / "state", skip=2)
    assert first.losses + rest.losses == whole.losses
    assert rest.report.status == "superseded-by-resume"
    assert rest.report.frozen.names == first.report.frozen.names
    assert rest.report.lineage == first.report.lineage
    assert "encoder.pt is gone" in str(rest.report)
    rest.accelerator.save_state(tmp_path / "next")
    found = json.loads((tmp_path / "next" / "warmstart.json").read_text())["warm_start[encoder]"]
    assert found["lineage"] == first.report.lineage
    rest.accelerator.end_training()


def test_without_a_state_a_file_that_is_gone_is_an_error_when_training_starts(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pt"):
        loops.train(tmp_path / "gone.pt", freeze="encoder")


def test_a_file_that_is_gone_is_an_error_at_once_where_nothing_tells_what_to_freeze(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pt"):
        warm_start(Accelerator(cpu=True), loops.Net(), tmp_path / "gone.pt", into="encoder", freeze=True)


def test_the_newest_state_of_an_automatic_name_is_found(source, tmp_path):
    def accelerator():
        return Accelerator(
            cpu=True,
            project_config=ProjectConfiguration(project_dir=str(tmp_path / "run"), automatic_checkpoint_naming=True),
        )

    first = loops.train(source, freeze=True, accelerator=accelerator(), steps=2)
    first.accelerator.save_state()
    os.remove(source)
    loops.fresh()
    after = accelerator()
    model = loops.Net()
    report = warm_start(after, model, source, into="encoder", freeze=True)
    assert report.frozen.names == first.report.frozen.names
    prepared, _ = after.prepare(model, torch.optim.AdamW(model.head.parameters()))
    after.load_state()
    prepared(torch.randn(8, 4))
    assert report.status == "superseded-by-resume"
    assert loops.equal(loops.weights(model), loops.weights(first.model))


def test_field_note_13_another_freeze_is_told_in_words_before_the_optimizer_is_restored(source, tmp_path):
    half(source, tmp_path, freeze=True)
    with pytest.raises(FrozenChangedError, match="had 9 frozen tensors, this one has 2"):
        loops.train(source, freeze="encoder.0", resume=tmp_path / "state")


def test_field_note_12_what_was_released_stays_so(smooth, tmp_path):
    options = {"kind": loops.Smooth, "freeze": True, "unfreeze": {2: "encoder.0"}}
    whole = loops.train(smooth, **options)
    loops.fresh()
    first = half(smooth, tmp_path, **options)
    rest = loops.train(smooth, seed=5, resume=tmp_path / "state", skip=2, **options)
    assert rest.model.encoder[0].weight.requires_grad
    assert not rest.model.encoder[2].weight.requires_grad
    assert first.losses + rest.losses == whole.losses
    assert loops.equal(loops.weights(rest.model), loops.weights(whole.model))


def test_a_state_in_pickles_that_is_loaded_again_and_again(source, tmp_path):
    first = loops.train(source, freeze="encoder.0", steps=2)
    first.accelerator.save_state(tmp_path / "state", safe_serialization=False)
    saved = loops.weights(first.model)
    loops.fresh()
    rest = loops.train(source, seed=5, freeze="encoder.0", resume=tmp_path / "state", skip=2)
    assert rest.report.status == "superseded-by-resume"
    for _ in range(2):
        rest.accelerator.load_state(tmp_path / "state")
        assert loops.equal(loops.weights(rest.model), saved)
        rest.prepared(torch.randn(8, 4))
        assert torch.equal(rest.model.head.weight, saved["head.weight"])
    rest.accelerator.end_training()


def test_a_state_that_no_warm_start_left_its_mark_in(source, tmp_path):
    loops.train(None, load=lambda model: None, steps=2, save=tmp_path / "state")
    loops.fresh()
    rest = loops.train(source, resume=tmp_path / "state")
    assert rest.report.status == "superseded-by-resume"


class Respelled(nn.Module):
    """As large as `Smooth`, so that its optimizer's state fits."""

    def __init__(self):
        super().__init__()
        self.trunk, self.top = loops.Smooth().encoder, nn.Linear(8, 2)

    def forward(self, x):
        return self.top(self.trunk(x))


@pytest.mark.parametrize("trained", [False, True])
def test_field_note_1_a_state_that_matches_nothing_is_an_error(smooth, tmp_path, trained):
    """Without `strict`, accelerate passes it over."""
    loops.train(None, load=lambda model: None, kind=Respelled, steps=1, save=tmp_path / "state")
    loops.fresh()
    run = loops.train(smooth, kind=loops.Smooth, steps=int(trained))
    run.accelerator.load_state(tmp_path / "state", strict=False)
    with pytest.raises(CheckpointError, match="matches none of the 6 entries of Smooth"):
        run.prepared(torch.randn(8, 4))


def test_what_the_state_says_may_be_damaged(source, tmp_path):
    half(source, tmp_path)
    (tmp_path / "state" / "warmstart.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not what a warm start writes"):
        loops.train(source, resume=tmp_path / "state")


def test_going_back_to_a_state_in_the_middle_of_training(source, tmp_path):
    seen = loops.train(source, freeze=True, save=tmp_path / "state")
    saved = loops.weights(seen.model)
    (prepared,) = seen.accelerator._models
    (optimizer,) = seen.accelerator._optimizers
    loss = prepared(torch.randn(8, 4)).square().mean()
    seen.accelerator.backward(loss)
    optimizer.step()
    assert not loops.equal(loops.weights(seen.model), saved)
    seen.accelerator.load_state(tmp_path / "state")
    prepared(torch.randn(8, 4))
    assert torch.equal(seen.model.head.weight, saved["head.weight"])
    seen.accelerator.end_training()


def test_field_note_44_the_state_says_where_its_weights_came_from(source, tmp_path):
    seen = half(source, tmp_path)
    (lineage,) = recorded(open_checkpoint(tmp_path / "state" / "model.safetensors"))
    assert lineage == seen.report.lineage


def test_a_state_and_the_report_may_share_a_folder(source, tmp_path):
    seen = loops.train(source, folder=tmp_path / "run", freeze=True, steps=2, save=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "warmstart.json").read_text())
    assert found["status"] == "applied"
    assert found["warm_start[encoder]"]["frozen"] == list(seen.report.frozen.names)
    loops.fresh()
    loops.train(source, folder=tmp_path / "run", freeze=True, resume=tmp_path / "run", skip=2)
    assert "warm_start[encoder]" in json.loads((tmp_path / "run" / "warmstart.json").read_text())
