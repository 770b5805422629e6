"""The right order in a loop of one's own, and what is said where it is another."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import NoReturn

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from warmstart import TimingError
from warmstart.mapping.grouping import listed

BEFORE_PREPARE = (
    "load first, then prepare:\n"
    "       report = warm_start(accelerator, model, ...)\n"
    "       model, optimizer = accelerator.prepare(model, optimizer)"
)
SHARD_FIRST = (
    "shard it, load, then make the optimizer and prepare both:\n"
    "       fully_shard(model)\n"
    "       report = warm_start(accelerator, model, ...)\n"
    "       optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)\n"
    "       model, optimizer = accelerator.prepare(model, optimizer)"
)
BEFORE_OPTIMIZER = (
    "load first, then make the optimizer:\n"
    "       report = warm_start(accelerator, model, ...)\n"
    "       optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)"
)


def refuse_prepared(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse a model that `prepare` or a wrapper has already, unless it holds shards: those of FSDP2 exist only afterwards.

    Raises:
        TimingError: It has.
    """
    if sharded(model) and not trains_by_deepspeed(accelerator):
        return
    wrapper = next((m for m in model.modules() if isinstance(m, DistributedDataParallel | DataParallel)), None)
    prepared = any(shares(each, model) for each in accelerator._models)
    if wrapper is not None or prepared:
        what = f"is wrapped in {type(wrapper).__name__}" if wrapper is not None else "was given to accelerator.prepare"
        raise TimingError(
            f"the {type(model).__name__} {what} already: what it trains and averages is settled, and a load or a freeze "
            f"comes too late\n  -> {BEFORE_PREPARE}"
        )


def refuse_mixed_up(accelerator: Accelerator) -> None:
    """Refuse an optimizer to which accelerate gave the shards of a model on meta: it tells them by address; these had none.

    Raises:
        TimingError: There is one.
    """
    for optimizer in accelerator._optimizers:
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if len(set(held)) < len(held):
            raise TimingError(
                f"the optimizer was prepared with a model on the meta device, and has {len(set(held))} of its {len(held)} "
                f"parameters now: it would not train the others\n  -> {SHARD_FIRST}"
            )


def refuse_meta(model: nn.Module) -> None:
    """Refuse a model of which a part never got memory: what is offloaded by hooks has its values there.

    Raises:
        TimingError: There is such a part.
    """
    hooked = {id(p) for m in model.modules() if hasattr(m, "_hf_hook") for p in m.parameters()}
    left = [name for name, p in model.named_parameters() if p.is_meta and id(p) not in hooked]
    if left:
        raise TimingError(
            f"{len(left)} parameters of the {type(model).__name__} are on the meta device still and have no values\n"
            f"{listed((name, '') for name in left)}\n"
            "  -> load the whole model, without into=, with allow_missing= for what it shall initialise itself; where no "
            f"process can hold it whole, {SHARD_FIRST}"
        )


def refuse_dispatched_later(model: nn.Module) -> NoReturn:
    """Refuse a model that was dispatched after its load, which puts other parameters in the place of those that were loaded.

    Raises:
        TimingError: Always.
    """
    raise TimingError(
        f"the {type(model).__name__} was dispatched or offloaded after the load, which puts placeholders in the place of the "
        "parameters that were loaded and frozen\n"
        "  -> dispatch first, then load:\n"
        "       model = load_checkpoint_and_dispatch(model, ..., device_map=..., offload_folder=...)\n"
        "       report = warm_start(accelerator, model, ...)"
    )


def refuse_state_before_prepare(model: nn.Module) -> NoReturn:
    """Refuse a `load_state` that would pass over a model, since it restores nothing but what was prepared.

    Raises:
        TimingError: Always.
    """
    raise TimingError(
        f"accelerator.load_state restores what was given to prepare, and the {type(model).__name__} was not yet: training "
        "would start from the pretrained weights instead of the state's\n"
        "  -> prepare first, then restore:\n"
        "       model, optimizer = accelerator.prepare(model, optimizer)\n"
        "       accelerator.load_state(...)"
    )


def refuse_swapped(model: nn.Module, prepared: Sequence[nn.Module]) -> None:
    """Refuse a run that trains another model of the same class in the place of one that was loaded.

    Args:
        model: The one that was loaded, with which nothing was done.
        prepared: Those that train and were not loaded.

    Raises:
        TimingError: There is such a one.
    """
    if any(type(each) is type(model) for other in prepared for each in other.modules()):
        raise TimingError(
            f"the {type(model).__name__} that trains is not the one that was loaded: accelerator.prepare was given another\n"
            "  -> load the one that trains, and make no other after it (of a teacher that is not prepared: teacher.eval()):\n"
            "       report = warm_start(accelerator, model, ...)\n"
            "       model, optimizer = accelerator.prepare(model, optimizer)"
        )


def trains_by_deepspeed(accelerator: Accelerator) -> bool:
    """Whether `prepare` makes a DeepSpeed engine, with copies of the parameters that the steps are taken on."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def refuse_engine(accelerator: Accelerator) -> None:
    """Refuse the engines that make parameters of their own, which are none of the model's.

    Raises:
        TimingError: `prepare` will use one.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TimingError(
            "FSDP of version 1 flattens the parameters into others, which warm_start can neither compare nor hold\n"
            "  -> FullyShardedDataParallelPlugin(fsdp_version=2), or --fsdp_version 2 of accelerate launch"
        )
    if kind == DistributedType.MEGATRON_LM:
        raise TimingError(
            "Megatron-LM trains a model that it makes itself, of which warm_start sees nothing\n"
            "  -> Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), or a checkpoint that Megatron-LM "
            "reads itself"
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
