"""Loads side by side: what people use today, the limit of the machine, and warmstart, on the same files in one run.

`python benchmarks/loading.py` prints the tables; `--write` puts them into `benchmarks/README.md`, `--quick` takes small models
and three rounds, `--check` ends with an error where a ratio is over its target by half and more. Files are made in `--folder`
(a temporary one) and need 10 GB there. Two peers are optional: `pip install fastsafetensors runai-model-streamer`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import safetensors
import safetensors.torch
import torch
from harness import Prepare, Result, drop_from_cache, forked, in_turns, into_cache, machine, ratio, spawned
from models import (
    BLOCKS,
    Many,
    Transformer,
    initialised,
    on_meta,
    write_lightning,
    write_numpy,
    write_safetensors,
    write_torch,
)
from torch import nn
from transformers import BertConfig, BertModel
from transformers.initialization import no_init_weights

import warmstart
import warmstart.api
import warmstart.checkpoints.numpy_file
import warmstart.checkpoints.safetensors_file
import warmstart.checkpoints.torch_files.torchscript

README = Path(__file__).with_name("README.md")
MARKS = ("<!-- loading: made by benchmarks/loading.py -->\n", "<!-- end of loading -->")
PACKAGES = ("torch", "safetensors", "accelerate", "transformers", "fastsafetensors", "runai-model-streamer")
SLACK_BYTES = 32 << 20

Build = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Target:
    """A row of the table: `ours` may take at most `at_most` times what `against` takes, or `slack` seconds more."""

    case: str
    ours: str
    against: str
    at_most: float
    slack: float = 0.0


# ---- the machine's own limit


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: its offset and its size."""
    import json

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return {k: (start + v["data_offsets"][0], v["data_offsets"][1] - v["data_offsets"][0]) for k, v in header.items()}


def read_straight(model: nn.Module, path: Path, at: dict[str, tuple[int, int]], threads: int = 2) -> None:
    """Bytes from the file into the parameters' own memory, by two threads: nothing is checked, nothing is known."""
    jobs = []
    for name, tensor in model.state_dict().items():
        offset, size = at[name]
        memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        for begin in range(0, size, 8 << 20):
            jobs.append((memory[begin : begin + (8 << 20)], offset + begin))
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: os.preadv(file.fileno(), [job[0]], job[1]), jobs))


# ---- what people use today


def torch_load(build: Build, path: Path, prefix: str = "", tree: str = "", **options: Any) -> Callable[[], object]:
    model = initialised(build)

    def run() -> None:
        state = torch.load(path, map_location="cpu", **options)
        state = state[tree] if tree else state
        model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})

    return run


def load_file(build: Build, path: Path, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    model = initialised(build, dtype)
    return lambda: model.load_state_dict(safetensors.torch.load_file(path))


def load_file_assign(build: Build, path: Path) -> Callable[[], object]:
    model = on_meta(build)
    return lambda: model.load_state_dict(safetensors.torch.load_file(path), assign=True)


def load_model(build: Build, path: Path) -> Callable[[], object]:
    model = initialised(build)
    return lambda: safetensors.torch.load_model(model, path)


def accelerate_load(build: Build, path: Path) -> Callable[[], object]:
    model = initialised(build)
    return lambda: accelerate.load_checkpoint_in_model(model, str(path))


def fast_safetensors(build: Build, path: Path) -> Callable[[], object]:
    import_module("fastsafetensors")
    model = initialised(build)
    return lambda: fast_safetensors_into(model, path, "cpu")


def fast_safetensors_into(model: nn.Module, path: Path, device: str) -> None:
    library = import_module("fastsafetensors")
    loader = library.SafeTensorsFileLoader(library.SingleGroup(), torch.device(device), nogds=True)
    loader.add_filenames({0: [str(path)]})
    buffer = loader.copy_files_to_device()
    model.load_state_dict({name: buffer.get_tensor(name) for name in buffer.key_to_rank_lidx})
    buffer.close()
    loader.close()


def runai_streamer(build: Build, path: Path) -> Callable[[], object]:
    library = import_module("runai_model_streamer")
    model = initialised(build)
    entries = model.state_dict()

    def run() -> None:
        with library.SafetensorsStreamer() as streamer:
            streamer.stream_file(str(path))
            for name, tensor in streamer.get_tensors():
                entries[name].copy_(tensor)

    return run


def np_load(build: Build, path: Path) -> Callable[[], object]:
    model = initialised(build)

    def run() -> None:
        with np.load(path) as arrays:
            model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})

    return run


def safe_open_block(build: Build, path: Path, block: str) -> Callable[[], object]:
    model = initialised(build)

    @torch.no_grad()
    def run() -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            for name, parameter in model.get_submodule(block).named_parameters():
                parameter.copy_(file.get_tensor(f"{block}.{name}"))

    return run


def torch_load_block(build: Build, path: Path, block: str, **options: Any) -> Callable[[], object]:
    model = initialised(build)

    def run() -> None:
        state = torch.load(path, map_location="cpu", **options)
        inside = {k.removeprefix(f"{block}."): v for k, v in state.items() if k.startswith(f"{block}.")}
        model.get_submodule(block).load_state_dict(inside)

    return run


def straight(build: Build, path: Path) -> Callable[[], object]:
    model = initialised(build)
    return lambda: read_straight(model, path, places(path))


def straight_lightning(build: Build, path: Path) -> Callable[[], object]:
    model = initialised(build)
    checkpoint = warmstart.open_checkpoint(path)
    infos = {key: checkpoint.info(key) for key in checkpoint.keys()}
    at = {key.removeprefix("model."): (info.offset, info.nbytes) for key, info in infos.items()}
    return lambda: read_straight(model, path, at)


def copy_from_mapped(build: Build, path: Path) -> Callable[[], object]:
    model = initialised(build)
    at = places(path)
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    pairs = []
    for name, parameter in model.state_dict().items():
        offset, size = at[name]
        pairs.append((parameter.view(-1).view(torch.uint8), mapped[offset : offset + size]))

    def run() -> None:
        for parameter, source in pairs:
            parameter.copy_(source)

    return run


def copy_and_compare(build: Build, path: Path, chunk: int = 480 << 10) -> Callable[[], object]:
    """What `verify="full"` cannot be faster than: two threads copy chunks from the mapped file and compare them in cache."""
    model = initialised(build)
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def move(job: tuple[int, int, int]) -> None:
        to, source, count = job
        for at in range(0, count, chunk):
            length = min(chunk, count - at)
            ctypes.memmove(to + at, source + at, length)
            assert not memcmp(to + at, source + at, length)

    def run() -> None:
        at = places(path)
        mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        jobs = []
        for name, parameter in model.state_dict().items():
            to, source, size = parameter.data_ptr(), mapped.data_ptr() + at[name][0], at[name][1]
            jobs += [(to + i, source + i, min(8 << 20, size - i)) for i in range(0, size, 8 << 20)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(move, jobs))

    return run


def from_pretrained(folder: Path) -> Callable[[], object]:
    return lambda: BertModel.from_pretrained(folder)


# ---- warmstart


def ours(
    build: Build, path: Path, verify: str, dtype: torch.dtype = torch.float32, **fields: Any
) -> Callable[[], object]:
    model = initialised(build, dtype)
    return lambda: warmstart.load(model, path, verify=verify, **fields)


def ours_on_meta(build: Build, path: Path, verify: str) -> Callable[[], object]:
    model = on_meta(build)
    return lambda: warmstart.load(model, path, verify=verify)


def ours_check(build: Build, path: Path) -> Callable[[], object]:
    model = initialised(build)
    report = warmstart.load(model, path, verify="off")
    return lambda: report.check(model)


def ours_minilm(folder: Path, verify: str) -> Callable[[], object]:
    def run() -> None:
        config = BertConfig.from_pretrained(folder)
        with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
            model = BertModel(config)
        file = folder / "model.safetensors"
        warmstart.load(model, file, verify=verify, allow_unexpected="embeddings.position_ids")

    return run


# ---- the groups that are measured together


TARGETS = (
    Target('full load into an initialised model, `verify="off"`', "ours, off", "load_file", 1.10),
    Target("the same, against the limit", "ours, off", "bare two-thread read", 1.30),
    Target("the same with the file evicted from the page cache", "ours, off, evicted", "load_file, evicted", 0.75),
    Target('the same, warm, `verify="sample"`', "ours, sample", "load_file", 1.20),
    Target('the same, `verify="full"`', "ours, full", "load_file", 1.90),
    Target("the same, against its limit", "ours, full", "copy and compare in the cache", 1.30),
    Target('bfloat16, `verify="off"`', "bf16: ours, off", "bf16: load_file", 1.10),
    Target('bfloat16, `verify="full"`', "bf16: ours, full", "bf16: load_file", 1.90),
    Target("check at train start, full", "ours, check", "copy from the mapped file", 1.20),
    Target("meta model", "ours, meta, off", "load_file, assign", 1.30, 0.015),
    Target('Lightning `.ckpt` with optimizer state, `verify="off"`', "ckpt: ours, off", "ckpt: torch.load", 0.15),
    Target("the same", "ckpt: ours, off", "ckpt: bare two-thread read", 1.30),
    Target("one block of 24", "block: ours, off", "block: safe_open", 1.30, 0.010),
    Target("one block of 24 from `.pt`", "block .pt: ours, off", "block .pt: torch.load, mmap", 1.30, 0.010),
    Target("the same", "block .pt: ours, off", "block .pt: torch.load", 0.03),
    Target('20,000 small tensors, `verify="off"`', "20,000: ours, off", "20,000: load_file", 1.50),
    Target('MiniLM into BertModel, `verify="full"`', "MiniLM: ours, full", "MiniLM: from_pretrained", 0.50),
    Target("`import torch, warmstart`, seconds beyond `import torch`", "import warmstart", "import torch", 1.0, 0.060),
    Target(
        "`from warmstart import load`, beyond `import torch`", "from warmstart import load", "import torch", 1.0, 0.25
    ),
    Target("`warmstart inspect` of the float32 file, whole process", "warmstart inspect", "import torch", 1.30),
)


def measure(folder: Path, rounds: int, blocks: int, layers: int, only: str = "") -> dict[str, Result]:
    """The runs of every contestant of the groups that have one with `only` in its name, by contestant."""
    build: Build = partial(Transformer, blocks)
    many: Build = partial(Many, layers)
    fp32, bf16, small = (folder / f"{name}.safetensors" for name in ("fp32", "bf16", "small"))
    pt, npz, ckpt = folder / "fp32.pt", folder / "fp32.npz", folder / "lightning.ckpt"
    inside = {"include": "blocks.3", "select": "blocks.3"}
    made: dict[str, Result] = {}

    def group(*writers: Callable[[], Path], before: Callable[[], object] | None = None, **names: Any) -> None:
        contestants: dict[str, Prepare] = names["contestants"]
        if not any(only in name for name in contestants):
            return
        files = [writer() for writer in writers]
        into_cache(files)
        print(f"  {', '.join(contestants)}", file=sys.stderr, flush=True)
        made.update(in_turns(contestants, rounds, before))

    def file(path: Path, write: Callable[..., None], *args: Any) -> Callable[[], Path]:
        def make() -> Path:
            if not path.exists():
                forked(lambda: partial(write, path, *args))  # the parent stays what it was
            return path

        return make

    group(
        file(fp32, write_safetensors, build),
        contestants={
            "load_file": partial(load_file, build, fp32),
            "ours, off": partial(ours, build, fp32, "off"),
            "ours, sample": partial(ours, build, fp32, "sample"),
            "ours, full": partial(ours, build, fp32, "full"),
            "bare two-thread read": partial(straight, build, fp32),
            "load_model": partial(load_model, build, fp32),
            "accelerate.load_checkpoint_in_model": partial(accelerate_load, build, fp32),
            "fastsafetensors": partial(fast_safetensors, build, fp32),
            "runai-model-streamer": partial(runai_streamer, build, fp32),
            "copy from the mapped file": partial(copy_from_mapped, build, fp32),
            "copy and compare in the cache": partial(copy_and_compare, build, fp32),
            "ours, check": partial(ours_check, build, fp32),
            "load_file, assign": partial(load_file_assign, build, fp32),
            "ours, meta, off": partial(ours_on_meta, build, fp32, "off"),
            "ours, meta, full": partial(ours_on_meta, build, fp32, "full"),
            "block: safe_open": partial(safe_open_block, build, fp32, "blocks.3"),
            "block: ours, off": partial(ours, build, fp32, "off", **inside),
        },
    )
    group(
        file(fp32, write_safetensors, build),
        before=partial(drop_from_cache, fp32),
        contestants={
            "load_file, evicted": partial(load_file, build, fp32),
            "ours, off, evicted": partial(ours, build, fp32, "off"),
            "bare two-thread read, evicted": partial(straight, build, fp32),
        },
    )
    group(
        file(bf16, write_safetensors, build, torch.bfloat16),
        contestants={
            "bf16: load_file": partial(load_file, build, bf16, torch.bfloat16),
            "bf16: ours, off": partial(ours, build, bf16, "off", torch.bfloat16),
            "bf16: ours, full": partial(ours, build, bf16, "full", torch.bfloat16),
        },
    )
    group(
        file(pt, write_torch, build),
        file(npz, write_numpy, build),
        contestants={
            ".pt: torch.load": partial(torch_load, build, pt),
            ".pt: torch.load, mmap": partial(torch_load, build, pt, mmap=True),
            ".pt: ours, off": partial(ours, build, pt, "off"),
            ".pt: ours, full": partial(ours, build, pt, "full"),
            "block .pt: torch.load": partial(torch_load_block, build, pt, "blocks.3"),
            "block .pt: torch.load, mmap": partial(torch_load_block, build, pt, "blocks.3", mmap=True),
            "block .pt: ours, off": partial(ours, build, pt, "off", **inside),
            "np.load": partial(np_load, build, npz),
            ".npz: ours, off": partial(ours, build, npz, "off"),
        },
    )
    for path in (bf16, pt, npz):
        path.unlink(missing_ok=True)
    group(
        file(ckpt, write_lightning, build),
        contestants={
            "ckpt: torch.load": partial(torch_load, build, ckpt, "model.", "state_dict"),
            "ckpt: bare two-thread read": partial(straight_lightning, build, ckpt),
            "ckpt: ours, off": partial(ours, build, ckpt, "off"),
            "ckpt: ours, full": partial(ours, build, ckpt, "full"),
        },
    )
    ckpt.unlink(missing_ok=True)
    group(
        file(small, write_safetensors, many),
        contestants={
            "20,000: load_file": partial(load_file, many, small),
            "20,000: ours, off": partial(ours, many, small, "off"),
            "20,000: ours, full": partial(ours, many, small, "full"),
        },
    )
    if (minilm := minilm_folder(folder)) is not None:
        group(
            lambda: minilm / "model.safetensors",
            contestants={
                "MiniLM: from_pretrained": partial(from_pretrained, minilm),
                "MiniLM: ours, off": partial(ours_minilm, minilm, "off"),
                "MiniLM: ours, full": partial(ours_minilm, minilm, "full"),
            },
        )
    python = sys.executable
    commands = {
        "import torch": [python, "-c", "import torch"],
        "import warmstart": [python, "-c", "import torch, warmstart"],
        "from warmstart import load": [python, "-c", "import torch; from warmstart import load"],
        "warmstart inspect": [python, "-m", "warmstart", "inspect", str(fp32)],
    }
    if any(only in name for name in commands):
        file(fp32, write_safetensors, build)()
        print(f"  {', '.join(commands)}", file=sys.stderr, flush=True)
        made.update(spawned(commands, rounds))
    return made


def minilm_folder(folder: Path) -> Path | None:
    """MiniLM's weights and configuration, if they can be had."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    real = import_module("real_weights")
    try:
        files = [real.MINILM.fetch(), real.MINILM.fetch("config.json")]
    except real.FetchError as error:
        print(f"no MiniLM: {error}", file=sys.stderr)
        return None
    place = folder / "minilm"
    place.mkdir(exist_ok=True)
    for file in files:
        if not (place / file.name).exists():
            (place / file.name).symlink_to(file)
    return place


# ---- the tables


def targets_table(results: dict[str, Result]) -> tuple[list[str], list[str]]:
    """The table of targets, and the cases that are over theirs by half and more."""
    lines = ["| case | ours | against | | ratio | at most | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    over = []
    for target in TARGETS:
        a, b = results.get(target.ours), results.get(target.against)
        if a is None or b is None or not a.runs or not b.runs:
            continue
        by = ratio(a, b)
        beyond = a.seconds - b.seconds
        met = by <= target.at_most or (target.slack and beyond <= target.slack)
        limit = f"{target.at_most:.2f}" + (f" or +{target.slack * 1e3:.0f} ms" if target.slack else "")
        lines.append(
            f"| {target.case} | {time_of(a)} | {target.against} | {time_of(b)} | {by:.2f} | {limit} | {'' if met else 'over'} |"
        )
        if by > target.at_most * 1.5 and beyond > target.slack * 2:
            over.append(f"{target.case}: {by:.2f}, at most {limit}")
    return lines, over


def contestants_table(results: dict[str, Result], largest: int) -> tuple[list[str], list[str]]:
    """Every contestant with its time and memory, and those of ours that need more memory than they may."""
    lines = ["| contestant | median | fastest | peak above the model |", "| --- | --- | --- | --- |"]
    over = []
    for name, result in results.items():
        if not result.runs:
            lines.append(f"| {name} | not run: {result.skipped} | | |")
            continue
        fastest = min(run.seconds for run in result.runs)
        peak = f"{result.peak / (1 << 20):,.0f} MiB" if result.peak else ""
        lines.append(f"| {name} | {time_of(result)} | {fastest * 1e3:,.0f} ms | {peak} |")
        if "ours" in name and result.peak > largest + SLACK_BYTES:
            over.append(f"{name}: a peak of {peak}, at most {(largest + SLACK_BYTES) >> 20} MiB")
    return lines, over


def time_of(result: Result) -> str:
    return f"{result.seconds * 1e3:,.0f} ms"


def conditions(rounds: int, total: int) -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        f"{machine()}; Python {platform.python_version()}, {', '.join(versions)}, {torch.get_num_threads()} threads; "
        f"{total / 1e9:.2f} GB of float32; median of {rounds}, in turns; {time.strftime('%Y-%m-%d')}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a sixth of the size, three rounds")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is over its target by half and more")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--only", default="", help="only the groups with a contestant whose name contains this")
    parser.add_argument("--rounds", type=int, help="runs of each contestant; 7, or 3 with --quick")
    parser.add_argument("--folder", type=Path, help="where the files are made; a temporary folder by default")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 7)
    blocks, layers = (BLOCKS // 6, 2_000) if options.quick else (BLOCKS, 10_000)
    sizes = [entry.numel() * 4 for entry in on_meta(partial(Transformer, blocks)).state_dict().values()]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), rounds, blocks, layers, options.only)
    targets, slow = targets_table(results)
    contestants, large = contestants_table(results, max(sizes))
    text = "\n".join([conditions(rounds, sum(sizes)), "", *targets, "", *contestants, ""])
    print(text)
    if options.write:
        before, _, rest = README.read_text("utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        README.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", "utf-8")
    for line in [*slow, *large] if options.check else []:
        print(f"over: {line}", file=sys.stderr)
    return 1 if options.check and (slow or large) else 0


if __name__ == "__main__":
    sys.exit(main())
