"""What importing the package costs, and what it brings along."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import warmstart

FOREIGN = ("lightning", "pytorch_lightning", "transformers", "accelerate", "rich", "jsonargparse", "typer", "click", "jinja2",
           "matplotlib", "h5py", "fsspec", "huggingface_hub", "torch.distributed.tensor", "deepspeed", "peft")  # fmt: skip


def test_importing_warmstart_brings_torch_and_no_framework():
    program = (
        "import sys, torch; before = set(sys.modules); import warmstart\n"
        f"print(sorted(m for m in set(sys.modules) - before if m in {FOREIGN!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_warmstart_costs_nothing_until_a_name_of_it_is_used():
    program = (
        "import sys, warmstart; print(sorted(m for m in sys.modules if m.split('.')[0] in ('warmstart', 'torch')))\n"
        "warmstart.CheckpointError; print('warmstart.errors' in sys.modules, 'torch' in sys.modules)\n"
        "from warmstart import load; print(load.__module__, 'warmstart.mapping.suggesting.suggesting' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["['warmstart', 'warmstart.version']", "True False", "warmstart.api False"]


def test_inspecting_a_file_imports_neither_its_planning_nor_the_readers_of_other_formats(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    program = (
        "import sys; from warmstart.cli import main; assert main(['inspect', sys.argv[1]]) == 0\n"
        "print(*sorted(m for m in sys.modules if m.startswith('warmstart.')))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "w.safetensors"],
                          capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    modules = done.stdout.splitlines()[-1].split()
    assert "warmstart.checkpoints.safetensors_file" in modules
    assert [m for m in modules if m.startswith(("warmstart.loading", "warmstart.rendering"))] == []
    assert {"warmstart.mapping.planning.planning", "warmstart.checkpoints.numpy_file", "warmstart.checkpoints.remote.urls",
            "warmstart.checkpoints.hdf5.keras_file", "warmstart.checkpoints.torch_files.dcp"}.isdisjoint(modules)  # fmt: skip


def test_every_public_name_comes_from_where_type_checkers_are_told_it_does():
    tree = ast.parse(Path(warmstart.__file__).read_text("utf-8"))
    told = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    # A module of the same name would hide it.
    assert not [name for name in told if (Path(warmstart.__file__).parent / f"{name}.py").exists()]
    assert {*told, "__version__"} == set(warmstart.__all__) <= set(dir(warmstart))
    for name, module in told.items():
        assert getattr(warmstart, name) is getattr(importlib.import_module(module), name)
    assert {name: f"warmstart.{home}" for name, home in warmstart._HOME.items()} == told
    with pytest.raises(AttributeError, match="module 'warmstart' has no attribute 'lode'"):
        _ = warmstart.lode


def test_a_missing_host_is_named_with_the_line_to_install_it():
    program = "import sys; sys.modules['lightning'] = None; sys.modules['lightning.pytorch'] = None\nimport warmstart_lightning"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'warmstart[lightning]'" in done.stderr


@pytest.mark.parametrize("name", ["warmstart", "warmstart_lightning"])
def test_public_names_are_sorted_and_there(name):
    module = __import__(name)
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
