"""What docs/scale.md says a rank reads, counted without the run: real shapes on torch's `fake` process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def simulate(*arguments: object) -> dict[str, int]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=380, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(count: int, world: int, rank: int) -> int:
    """How many of a tensor's rows a rank holds, chunked as torch does."""
    chunk = -(-count // world)
    return max(0, min(chunk, count - rank * chunk))


def test_each_rank_of_a_70b_model_reads_its_64th():
    found = simulate(5, 64, "70b")
    width, hidden, vocabulary, heads = 8192, 28672, 128256, 1024
    held = sum(rows(n, 64, 5) * w for n, w in ((vocabulary, width), (vocabulary, width), (width, 1)))
    layer = [
        (width, width),
        (heads, width),
        (heads, width),
        (width, width),
        (hidden, width),
        (hidden, width),
        (width, hidden),
    ]
    held += 80 * sum(rows(n, 64, 5) * w for n, w in [*layer, (width, 1), (width, 1)])
    assert found["local"] == 2 * held
    assert found["file"] == 141_107_412_992
    assert found["tensors"] == 723
    assert found["pieces"] == 977
    assert found["largest"] == 2 * vocabulary * width


def test_the_last_of_1024_ranks_reads_its_share_of_a_layer_of_experts():
    """Some tensors have fewer rows than there are ranks: most hold nothing of them."""
    found = simulate(1023, 1024, "1t", 1)
    width, hidden, vocabulary = 7168, 2048, 163840
    table = [(vocabulary, width), (vocabulary, width), (width, 1)]
    layer = [(width, width), (1024, width), (1024, width), (width, width), (384, width), (width, 1), (width, 1)]
    experts = [(hidden, width), (hidden, width), (width, hidden)]
    held = sum(rows(n, 1024, 1023) * w for n, w in [*table, *layer, *384 * experts])
    assert found["local"] == 2 * held
    assert found["tensors"] == 3 + 7 + 384 * 3
