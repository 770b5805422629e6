"""What planning costs, by the number of keys: identical names, a prefix to infer, rules, and conversions.

`python benchmarks/planning.py` makes a model on the meta device and a checkpoint of names, shapes and dtypes alone, whose
reader fails if a tensor is asked for, and plans five times each; the median is printed, and its ratio to 10,000 keys.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import warmstart
from warmstart import Checkpoint, Conversion, Stack, TensorInfo

SIZES = (1_000, 10_000, 100_000)
RUNS = 5


class Header(Checkpoint):
    """Names, shapes and dtypes without data."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
        super().__init__(location="header", format="none", infos=infos)

    def _read(self, key: str, index: Any) -> Tensor:
        raise AssertionError(f"planning read {key}")


def layer() -> nn.Module:
    """Ten entries, as a transformer layer names them."""
    block = nn.Module()
    block.attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key", "value", "out")})
    block.norm = nn.LayerNorm(4)
    return block


def model(keys: int) -> nn.Module:
    root = nn.Module()
    with torch.device("meta"):
        root.encoder = nn.ModuleDict({"layer": nn.ModuleList(layer() for _ in range(keys // 10))})
    return root


def cases(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]]:
    renamed = {n.replace("attention", "attn").replace("query", "q_proj"): s for n, s in shapes.items()}
    experts = {
        f"{n.removesuffix('.weight')}.{i}.w": (2, 4) for n, s in shapes.items() if "out.weight" in n for i in (0, 1)
    }
    stacked = {n: s for n, s in shapes.items() if "out.weight" not in n} | experts
    convert = [Conversion("{p...}.out.{e}.w", "{p...}.out.weight", [Stack("e", 0), {"reshape": {"shape": [4, 4]}}])]
    return {
        "same names": (shapes, {}),
        "a prefix to infer": ({f"module.backbone.{n}": s for n, s in shapes.items()}, {}),
        "two renames": (renamed, {"rename": {"attn": "attention", "q_proj": "query"}}),
        "longest suffix": ({n.removeprefix("encoder."): s for n, s in shapes.items()}, {"match": "suffix"}),
        "a conversion of a fifth": (stacked, {"convert": convert}),
    }


def seconds(net: nn.Module, shapes: Mapping[str, tuple[int, ...]], fields: dict[str, Any]) -> float:
    times = []
    for _ in range(RUNS):
        checkpoint = Header(shapes)
        gc.collect()
        started = time.perf_counter()
        plan = warmstart.plan(net, checkpoint, **fields)
        times.append(time.perf_counter() - started)
        assert not plan.errors, plan.explain()
        assert len(plan.assignments) == len(net.state_dict())
    return statistics.median(times)


def main() -> None:
    table: dict[str, list[float]] = {}
    for size in SIZES:
        net = model(size)
        shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
        for name, (keys, fields) in cases(shapes).items():
            table.setdefault(name, []).append(seconds(net, keys, fields))
    print(f"{platform.machine()}, torch {torch.__version__}, seconds to plan (median of {RUNS})\n")
    print("| case | " + " | ".join(f"{size:,} keys" for size in SIZES) + " | 100,000 against 10,000 |")
    print("|---" * (len(SIZES) + 2) + "|")
    for name, times in table.items():
        print(f"| {name} | " + " | ".join(f"{t:.2f}" for t in times) + f" | {times[2] / times[1]:.1f} x |")


if __name__ == "__main__":
    main()
