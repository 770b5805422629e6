"""The right order in a loop of one's own, and what is said where it is another."""

from __future__ import annotations

import gc

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from warmstart import TimingError

BEFORE_PREPARE = (
    "load first, then prepare:\n"
    "       report = warm_start(accelerator, model, ...)\n"
    "       model, optimizer = accelerator.prepare(model, optimizer)"
)
BEFORE_OPTIMIZER = (
    "load first, then make the optimizer:\n"
    "       report = warm_start(accelerator, model, ...)\n"
    "       optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)"
)


def refuse_prepared(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse a model that `prepare` or a wrapper has already, unless it holds shards: those exist only afterwards.

    Raises:
        TimingError: It has.
    """
    if sharded(model):
        return
    wrapper = next((m for m in model.modules() if isinstance(m, DistributedDataParallel | DataParallel)), None)
    prepared = any(shares(each, model) for each in accelerator._models)
    if wrapper is not None or prepared:
        what = f"is wrapped in {type(wrapper).__name__}" if wrapper is not None else "was given to accelerator.prepare"
        raise TimingError(
            f"the {type(model).__name__} {what} already: what it trains and averages is settled, and a load or a freeze "
            f"comes too late\n  -> {BEFORE_PREPARE}"
        )


def refuse_unheard_release(accelerator: Accelerator) -> None:
    """Refuse a schedule where the wrapper would wait for gradients that come later.

    Raises:
        TimingError: `prepare` will make a DistributedDataParallel that was not told.
    """
    handler = accelerator.ddp_handler
    if accelerator.distributed_type.startswith("MULTI_") and not (handler and handler.find_unused_parameters):
        raise TimingError(
            "unfreeze= releases parameters that get no gradient until then, which DistributedDataParallel must be told of\n"
            "  -> Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])"
        )


def sharded(model: nn.Module) -> bool:
    """Whether this process holds shards of the model only."""
    return any(hasattr(p, "ds_id") or type(p).__name__ == "DTensor" or _holds_dtensor(p) for p in model.parameters())


def _holds_dtensor(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_local_tensor")


def shares(module: nn.Module, model: nn.Module) -> bool:
    """Whether one was made of the other: a wrapper around it, or another module over the same parameters."""
    if any(m is model for m in module.modules()):
        return True
    own = {id(p) for p in model.parameters()}
    return any(id(p) in own for p in module.parameters())


def live_optimizers(model: nn.Module) -> list[Optimizer]:
    """The optimizers that hold parameters of the model; accelerate knows of none before `prepare`."""
    own = {id(p) for p in model.parameters()}

    def scan() -> list[Optimizer]:
        # By type: asking an object for its class may run code of its own.
        found = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
        return [o for o in found if any(id(p) in own for group in _groups(o) for p in group["params"])]

    if not scan():
        return []
    gc.collect()  # one that nothing refers to any more may still be there: a scheduler and its optimizer are a cycle
    return scan()


def _groups(optimizer: Optimizer) -> list[dict[str, list[nn.Parameter]]]:
    groups: list[dict[str, list[nn.Parameter]]] = getattr(optimizer, "param_groups", [])
    return groups
