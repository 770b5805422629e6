"""What must not be taken silently: code of a file that is only compared, moments, indexes of indexes, other shapes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import warmstart
from warmstart import CheckpointError, open_checkpoint


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_file_that_is_only_compared_is_never_trusted(tmp_path):
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    torch.save({"w": torch.ones(2), "e": Runs(f"touch {marker}")}, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder, trust_pickle=True)
    assert not marker.exists()
    assert any("values were not compared" in note for note in checkpoint.notes)


def test_field_note_30_formats_that_differ_in_shape_are_an_error_and_in_dtype_a_note(tmp_path):
    save_file({"w": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(2, 4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'w' is \(4, 4\) and \(2, 4\)"):
        open_checkpoint(tmp_path)
    torch.save({"w": torch.zeros(4, 4).half()}, tmp_path / "pytorch_model.bin")
    assert any("in another dtype" in note for note in open_checkpoint(tmp_path).notes)


@pytest.mark.parametrize("shard", ["model.safetensors.index.json", "other.bin"])
def test_an_index_is_no_shard(tmp_path, shard):
    index = json.dumps({"weight_map": {"w": shard}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / shard).write_text(index)
    with pytest.raises(CheckpointError, match="an index where a shard should be"):
        open_checkpoint(tmp_path / "model.safetensors.index.json")


def test_moments_under_flat_keys_are_left_out_with_a_note(tmp_path):
    save_file({"w": torch.ones(2), "optimizer.state.w.exp_avg": torch.ones(2)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", **{"w": np.ones(2), "optimizer/w": np.ones(2)})
    torch.save({"w": torch.ones(3), "w.exp_avg": torch.ones(3), "x.exp_avg": torch.ones(3)}, tmp_path / "c.pt")
    for name, keys in (("a.safetensors", {"w"}), ("b.npz", {"w"}), ("c.pt", {"w", "x.exp_avg"})):
        checkpoint = open_checkpoint(tmp_path / name)
        assert set(checkpoint.keys()) == keys
        assert any("of an optimizer's state left out" in note for note in checkpoint.notes)
    assert "w.exp_avg" in open_checkpoint(tmp_path / "c.pt", checkpoint_key="")


@pytest.mark.parametrize("weights", [[1e308, 1e308], np.array([1, 3]), [np.int64(1), 3], torch.tensor([1.0, 1.0])])
def test_average_takes_any_positive_numbers(weights):
    mean = warmstart.average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=weights)
    assert mean.read("w")[0].item() in {0.5, 0.75}


@pytest.mark.parametrize("weights", [[10**400, 1], ["1", 2], [True, 1], [float("nan"), 1]])
def test_average_refuses_what_is_no_positive_number(weights):
    with pytest.raises(CheckpointError, match="positive finite numbers"):
        warmstart.average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=weights)


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_source_is_no_folder(source):
    with pytest.raises(CheckpointError, match="the source is empty"):
        open_checkpoint(source)


def test_tensors_in_memory_that_change_after_planning_are_found():
    model, state = torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    plan = warmstart.plan(model, state)
    state["weight"].fill_(7)
    with pytest.raises(CheckpointError, match="'weight' was written to after it was opened"):
        plan.apply()
