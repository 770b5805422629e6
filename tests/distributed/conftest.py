"""The checkpoints of every case, and each engine's processes: launched once, whatever number of tests ask for them."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import cells

TIMEOUT = 600


@dataclass(frozen=True)
class Rank:
    """What one process left: by cell, what happened and what it holds."""

    facts: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Tensor]]


def save(tensors: dict[str, Tensor], path: Path, source: str) -> None:
    if source == "safetensors":
        save_file(tensors, path)
    elif source == "torch":
        torch.save(tensors, path)
    elif source == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(tensors), checkpoint_id=path, no_dist=True)
    else:
        path.mkdir()
        names = list(tensors)
        weight_map = {}
        for number in (0, 1):
            shard = f"model-0000{number + 1}-of-00002.safetensors"
            mine = names[number::2]
            save_file({name: tensors[name] for name in mine}, path / shard)
            weight_map |= dict.fromkeys(mine, shard)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of every case in every format."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, case in cells.CASES.items():
        for source in cells.SOURCES:
            save(cells.trained(case), cells.path_of(folder, name, source), source)
    wide = cells.Case({"width": 64, "hidden": 256, "words": 500})
    save(cells.trained(wide), cells.path_of(folder, "wide", "safetensors"), "safetensors")
    return folder


@pytest.fixture(scope="session")
def ranks(checkpoints: Path) -> Callable[[str], list[Rank]]:
    """Runs all cells of an engine in its processes, once."""

    failed: set[str] = set()

    def once(engine: str) -> list[Rank]:
        if engine in failed:
            pytest.fail(f"the processes of {engine} did not end well; the first test of it shows their logs")
        try:
            return launch(engine)
        except AssertionError:
            failed.add(engine)
            raise

    @functools.cache
    def launch(engine: str) -> list[Rank]:
        if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
        folder = checkpoints / engine
        folder.mkdir()
        world = cells.WORLD[engine]
        forked.run_well(Path(cells.__file__), world, folder, engine, checkpoints, timeout=TIMEOUT)
        return [
            Rank(json.loads((folder / f"{rank}.json").read_text()), torch.load(folder / f"{rank}.pt"))
            for rank in range(world)
        ]

    return once
