"""Run by test_deepspeed.py: two processes under accelerate's DeepSpeed; each leaves what it saw in a file."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import deepspeed
import loops
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from warmstart import MapRows
from warmstart.shards import local_of
from warmstart_accelerate import warm_start

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; else a kernel is compiled first
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])


def engine(stage: int, dtype: str = "bf16") -> Accelerator:
    """Accelerate starts no processes for DeepSpeed on CPUs: its state is told."""
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, dtype: {"enabled": True}}
    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    plugin.select(_from_accelerator_state=True)
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.DEEPSPEED
    AcceleratorState._shared_state["deepspeed_plugins"] = plugin
    return accelerator


def whole(model: torch.nn.Module) -> dict[str, object]:
    out = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        with deepspeed.zero.GatheredParameters([tensor]):
            out[name] = tensor.detach().float().tolist()
    return out


def step(accelerator, engine, optimizer, dtype=torch.bfloat16):
    accelerator.backward(engine(torch.randn(4, 4).to(dtype)).float().square().mean())
    optimizer.step()


def prepared(accelerator, model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return accelerator.prepare(model, optimizer)


def loaded(stage, model=None, dtype="bf16", **options):
    accelerator = engine(stage, dtype)
    model = loops.Smooth() if model is None else model(stage)
    report = warm_start(accelerator, model, folder / "encoder.pt", into="encoder", freeze="encoder.0", **options)
    wrapped, optimizer = prepared(accelerator, model)
    start = whole(model)
    step(accelerator, wrapped, optimizer, torch.bfloat16 if dtype == "bf16" else torch.float32)
    report.frozen.check()
    kind = type(accelerator._optimizers[0].optimizer).__name__
    return {"start": start, "end": whole(model), "status": report.status, "optimizer": kind}


def partitioned(stage):
    config = {"train_batch_size": 8, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        return loops.Smooth()


def zero3():
    return loaded(3)


def zero2():
    return loaded(2)


def zero1():
    return loaded(1)


def zero3_float32():
    return loaded(3, dtype="float32")


def zero_init():
    return loaded(3, partitioned)


def overwritten_on_one_rank():
    accelerator, model = engine(3), loops.Smooth()
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder")
    wrapped, _ = prepared(accelerator, model)
    if rank == 1:
        local_of(model.encoder[0].weight).zero_()
    wrapped(torch.randn(4, 4).bfloat16())


def other_copies(stage):
    accelerator, model = engine(stage), loops.Smooth()
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder")
    wrapped, _ = prepared(accelerator, model)
    if rank == 1:
        weight = model.encoder[2].weight
        if stage == 3:
            weight._z3_optimizer.get_local_fp32_param(weight).detach().zero_()
        else:
            for parameter in model.encoder.parameters():
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.hp_fragment.detach().zero_()
    wrapped(torch.randn(4, 4).bfloat16())


def other_copies_3():
    other_copies(3)


def other_copies_2():
    other_copies(2)


def after_prepare():
    accelerator, model = engine(3), loops.Smooth()
    prepared(accelerator, model)
    warm_start(accelerator, model, folder / "encoder.pt", into="encoder")


def released_later():
    model = loops.Smooth()
    warm_start(engine(3), model, folder / "encoder.pt", into="encoder", freeze=True, unfreeze={2: "encoder.0"})


def rows_held():
    rows = MapRows(old=list("abcdefgh"), new=list("abcdefgh"), freeze_old=True)
    warm_start(engine(2), loops.Smooth(), folder / "encoder.pt", into="encoder", adapt={"encoder.2.weight": rows})


def resumed(stage, source):
    first = engine(stage)
    model = loops.Smooth()
    warm_start(first, model, folder / "encoder.pt", into="encoder", freeze="encoder.0")
    wrapped, optimizer = prepared(first, model)
    for _ in range(3):
        step(first, wrapped, optimizer)
        optimizer.zero_grad()
    saved = folder / f"state-{stage}-{source}"
    first.save_state(saved)
    left = whole(model)
    loops.fresh()
    torch.manual_seed(5)
    second, model = engine(stage), loops.Smooth()
    report = warm_start(second, model, folder / source, into="encoder", freeze="encoder.0")
    wrapped, optimizer = prepared(second, model)
    second.load_state(saved)
    start = whole(model)
    step(second, wrapped, optimizer)
    report.frozen.check()
    return {"left": left, "start": start, "end": whole(model), "status": report.status}


def resumed_3():
    return resumed(3, "encoder.pt")


def resumed_2():
    return resumed(2, "encoder.pt")


def resumed_without_the_file_3():
    return resumed(3, "gone.pt")


def resumed_without_the_file_2():
    return resumed(2, "gone.pt")


CASES = [
    zero3, zero2, zero1, zero3_float32, zero_init, overwritten_on_one_rank, other_copies_3, other_copies_2, after_prepare,
    released_later, rows_held, resumed_3, resumed_2, resumed_without_the_file_3, resumed_without_the_file_2,
]  # fmt: skip

if __name__ == "__main__":
    found: dict[str, object] = {}
    for case in CASES:
        loops.fresh()
        torch.manual_seed(rank)
        print(case.__name__, flush=True)
        try:
            found[case.__name__] = case()
        except Exception as error:
            found[case.__name__] = {
                "error": type(error).__name__,
                "message": str(error),
                "trace": traceback.format_exc(),
            }
        (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)
