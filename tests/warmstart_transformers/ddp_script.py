"""Run by test_ddp.py under torchrun: two gloo processes; each rank writes what it saw to a file of its own."""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from tiny import BEFORE_5, Plain, bert, make_trainer, weights
from transformers import TrainerCallback

from warmstart import WarmStartError
from warmstart_transformers import WarmStartCallback

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found: dict[str, object] = {}


def values(module):
    return {name: value.tolist() for name, value in weights(module).items()}


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = values(model)


class Write(TrainerCallback):
    """Writes to a weight on rank 1 alone, at one moment."""

    def __init__(self, moment, pick):
        setattr(self, moment, lambda *_, model=None, **__: self.write(pick(model)))

    def write(self, tensor):
        if rank == 1:
            with torch.no_grad():
                tensor.view(-1)[0] += 1


def run(name, model, *callbacks, resume=None, seed=0, **kwargs):
    look = Look()
    try:
        trainer = make_trainer(folder / name, model, *callbacks, look, ddp_backend="gloo", seed=seed, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
    except WarmStartError as error:
        found[name] = {
            "error": type(error).__name__,
            "message": str(error),
            "tensors": list(getattr(error, "tensors", ())),
        }
        return
    warm = next(c for c in callbacks if isinstance(c, WarmStartCallback))
    found[name] = {
        "start": look.start,
        "end": values(model),
        "status": warm.report.status if warm.report else None,
        "wrapped": type(trainer.model_wrapped).__name__,
        "trainable": sorted(n for n, p in model.named_parameters() if p.requires_grad),
    }


def warm(**kwargs):
    return WarmStartCallback(folder / "bert.safetensors", **kwargs)


if __name__ == "__main__":
    # every rank starts from another random model: what is equal at the start was made so
    run("frozen", bert(rank), warm(freeze="bert.encoder"), save_strategy="epoch")
    if not BEFORE_5:
        resume = str(folder / "frozen/checkpoint-2")
        run("resumed", bert(rank + 2), warm(freeze="bert.encoder"), num_train_epochs=2, resume=resume)
    run("unfrozen", bert(rank), warm(freeze="bert.encoder", unfreeze={1: "bert.encoder.layer.1"}), num_train_epochs=2)
    run(
        "cannot bear unused",
        bert(rank),
        warm(freeze=True, unfreeze={1: "bert.pooler"}),
        ddp_find_unused_parameters=False,
    )
    corrupt = Write("on_train_begin", lambda model: model.bert.pooler.dense.weight)
    run("corrupted", bert(rank), corrupt, warm())
    drift = Write("on_step_end", lambda model: model.encoder[1].running_mean)
    run("drifted", Plain(), drift, WarmStartCallback(folder / "encoder.pt", into="encoder", freeze=True))
    run("rank 1 has no file", bert(rank), WarmStartCallback(folder / f"only-{rank}.safetensors", verify="off"))
    reader = WarmStartCallback(folder / f"only-{rank}.safetensors", freeze="bert.encoder", read="broadcast")
    run("rank 0 reads for rank 1", bert(rank), reader)
    run("rank 1 has another file", bert(rank), WarmStartCallback(folder / f"other-{rank}.safetensors"))
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
