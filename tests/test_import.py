"""What importing the package costs, and what it brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest

FOREIGN = ("lightning", "pytorch_lightning", "transformers", "accelerate", "rich", "jsonargparse", "typer", "click", "jinja2",
           "matplotlib", "h5py", "fsspec", "huggingface_hub", "torch.distributed.tensor", "deepspeed", "peft")  # fmt: skip


def test_importing_warmstart_brings_torch_and_no_framework():
    program = (
        "import sys, torch; before = set(sys.modules); import warmstart\n"
        f"print(sorted(m for m in set(sys.modules) - before if m in {FOREIGN!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


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
