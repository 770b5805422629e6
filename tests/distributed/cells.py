"""One table for every engine: what is loaded (cases), how the model is spread (engines), what it is read from (sources).

Run as `python cells.py ENGINE FOLDER`, it is one process of an engine: it runs every cell of the table and leaves what each
rank holds in its own file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import warmstart
from warmstart import Conversion, Pretrained, Split

WORLD = {"ddp": 2, "fsdp2": 2, "fsdp2-meta": 2, "tp": 2, "2d": 4, "zero3": 2}
SOURCES = ("safetensors", "sharded", "torch", "dcp")


class Rotary(nn.Module):
    """Has a buffer that no file holds and that it makes itself."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequency", torch.empty(width), persistent=False)
        self.register_buffer("steps", torch.arange(3.0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.frequency.copy_(torch.arange(len(self.frequency)) / 7)


class Gain(nn.Module):
    """One element: on most ranks an empty shard."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.rand(1))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.value)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gain = Gain()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.sigmoid(self.q(x) * self.k(x)) * self.v(x))
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.gain.value


class Net(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 12, words: int = 10, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.rotary = Rotary(width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """What is loaded into what.

    Attributes:
        sizes: Arguments of `Net`.
        fields: `Pretrained`'s fields.
        keys: The checkpoint's tensors, from those of a trained `Net`.
    """

    sizes: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    keys: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another codebase's layout: q, k and v in one tensor, and other names."""
    out = {}
    for name, tensor in tensors.items():
        at, _, leaf = name.rpartition(".")
        if at.endswith((".k", ".v")):
            continue
        if at.endswith(".q"):
            tensor = torch.cat([tensors[f"{at[:-1]}{each}.{leaf}"] for each in "qkv"])
            name = f"{at[:-1]}qkv.{leaf}"
        out[name.replace("blocks", "encoder.layer")] = tensor
    return out


UNEVEN = {"width": 5, "hidden": 7, "words": 11}
CASES = {
    "full": Case(),
    "partial": Case(
        fields={"allow_missing": ["head", "blocks.1.up.bias"]},
        keys=lambda tensors: {k: v for k, v in tensors.items() if k not in ("head.weight", "blocks.1.up.bias")},
    ),
    "renamed": Case(
        fields={
            "rename": {r"encoder\.layer": "blocks"},
            "convert": [Conversion(["{b...}.qkv.{x}"], ["{b...}.q.{x}", "{b...}.k.{x}", "{b...}.v.{x}"], [Split(0)])],
        },
        keys=fused,
    ),
    "tied": Case({"tied": True}, keys=lambda tensors: {k: v for k, v in tensors.items() if k != "head.weight"}),
    "bf16": Case(keys=lambda tensors: {k: v.to(torch.bfloat16) for k, v in tensors.items()}),
    "uneven": Case(UNEVEN),
    "frozen": Case(UNEVEN, {"freeze": ["embed", "blocks.0"]}),
}  # fmt: skip


def trained(case: Case) -> dict[str, Tensor]:
    """The tensors of the checkpoint of a case."""
    torch.manual_seed(7)
    net = Net(**case.sizes)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.add_(torch.randn(tensor.shape) * 3)
    return {name: tensor.contiguous() for name, tensor in case.keys(net.state_dict()).items()}


def path_of(folder: Path, case: str, source: str) -> Path:
    suffix = {"safetensors": ".safetensors", "torch": ".pt"}.get(source, "")
    return folder / f"{case}-{source}{suffix}"


def fresh(case: Case) -> Net:
    """The model before the load, the same in every process."""
    torch.manual_seed(1)
    return Net(**case.sizes)


# Engines: each gives the model of a case, spread over the processes.


def ddp(case: Case) -> nn.Module:
    return nn.parallel.DistributedDataParallel(fresh(case))


def fsdp2(case: Case) -> nn.Module:
    return fully_sharded(fresh(case), case)


def fsdp2_meta(case: Case) -> nn.Module:
    with torch.device("meta"):
        net = fresh(case)
    net = fully_sharded(net, case)
    torch.manual_seed(1 + torch.distributed.get_rank())  # every rank draws like the first
    return net


def fully_sharded(net: Net, case: Case, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(net, **options)
    return net


def tensor_parallel(case: Case, mesh: Any = None) -> Net:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net = fresh(case)
    layers: dict[str, Any] = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel()}
    layers |= {f"blocks.*.{leaf}": ColwiseParallel() for leaf in ("q", "k", "v", "up")}
    layers |= {f"blocks.*.{leaf}": RowwiseParallel() for leaf in ("o", "down")}
    parallelize_module(net, mesh or init_device_mesh("cpu", (2,)), layers)
    if case.sizes.get("tied"):
        net.head.weight = net.embed.weight
    return net


def two_dimensional(case: Case) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fully_sharded(tensor_parallel(case, mesh["tp"]), case, mesh=mesh["dp"])


def zero3(case: Case) -> nn.Module:
    import deepspeed

    torch.manual_seed(1)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        return Net(**case.sizes)


BUILD: dict[str, Callable[[Case], nn.Module]] = {
    "ddp": ddp, "fsdp2": fsdp2, "fsdp2-meta": fsdp2_meta, "tp": tensor_parallel, "2d": two_dimensional, "zero3": zero3,
}  # fmt: skip


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, gathered by the engine itself."""
    out = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if hasattr(tensor, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                tensor = tensor.detach().clone()
        elif hasattr(tensor, "full_tensor"):
            tensor = tensor.detach().full_tensor()
        out[name.removeprefix("module.")] = tensor.detach().clone()
    return out


def run_cell(engine: str, name: str, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load one case into one spread model.

    Returns:
        What happened, and every tensor, whole.
    """
    case = CASES[name]
    model = BUILD[engine](case)
    entries = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    before = {key: (id(tensor), tensor.dtype) for key, tensor in entries}
    if engine == "ddp" and name == "frozen":
        held = whole(model)
        try:
            warmstart.load(model, path, **case.fields)
        except warmstart.TimingError as error:
            return {"refused": str(error)}, held
        return {}, whole(model)
    report = warmstart.load(model, Pretrained(path, **case.fields))
    entries = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    facts = {
        "bytes_read": report.bytes_read,
        "same_objects": before == {key: (id(tensor), tensor.dtype) for key, tensor in entries},
        "meta": [key for key, tensor in entries if tensor.is_meta],
        "trains": sorted(k.removeprefix("module.") for k, p in model.named_parameters() if p.requires_grad),
        "tied": len({id(p) for k, p in entries if k.endswith(("embed.weight", "head.weight"))}) == 1,
        "coverage": report.plan.coverage,
        "missing": [name.removeprefix("module.") for name in report.plan.missing],
        "notes": [str(note) for note in report.notes],
    }
    if report.frozen is not None:
        report.frozen.check()
        report.frozen.check(sampled=True)
    report.check(model)
    return facts, whole(model)


@contextlib.contextmanager
def processes(engine: str, rank: int, world: int, folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    if engine == "zero3":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; else a kernel is compiled first
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    yield
    torch.distributed.barrier()


def main(engine: str, rank: int, world: int, folder: Path) -> None:
    facts: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    with processes(engine, rank, world, folder / engine):
        for source in SOURCES:
            for name in CASES:
                cell = f"{name}-{source}"
                try:
                    facts[cell], tensors[cell] = run_cell(engine, name, path_of(folder, name, source))
                except Exception:
                    facts[cell] = {"error": traceback.format_exc()}
        from stories import STORIES

        for story in STORIES.get(engine, []):
            try:
                story(folder)
                facts[story.__name__] = {}
            except Exception:
                facts[story.__name__] = {"error": traceback.format_exc()}
        torch.save(tensors, folder / engine / f"{rank}.pt")
        (folder / engine / f"{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[2]))
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
