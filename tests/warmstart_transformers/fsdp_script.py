"""Run by test_fsdp.py under torchrun: two gloo processes that shard by FSDP; each rank writes what it saw to a file."""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny import bert, texts
from torch.distributed.tensor import DTensor
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from warmstart import MapRows
from warmstart_transformers import WarmStartCallback

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found: dict[str, object] = {}


def whole(model):
    state = model.state_dict()
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).tolist() for name, v in state.items()}


def shard_by_fsdp(version, state_dict_type, efficient):
    """accelerate chooses FSDP on accelerators alone; everything behind that choice runs on the CPU too."""
    AcceleratorState._reset_state(True)
    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=efficient, state_dict_type=state_dict_type,
    )  # fmt: skip
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.start = whole(model)
        self.sharded = all(isinstance(p, DTensor) for p in model.parameters())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.optimized = sorted(name for name, p in model.named_parameters() if id(p) in held)


class Write(TrainerCallback):
    """Writes to this rank's shard of a weight on rank 1 alone, at one moment."""

    def __init__(self, moment, name):
        setattr(self, moment, lambda *_, model=None, **__: self.write(model.get_parameter(name)))

    @torch.no_grad()
    def write(self, parameter):
        if rank == 1:
            parameter.to_local().view(-1)[0] += 1


def run(
    name, model, *callbacks, resume=None, version=2, state_dict_type="SHARDED_STATE_DICT", efficient=False, epochs=1
):
    look = Look()
    try:
        args = TrainingArguments(
            str(folder / name), num_train_epochs=epochs, save_strategy="epoch", report_to=[], disable_tqdm=True,
            per_device_train_batch_size=4, learning_rate=0.01, weight_decay=0.1, use_cpu=True, ddp_backend="gloo",
            logging_strategy="no",
        )  # fmt: skip
        shard_by_fsdp(version, state_dict_type, efficient)
        trainer = Trainer(model, args, train_dataset=texts(), callbacks=[*callbacks, look])
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    except BaseException as error:  # torch's own of a checkpoint that does not fit is no Exception
        kind = type(error).__name__
        found[name] = {"error": kind, "message": str(error), "tensors": list(getattr(error, "tensors", ()))}
        return
    trained = trainer.model
    found[name] = {
        "start": look.start,
        "end": whole(trained),
        "sharded": look.sharded,
        "optimized": look.optimized,
        "status": callbacks[0].report.status if callbacks[0].report else None,
        "eval": sorted(path for path, module in trained.named_modules() if not module.training),
    }


def warm(**kwargs):
    return WarmStartCallback(folder / "bert.safetensors", **kwargs)


# 43 rows do not divide by two; the last three are new, the others come back to front
TABLE = "bert.embeddings.word_embeddings.weight"
HELD = {"*word_embeddings": MapRows(old=list(range(40)), new=[*reversed(range(40)), 40, 41, 42], freeze_old=True)}


def resized(seed):
    model = bert(seed)
    model.resize_token_embeddings(43, mean_resizing=False)
    return model


def from_pretrained_on_one_rank():
    """As `accelerate launch --fsdp_cpu_ram_efficient_loading true` has it."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ |= asked
    model = BertForSequenceClassification.from_pretrained(folder / "base")
    for name in asked:
        del os.environ[name]
    found["placeholders"] = sorted(name for name, p in model.named_parameters() if p.is_meta)
    return model


if __name__ == "__main__":
    # every rank starts from another random model: what is equal at the start was made so
    run("plain", bert(rank), warm())
    run("frozen", bert(rank), warm(freeze="bert.encoder"))
    run("resumed", bert(rank + 2), warm(freeze="bert.encoder"), epochs=2, resume="frozen/checkpoint-2")
    run("another freeze", bert(rank + 2), warm(freeze="bert.embeddings"), epochs=2, resume="frozen/checkpoint-2")
    run("unfrozen", bert(rank), warm(freeze="bert.encoder", unfreeze={1: "bert.encoder.layer.1"}), epochs=2)
    run("corrupted", bert(rank), Write("on_train_begin", "bert.pooler.dense.weight"), warm())
    run("drifted", bert(rank), Write("on_step_end", "bert.encoder.layer.0.output.dense.weight"), warm(freeze=True))
    run("rows", resized(rank), warm(adapt=HELD))
    run("rows resumed", resized(rank + 2), warm(adapt=HELD), epochs=2, resume="rows/checkpoint-2")
    run("rows drifted", resized(rank), Write("on_step_end", TABLE), warm(adapt=HELD))
    full = {"state_dict_type": "FULL_STATE_DICT"}
    run("full", bert(rank), warm(), **full)
    run("full resumed", bert(rank + 2), warm(), epochs=2, resume="full/checkpoint-2", **full)
    if rank == 0:
        path = folder / "full" / "checkpoint-2" / "pytorch_model_fsdp.bin"
        torch.save({f"foo.{name}": value for name, value in torch.load(path).items()}, path)
    torch.distributed.barrier()
    run("full matches nothing", bert(rank + 2), warm(), epochs=2, resume="full/checkpoint-2", **full)
    run("one rank alone", from_pretrained_on_one_rank(), warm(), efficient=True)
    run("version 1", bert(rank), warm(), version=1)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
