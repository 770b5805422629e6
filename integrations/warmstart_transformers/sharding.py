"""What shards the model after it is set up, and whether a warm start goes with it."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from warmstart import Plan, Report, TimingError, WarmStartError
from warmstart.mapping.grouping import listed


def is_sharding() -> bool:
    """Whether the `Trainer` that was built last shards its model by FSDP."""
    return bool(AcceleratorState().distributed_type == DistributedType.FSDP)


def refuse_sharding(args: TrainingArguments) -> None:
    """What a `Trainer` was asked for, by its arguments or by `accelerate launch`, as its own accelerator understood it.

    Raises:
        TimingError: DeepSpeed, FSDP of version 1 or of XLA, which replace the parameters by others of their own.
    """
    state = AcceleratorState()
    version = getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 1)
    if state.distributed_type == DistributedType.FSDP and version != 2:
        raise TimingError(
            "FSDP of version 1 flattens the model's parameters into others after it is set up, which WarmStartCallback does "
            'not support; use version 2: fsdp_config={"version": 2}, or --fsdp_version 2 of accelerate launch'
        )
    if state.distributed_type == DistributedType.DEEPSPEED or args.deepspeed:
        raise TimingError(
            "DeepSpeed puts copies of its own in the place of the model's parameters after it is set up, which "
            "WarmStartCallback does not support; train with FSDP of version 2 or DistributedDataParallel, or call "
            "warmstart.load(model, ...) before Trainer(...)"
        )
    if args.fsdp and state.distributed_type == DistributedType.XLA:
        raise TimingError(
            "FSDP of XLA shards the model after it is set up, which WarmStartCallback does not support; call "
            "warmstart.load(model, ...) before Trainer(...)"
        )


def refuse_placeholders(model: nn.Module, plan: Callable[[nn.Module], Plan[Report]]) -> None:
    """What `from_pretrained` leaves without storage on all ranks but one, where FSDP loads efficiently in memory.

    The optimizer is made before values come from that one rank, and takes parameters without storage for one another.
    What a load fills or initialises is none of them.

    Raises:
        TimingError: Placeholders lie outside the scope of the plan.
    """
    placeholders = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    if not placeholders:
        return
    try:
        left = sorted(placeholders.intersection(plan(model).excluded))
    except WarmStartError:  # said when it is loaded
        return
    if left:
        raise TimingError(
            f"{len(left)} parameters outside the scope of the warm start are placeholders on the meta device, which an "
            f"optimizer cannot tell apart\n{listed((name, '') for name in left)}\n"
            '  -> set fsdp_config={"cpu_ram_efficient_loading": False}, or make the model from its configuration: '
            "from_config(...) instead of from_pretrained(...)"
        )
