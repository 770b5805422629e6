"""A large file into a fully sharded model: time, memory and bytes of each rank, beside torch's own loader and accelerate's.

`python benchmarks/distributed.py [GIB [ROUNDS]]`: two processes with FSDP2 on the CPU, the model on the meta device and
sharded. Every contestant gets fresh processes, in turns; the file is in the page cache. Linux only: the peak of anonymous
memory is sampled from /proc. Ends with an error if a rank reads more than 0.55 of the file with `read="local"`, or if in any
load of ours its memory rises by more than its own shards, the largest tensor and 64 MiB.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WORLD = 2
WIDTH = 4096  # a weight of 64 MiB
CONTESTANTS = {
    "local": 'warmstart, read="local"',
    "broadcast": 'warmstart, read="broadcast"',
    "verified": 'warmstart, read="local", verify="full"',
    "torch": "set_model_state_dict, broadcast_from_rank0",
    "accelerate": "accelerate, fsdp2_load_full_state_dict",
}
OURS = ("local", "broadcast", "verified")


def memory(kind: str) -> int:
    """Bytes of this process's memory of one kind: RssAnon, RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {kind}")


class Peak:
    """The highest anonymous memory while a block runs, above what there was before."""

    def __enter__(self) -> Peak:
        self.start = self.peak = memory("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.rise = max(self.peak, memory("RssAnon")) - self.start


def rank_main(name: str, rank: int, folder: Path, layers: int) -> None:
    import torch
    import torch.distributed as dist
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
    from safetensors.torch import load_file
    from torch import nn
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import warmstart

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    path = folder / "model.safetensors"
    small = nn.Linear(8, 8)
    fully_shard(small, mesh=mesh)
    warmstart.load(small, {"weight": torch.ones(8, 8), "bias": torch.ones(8)})  # imports and buffers of the first use
    dist.broadcast(torch.ones(WIDTH), 0)

    class Accelerator:  # all that its loader asks of one
        is_main_process = rank == 0
        device = torch.device("cpu")

    report = None
    dist.barrier()
    with Peak() as peak:
        started = time.perf_counter()
        if name in ("local", "broadcast"):
            report = warmstart.load(net, path, verify="off", read=name)
        elif name == "verified":
            report = warmstart.load(net, path, verify="full")
        else:
            full = load_file(path) if rank == 0 else {}
            if name == "torch":
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_model_state_dict(net, full, options=options)
            else:
                fsdp2_load_full_state_dict(Accelerator(), net, full)
        seconds = time.perf_counter() - started
    first = net[0].weight.full_tensor()
    assert torch.equal(first, load_file(path)["0.weight"])
    found = {"seconds": seconds, "peak": peak.rise, "read": report.bytes_read if report else None}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def run(name: str, folder: Path, layers: int) -> list[dict[str, Any]]:
    (folder / "store").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--rank", name]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(rank), str(folder), str(layers)], env=env) for rank in range(WORLD)]
    if any(process.wait(900) for process in running):
        raise SystemExit(f"{name}: a rank failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def main(gib: float, rounds: int) -> int:
    import torch
    from safetensors.torch import save_file

    tensor = WIDTH * WIDTH * 4
    layers = round(gib * (1 << 30) / tensor)
    size = layers * tensor
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        save_file({f"{i}.weight": torch.randn(WIDTH, WIDTH) for i in range(layers)}, folder / "model.safetensors")
        runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in CONTESTANTS}
        for _ in range(rounds):
            for name in CONTESTANTS:
                runs[name].append(run(name, folder, layers))
    seconds = {name: statistics.median(max(r["seconds"] for r in ranks) for ranks in runs[name]) for name in runs}
    peaks = {name: [max(ranks[i]["peak"] for ranks in runs[name]) for i in range(WORLD)] for name in runs}
    print(
        f"file {size / 2**20:,.0f} MiB, own shards {size / WORLD / 2**20:,.0f} MiB, largest tensor {tensor >> 20} MiB\n"
    )
    print("| loader | time | ratio | memory, rank 0 / 1 | ratio | read of the file, rank 0 / 1 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, words in CONTESTANTS.items():
        read = [ranks["read"] for ranks in runs[name][-1]]
        shares = "-" if None in read else " / ".join(f"{each / size:.2f}" for each in read)
        memories = " / ".join(f"{each / 2**20:,.0f} MiB" for each in peaks[name])
        ratios = seconds[name] / seconds["local"], max(peaks[name]) / max(peaks["local"])
        print(f"| {words} | {seconds[name]:.2f} s | {ratios[0]:.2f} | {memories} | {ratios[1]:.2f} | {shares} |")
    bound = size / WORLD + tensor + (64 << 20)
    wrong = [name for name in OURS if max(peaks[name]) > bound]
    wrong += [f"bytes of {n}" for n in ("local", "verified") if max(r["read"] for r in runs[n][-1]) > 0.55 * size]
    print(f"\nbound of memory: {bound / 2**20:,.0f} MiB; over a bound: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    given = [*sys.argv[1:], *("1.5", "3")[len(sys.argv) - 1 :]]
    raise SystemExit(main(float(given[0]), int(given[1])))
