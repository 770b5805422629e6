"""Run by test_broadcast.py as `python broadcast_ranks.py FOLDER`: one of several gloo processes, all cells."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import warmstart
from warmstart import Conversion, Split
from warmstart.loading import relaying

RANK, WORLD, FOLDER = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
CELLS: dict[str, Callable[[], object]] = {}
SPLIT = Conversion(["{x...}.qkv.weight"], ["{x...}.q.weight", "{x...}.k.weight", "{x...}.v.weight"], [Split(0)])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.out = nn.Linear(6, 7)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(RANK)  # what is equal on all ranks was loaded
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(7, 2)
        self.register_buffer("steps", torch.tensor(0))


def cell(run: Callable[[], object]) -> None:
    CELLS[run.__name__] = run


def sharded(device: str = "cpu") -> Net:
    with torch.device(device):
        net = Net()
    for block in net.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (WORLD,)))
    return fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))


def whole(net: nn.Module) -> dict[str, list]:
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in net.state_dict().items()}
    return {name: tensor.tolist() for name, tensor in full.items()}


def load(net: nn.Module, path: Path, **fields) -> dict[str, object]:
    report = warmstart.load(net, path, read="broadcast", convert=[SPLIT], **fields)
    report.check(net)
    return {"values": whole(net), "read": report.bytes_read, "status": report.status}


def attempt(net: nn.Module, run: Callable[[], object]) -> dict[str, object]:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        run()
        found: dict[str, object] = {"type": None}
    except Exception as error:
        found = {"type": type(error).__name__, "message": str(error), "written": list(getattr(error, "written", ()))}
    found["untouched"] = all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return found


def only_on(*ranks: int, name: str = "good.safetensors") -> Path:
    return FOLDER / name if RANK in ranks else FOLDER / "nowhere" / name


def on_nodes(*names: str) -> None:
    """Let ranks take themselves to be on several machines."""
    relaying.node = lambda: names[RANK]


@cell
def file_on_the_first_rank_only():
    return load(Net(), only_on(0))


@cell
def file_on_the_last_rank_only():
    return load(Net(), only_on(WORLD - 1))


@cell
def file_on_one_node_only():
    on_nodes("a", "b", "b")
    return load(Net(), only_on(0))


@cell
def a_reader_on_each_node():
    on_nodes("a", "b", "b")
    return load(Net(), FOLDER / "good.safetensors")


@cell
def fully_sharded():
    return load(sharded(), only_on(0))


@cell
def fully_sharded_on_meta():
    net = sharded("meta")
    return load(net, only_on(0)) | {"meta": [n for n, t in net.state_dict().items() if t.is_meta]}


@cell
def torch_file():
    return load(sharded(), only_on(1, name="good.pt"))


@cell
def a_run_s_checkpoint():
    report = warmstart.load(Net(), only_on(1, name="run.ckpt"), read="broadcast", convert=[SPLIT])
    return [ancestor["sources"] for ancestor in report.lineage["ancestors"]]


@cell
def a_plan_that_every_rank_made():
    net = sharded()
    report = warmstart.plan(net, FOLDER / "good.safetensors", convert=[SPLIT]).apply(read="broadcast", verify="sample")
    report.check(net)
    return {"values": whole(net), "read": report.bytes_read, "status": report.status}


@cell
def nobody_has_it():
    net = Net()
    return attempt(net, lambda: load(net, only_on()))


@cell
def reader_cannot_open_it():
    net = Net()
    return attempt(net, lambda: load(net, only_on(0, name="cut.safetensors")))


@cell
def planning_fails():
    net = Net()
    return attempt(net, lambda: load(net, only_on(0), exclude="nothing"))


@cell
def in_memory():
    net = Net()
    return attempt(net, lambda: warmstart.load(net, net.state_dict(), read="broadcast"))


@cell
def no_such_mode():
    net = Net()
    return attempt(net, lambda: warmstart.load(net, FOLDER / "good.safetensors", convert=[SPLIT], read="scatter"))


@cell
def other_modes():
    net = Net()
    mode = "local" if RANK == 1 else "broadcast"
    return attempt(net, lambda: warmstart.load(net, FOLDER / "good.safetensors", convert=[SPLIT], read=mode))


@cell
def local_without_a_file():
    net = Net()
    return attempt(net, lambda: warmstart.load(net, only_on(0), convert=[SPLIT]))


def failing_midway(rank: int) -> dict[str, object]:
    """A disk fails under the reader, or a rank fails by itself, before the third tensor is passed on."""
    net = Net()
    plan = warmstart.plan(net, FOLDER / "good.safetensors", convert=[SPLIT])
    tensor = relaying.Relay.tensor
    asked = []

    def failing(self, checkpoint, key):
        asked.append(key)
        if len(asked) == 3 and rank == RANK:
            raise OSError(5, "Input/output error")
        return tensor(self, checkpoint, key)

    relaying.Relay.tensor = failing
    try:
        return attempt(net, lambda: plan.apply(read="broadcast"))
    finally:
        relaying.Relay.tensor = tensor


@cell
def reader_fails_midway():
    return failing_midway(0)


@cell
def receiver_fails_midway():
    return failing_midway(2)


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.FileStore(str(FOLDER / "store"), WORLD), rank=RANK, world_size=WORLD)
    found, node = {}, relaying.node
    for name, run in CELLS.items():
        print(name, flush=True)
        relaying.node = node
        found[name] = run()
        dist.barrier()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
