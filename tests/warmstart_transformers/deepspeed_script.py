"""Run by test_deepspeed.py under torchrun: two processes that train by DeepSpeed; each writes what it saw to a file."""

import json
import os
import sys
import traceback
from pathlib import Path

import deepspeed
import torch
from tiny import bert_config, texts
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from warmstart.shards import local_of
from warmstart_transformers import WarmStartCallback

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; else a kernel is compiled first
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found: dict[str, object] = {}


def whole(model):
    out = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        with deepspeed.zero.GatheredParameters([tensor]):
            out[name] = tensor.detach().float().tolist()
    return out


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = whole(model)


class Write(TrainerCallback):
    """Writes to this rank's part of a weight on rank 1 alone, at one moment."""

    def __init__(self, moment, write):
        setattr(self, moment, lambda *_, model=None, **__: write(model) if rank == 1 else None)


def plain():
    return BertForSequenceClassification(bert_config())


def partitioned():
    """As `from_config` makes it where TrainingArguments have said ZeRO-3: under deepspeed.zero.Init."""
    return BertForSequenceClassification._from_config(bert_config())


def run(name, stage, *callbacks, make=plain, seed=0, resume=None, bf16=False, epochs=1, attach=False):
    torch.manual_seed(100 * seed + rank)
    print(name, flush=True)
    look = Look()
    config = {
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": bf16},
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    }  # fmt: skip
    try:
        args = TrainingArguments(
            str(folder / name), num_train_epochs=epochs, save_strategy="epoch", report_to=[], disable_tqdm=True,
            per_device_train_batch_size=4, learning_rate=0.01, weight_decay=0.1, use_cpu=True, ddp_backend="gloo",
            logging_strategy="no", deepspeed=config, bf16=bf16,
        )  # fmt: skip
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        model = make()
        kind = sorted({hasattr(p, "ds_id") for p in model.parameters()})
        trainer = Trainer(model, args, train_dataset=texts(), callbacks=[*callbacks, look])
        if attach:
            callbacks[0].attach(trainer)
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    except Exception as error:
        found[name] = {
            "error": type(error).__name__, "message": str(error), "trace": traceback.format_exc(),
            "tensors": list(getattr(error, "tensors", ())),
        }  # fmt: skip
        return
    found[name] = {
        "made": kind,
        "start": look.start,
        "end": whole(model),
        "kind": type(trainer.accelerator._optimizers[0].optimizer).__name__,
        "status": callbacks[0].report.status if callbacks[0].report else None,
        "eval": sorted(path for path, module in model.named_modules() if not module.training),
    }


def warm(name="bert.safetensors", **kwargs):
    return WarmStartCallback(folder / name, **kwargs)


def zero_values(model):
    local_of(model.bert.pooler.dense.weight).zero_()


def zero_copies(model):
    weight = model.bert.pooler.dense.weight
    weight._z3_optimizer.get_local_fp32_param(weight).detach().zero_()


if __name__ == "__main__":
    for stage in (3, 2):
        run(f"plain {stage}", stage, warm())
        run(f"frozen {stage}", stage, warm(freeze="bert.encoder"))
        again = {"seed": 2, "epochs": 2, "resume": f"frozen {stage}/checkpoint-2"}
        run(f"resumed {stage}", stage, warm(freeze="bert.encoder"), **again)
        run(f"resumed without {stage}", stage, warm("gone.safetensors", into="bert", freeze="bert.encoder"), **again)
        run(f"another freeze {stage}", stage, warm(freeze="bert.embeddings"), attach=True, **again)
    run("partitioned", 3, warm(freeze="bert.encoder"), make=partitioned)
    run("bf16", 3, warm(), bf16=True)
    run("other values", 3, Write("on_train_begin", zero_values), warm())
    run("other copies", 3, Write("on_train_begin", zero_copies), warm(), bf16=True)
    run("unfreeze", 3, warm(freeze=True, unfreeze={1: "bert.encoder"}))
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
