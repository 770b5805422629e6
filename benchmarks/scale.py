"""What a load reads on each rank of a large run, without the run: torch's `fake` process group and real names and shapes.

`python benchmarks/scale.py RANK WORLD MODEL [LAYERS]`: the model `70b` (dense) or `1t` (a mixture of 384 experts a layer) on
the meta device, fully sharded, seen from one rank. Prints JSON: bytes that this rank reads with `read="local"`, the whole
checkpoint's, the largest tensor's, how many tensors there are, and how many pieces `read="broadcast"` passes on.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import warmstart
from warmstart.checkpoints.base import Checkpoint, TensorInfo
from warmstart.loading.relaying import PIECE
from warmstart.loading.values import Values
from warmstart.shards import shard_of

LAYERS = {"70b": 80, "1t": 60}


class Counting(Checkpoint):
    """Names, shapes and dtypes; what is asked for is counted and has no data."""

    def read(self, key, index=None):
        tensor = self._read(key, index)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _read(self, key, index):
        info = self.info(key)
        whole = torch.empty(info.shape, dtype=info.dtype, device="meta")
        return whole if index is None else whole[index]


def linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def attention(width: int, heads: int) -> nn.Module:
    layer = nn.Module()
    layer.q, layer.k, layer.v, layer.o = (
        linear(width, width),
        linear(heads, width),
        linear(heads, width),
        linear(width, width),
    )
    return layer


def mlp(width: int, hidden: int) -> nn.Module:
    layer = nn.Module()
    layer.gate, layer.up, layer.down = linear(hidden, width), linear(hidden, width), linear(width, hidden)
    return layer


def build(name: str, layers: int) -> nn.Module:
    net = nn.Module()
    width, vocabulary = (8192, 128256) if name == "70b" else (7168, 163840)
    net.embed, net.head, net.norm = nn.Embedding(vocabulary, width), linear(vocabulary, width), nn.RMSNorm(width)
    net.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.attention = attention(width, 1024)
        layer.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        if name == "70b":
            layer.mlp = mlp(width, 28672)
        else:
            layer.router = linear(384, width)
            layer.experts = nn.ModuleList(mlp(width, 2048) for _ in range(384))
        net.layers.append(layer)
    return net


def main(rank: int, world: int, name: str, layers: int) -> None:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    with torch.device("meta"):
        net = build(name, layers).to(torch.bfloat16)
    infos = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in net.state_dict().items()}
    mesh = init_device_mesh("cpu", (world,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    checkpoint = Counting(location="simulated", format="simulated", infos=infos)
    plan = warmstart.plan(net, checkpoint)
    values = Values(plan)
    for assignment in plan.written:
        values.needed(assignment, shard_of(plan.targets.entries[assignment.target].tensor))
    sizes = [info.nbytes for info in infos.values()]
    found = {
        "local": checkpoint.bytes_read,
        "file": sum(sizes),
        "largest": max(sizes),
        "tensors": len(sizes),
        "pieces": sum(-(-size // PIECE) for size in sizes),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    model = sys.argv[3]
    main(int(sys.argv[1]), int(sys.argv[2]), model, int(sys.argv[4]) if len(sys.argv) > 4 else LAYERS[model])
