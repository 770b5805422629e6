"""What reading a large checkpoint costs: peak anonymous memory for all of it, and bytes from disk for one tensor of 24.

`python benchmarks/checkpoint_memory.py [MEGABYTES]` writes a file of each format into a temporary folder, opens it in a
process of its own and reads it tensor by tensor. Linux only: memory is RssAnon of /proc/self/status, which leaves out the
pages of mapped files; bytes from disk are read_bytes of /proc/self/io after the file was dropped from the page cache.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

TENSORS = 24
ALLOWANCE = 32 << 20

READER = """
import json, sys, threading, time
import torch
import warmstart

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

def from_disk():
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))

warmstart.open_checkpoint({"w": torch.zeros(2)}).read("w").sum()
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, status("RssAnon"))
        time.sleep(0.002)

before, disk, start = status("RssAnon"), from_disk(), time.perf_counter()
thread = threading.Thread(target=watch)
thread.start()
checkpoint = warmstart.open_checkpoint(sys.argv[1])
keys = checkpoint.keys()[5:6] if sys.argv[2] == "one" else checkpoint.keys()
for key in keys:
    tensor = checkpoint.read(key)
    tensor.sum()
    peak = max(peak, status("RssAnon"))
    del tensor
done.set()
thread.join()
print(json.dumps({"anonymous": peak - before, "disk": from_disk() - disk, "read": checkpoint.bytes_read,
                  "seconds": time.perf_counter() - start}))
"""


def tensors(megabytes: int) -> dict[str, Tensor]:
    """24 tensors of one size; their values pack to about a third."""
    side = int((megabytes * (1 << 20) / TENSORS / 4) ** 0.5)
    generator = np.random.default_rng(0)
    rows = generator.integers(-128, 128, (side, side), dtype=np.int8).astype(np.float32)
    return {f"layers.{i}.weight": torch.from_numpy(np.roll(rows, i)) for i in range(TENSORS)}


def write_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file(state, path)
    return path


def write_shards(state: dict[str, Tensor], path: Path) -> Path:
    path.mkdir()
    names = list(state)
    shards = {f"model-{i // 6 + 1:05}-of-00004.safetensors": names[i : i + 6] for i in range(0, TENSORS, 6)}
    for shard, inside in shards.items():
        safetensors.torch.save_file({name: state[name] for name in inside}, path / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_zip(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def write_legacy(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def write_dcp(state: dict[str, Tensor], path: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    return path


def write_npz(state: dict[str, Tensor], path: Path) -> Path:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    return path


def write_packed_npz(state: dict[str, Tensor], path: Path) -> Path:
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: tensor.numpy() for name, tensor in state.items()})
    return path


def write_npy_folder(state: dict[str, Tensor], path: Path) -> Path:
    path.mkdir()
    for name, tensor in state.items():
        np.save(path / f"{name}.npy", tensor.numpy())
    return path


def write_hdf5(state: dict[str, Tensor], path: Path, **options: object) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        for name, tensor in state.items():
            file.create_dataset(name, data=tensor.numpy(), **options)
    return path


def write_packed_hdf5(state: dict[str, Tensor], path: Path) -> Path:
    return write_hdf5(state, path, chunks=(256, 256), compression="gzip", compression_opts=1, shuffle=True)


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "safetensors": write_safetensors,
    "safetensors, 4 shards": write_shards,
    "torch zip": write_zip,
    "torch legacy": write_legacy,
    "torch DCP": write_dcp,
    "numpy npz": write_npz,
    "numpy npz, packed": write_packed_npz,
    "numpy npy, a folder": write_npy_folder,
    "HDF5": write_hdf5,
    "HDF5, packed": write_packed_hdf5,
}


def files_of(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def drop_from_cache(path: Path) -> None:
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(path: Path, what: str) -> dict[str, float]:
    drop_from_cache(path)
    command = [sys.executable, "-c", READER, str(path), what]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def row(name: str, write: Callable[[dict[str, Tensor], Path], Path], state: dict[str, Tensor]) -> tuple[str, bool]:
    largest = max(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory() as folder:
        path = write(state, Path(folder) / "weights")
        on_disk = sum(file.stat().st_size for file in files_of(path))
        whole, one = measure(path, "all"), measure(path, "one")
    fits = whole["anonymous"] <= largest + ALLOWANCE
    cells = [
        name,
        mib(on_disk),
        f"{mib(whole['anonymous'])}{'' if fits else ' (over)'}",
        f"{whole['seconds']:.1f} s",
        mib(one["read"]),
        mib(one["disk"]),
        mib(one["anonymous"]),
    ]
    return f"| {' | '.join(cells)} |", fits


def mib(count: float) -> str:
    return f"{count / (1 << 20):,.1f}"


def main(megabytes: int) -> int:
    """Print the table; 1 if a format needs more than its largest tensor and 32 MiB."""
    state = tensors(megabytes)
    largest = max(tensor.nbytes for tensor in state.values())
    total = sum(tensor.nbytes for tensor in state.values())
    print(f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{TENSORS} tensors, {mib(total)} MiB; the largest {mib(largest)} MiB, so the bound is {mib(largest + ALLOWANCE)} MiB"
    )
    print()
    print("| format | on disk | all: peak | all: time | one: asked for | one: from disk | one: peak |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    kept = []
    for name, write in FORMATS.items():
        line, fits = row(name, write, state)
        print(line, flush=True)
        kept.append(fits)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1536))
