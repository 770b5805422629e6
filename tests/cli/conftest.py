"""Commands run in this process, and a checkpoint to run them on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from warmstart.cli import main


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch) -> Callable[..., Ran]:
    """`main` with these arguments, in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        seen = capsys.readouterr()
        assert "Traceback" not in seen.err
        return Ran(code, seen.out, seen.err)

    return call


def attention(layers: int = 3, width: int = 16) -> dict[str, torch.Tensor]:
    return {
        f"encoder.layer.{i}.{part}.{leaf}": torch.randn(*([width] * (2 if leaf == "weight" else 1)))
        for i in range(layers)
        for part in ("q", "k", "v")
        for leaf in ("weight", "bias")
    }


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return attention()


@pytest.fixture
def source(state, tmp_path) -> Path:
    path = tmp_path / "source.safetensors"
    save_file(state, path)
    return path
