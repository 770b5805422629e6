"""`warm_start`: pretrained weights into a loop of one's own, in one line before `accelerator.prepare`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from torch import nn
from typing_extensions import Unpack

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "warmstart_accelerate needs accelerate. Install it with: pip install 'warmstart[accelerate]'", name=error.name
    ) from error

from warmstart import MappingError, PretrainedFields, Report
from warmstart.api import Sources
from warmstart.freezing import Held
from warmstart.lifecycle import OnFreezeChange, Settings
from warmstart.loading.agreement import raised_on_all
from warmstart.mapping.plan.plan import Read, Verify
from warmstart.mapping.pretrained import as_parts
from warmstart.patterns import Patterns
from warmstart_accelerate.launching import warn_if_alone
from warmstart_accelerate.run import Run
from warmstart_accelerate.started import LoopLifecycle, Started
from warmstart_accelerate.timing import (
    refuse_engine,
    refuse_mixed_up,
    refuse_prepared,
    refuse_unheard_release,
    trains_by_deepspeed,
)


def warm_start(
    accelerator: Accelerator,
    model: nn.Module,
    pretrained: Sources,
    /,
    *,
    verify: Verify = "full",
    held: Held = "eval",
    unfreeze: Mapping[int, Patterns] | None = None,
    unfreeze_unit: Literal["step"] = "step",
    on_freeze_change: OnFreezeChange = "error",
    lock: str | os.PathLike[str] | None = None,
    read: Read = "local",
    log: bool = True,
    name: str | None = None,
    **fields: Unpack[PretrainedFields],
) -> Report:
    """Load pretrained weights and freeze, before the optimizer is made and before `accelerator.prepare`, on every process.

    The first training forward of what `prepare` made of the model compares every value with the source, on every process,
    and reports; `report.check(model)` does the first of the two at once. `accelerator.load_state` wins over what was loaded,
    `accelerator.save_state` carries lineage and the frozen set, and compares the frozen tensors by sample;
    `accelerator.end_training` compares them in full. A process that loads a state needs no pretrained file any more.

    A model that no process can hold whole is made on the meta device and given to `fully_shard` first, which gives it no memory
    yet. One that `prepare` has sharded by FSDP2 can be loaded as well; what is to be frozen of it leaves the optimizer before,
    by `requires_grad_(False)`. With DeepSpeed the load comes before `prepare` in any case, also of a model that
    `deepspeed.zero.Init` has partitioned: the optimizer that `prepare` makes has copies, which are compared as well.

    Args:
        accelerator: The accelerator that prepares the model.
        model: The bare model; on any error before the first write it is bit-for-bit untouched, on every process.
        pretrained: A path, a state dict, a module, a `Pretrained`, or a list of them.
        verify: `"full"` compares every element, `"sample"` a fixed sample, `"off"` nothing.
        held: `"eval"` holds modules that are frozen as a whole in eval mode; `"train"` leaves their mode alone.
        unfreeze: What to release when: a number of optimizer steps, 1 at least, to patterns of frozen entries. They are in
            the optimizer and the wrapper from the start, and train from then on.
        unfreeze_unit: `"step"`, since a loop of one's own has no epochs that could be counted.
        on_freeze_change: Whether a state of a run that had frozen other entries is an `"error"`, or to be allowed.
        lock: A lock file (`Plan.to_yaml`): a run whose plan came out different is refused.
        read: `"local"`: every process reads what it holds of the model. `"broadcast"`: one process of each node reads, and
            passes every tensor on to the others, which need no file.
        log: When training starts, print the report, log it to the accelerator's trackers, and write it to its `project_dir`
            as JSON and as a page.
        name: Tells two warm starts with the same `into` apart in saved states.
        **fields: `Pretrained`'s fields, for a single bare source.

    Returns:
        The report. Where the source is gone and a state will be loaded, or was loaded before, it has nothing but what
        is frozen.

    Raises:
        WarmStartError: Everything that `warmstart.load` raises.
        TimingError: The model is prepared already, a live optimizer holds what is to be frozen, not every process calls, or
            the engine is one that this does not go with (FSDP of version 1, Megatron-LM; DeepSpeed with `unfreeze`).

    Example::

        accelerator = Accelerator()
        report = warm_start(accelerator, model, "bert.safetensors", into="encoder", freeze=True)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
    """
    if not isinstance(accelerator, Accelerator) or not isinstance(model, nn.Module):
        found = f"{type(accelerator).__name__} and {type(model).__name__}"
        raise TypeError(
            f"the accelerator comes first and the model second: warm_start(accelerator, model, ...), not {found}"
        )
    if unfreeze_unit != "step":
        raise MappingError(
            f"unfreeze_unit={unfreeze_unit!r}: in a loop of your own only optimizer steps can be counted; give unfreeze= in "
            "those"
        )
    parts = as_parts(pretrained, fields)
    warn_if_alone(accelerator)
    with raised_on_all("warm_start"):  # before the first collective: a call on one process only is found here
        refuse_engine(accelerator)
        refuse_prepared(accelerator, model)
        refuse_mixed_up(accelerator)
        if unfreeze:
            refuse_unheard_release(accelerator)
    life = LoopLifecycle(
        Settings(
            parts,
            verify=verify,
            held=held,
            unfreeze=unfreeze,
            unfreeze_unit="step",
            on_freeze_change=on_freeze_change,
            lock=lock,
            read=read,
        )
    )
    life.steps_on_copies = trains_by_deepspeed(accelerator)
    key = name if name is not None else "+".join(part.into for part in parts)
    return Run.of(accelerator).add(Started(life, model, key, log))
