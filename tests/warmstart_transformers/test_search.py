"""Hyperparameter search with a real Optuna: every trial starts from the pretrained weights."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import Plain, equal, weights
from transformers import TrainerCallback

from warmstart import TimingError
from warmstart_transformers import WarmStartCallback

optuna = pytest.importorskip("optuna")


class Starts(TrainerCallback):
    def __init__(self):
        self.encoders, self.models = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.encoders.append(weights(model.encoder))
        self.models.append(id(model))


def search(trainer):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler(seed=0)
    space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)}
    return trainer.hyperparameter_search(
        space,
        n_trials=3,
        direction="minimize",
        backend="optuna",
        sampler=sampler,
        compute_objective=lambda m: m["eval_loss"],
    )


@pytest.mark.parametrize("way", ["wrapped", "attached"])
def test_field_note_46_every_trial_starts_warm(make_trainer, plain_source, tmp_path, way):
    callback, starts = WarmStartCallback(plain_source, into="encoder", freeze="encoder.0"), Starts()
    init = callback.wrap_model_init(Plain) if way == "wrapped" else Plain
    trainer = make_trainer(None, callback, starts, model_init=init, save_strategy="epoch", eval_strategy="epoch")
    if way == "attached":
        callback.attach(trainer)
    best = search(trainer)
    expected = torch.load(plain_source, weights_only=True)
    assert len(starts.encoders) == 3
    assert all(equal(values, expected) for values in starts.encoders)
    assert best.objective > 0
    # each trial has a folder of its own, and each of its checkpoints the lineage
    manifests = sorted((tmp_path / "run").glob("run-*/checkpoint-4/warmstart.json"))
    assert len(manifests) == 3
    for manifest in manifests:
        (state,) = json.loads(manifest.read_text()).values()
        assert state["frozen"] == ["encoder.0.bias", "encoder.0.weight"]


def test_without_either_the_first_trial_is_refused(make_trainer, plain_source):
    trainer = make_trainer(None, WarmStartCallback(plain_source, into="encoder"), model_init=Plain)
    with pytest.raises(TimingError, match="wrap_model_init"):
        search(trainer)
