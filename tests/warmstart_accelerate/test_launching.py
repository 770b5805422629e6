"""Launchers of a notebook's, and one that started more processes than accelerate sees."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import loops
import pytest
import torch
from accelerate import Accelerator

from warmstart_accelerate import warm_start


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_each_process_alone_is_a_warning_that_names_the_argument(source, monkeypatch, name):
    accelerator = Accelerator()  # started as torchrun does, without a GPU and without cpu=True
    monkeypatch.setenv(name, "2")
    with pytest.warns(UserWarning, match=r"started 2 processes and accelerate sees 1(.|\n)*Accelerator\(cpu=True\)"):
        warm_start(accelerator, loops.Net(), source, into="encoder")


def test_one_process_is_none(source, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    warm_start(Accelerator(cpu=True), loops.Net(), source, into="encoder")


@pytest.mark.slow
def test_the_launchers_of_a_notebook(tmp_path):
    torch.save(loops.trained_encoder(loops.Smooth), tmp_path / "encoder.pt")
    forked.run_well(Path(__file__).with_name("notebook_script.py"), 1, tmp_path, tmp_path)
    expected = {f"encoder.{name}": value.tolist() for name, value in torch.load(tmp_path / "encoder.pt").items()}
    for launcher in ("debug", "notebook"):
        zero, one = (json.loads((tmp_path / f"{launcher}-{rank}.json").read_text()) for rank in (0, 1))
        assert zero == one
        assert zero["world"] == 2
        assert zero["status"] == "applied"
        assert {name: zero["start"][name] for name in expected} == expected
        assert zero["end"]["encoder.0.weight"] == expected["encoder.0.weight"]
        assert zero["end"]["encoder.2.weight"] != expected["encoder.2.weight"]
