"""What a model of transformers says of itself, and what that means for the rules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override

from warmstart import MappingError, Plan, Pretrained, Report, TimingError
from warmstart.lifecycle import Lifecycle
from warmstart.mapping.model.names import strip


class ModelLifecycle(Lifecycle):
    """The lifecycle, of models that may have a base and a head, or be quantised."""

    @override
    def plan(self, model: nn.Module) -> Plan[Report]:
        bare = _without_adapters(model)
        if (quantised := _quantised(bare)) is not None:
            raise MappingError(
                f"{type(bare).__name__} is quantised ({quantised}): its weights are packed integers with scales, which no "
                "checkpoint's values can be copied into; load the pretrained weights when it is made, "
                "from_pretrained(..., quantization_config=...), or with warmstart.load before it is quantised, and leave the "
                "callback out"
            )
        prefix = getattr(bare, "base_model_prefix", "")
        if not prefix or not isinstance(getattr(bare, prefix, None), nn.Module):
            return super().plan(model)
        draft = self.plan_of(model, self.told.parts)
        parts = [_into_base(part, number, draft, prefix) for number, part in enumerate(self.told.parts)]
        if parts != self.told.parts:
            narrowed = self.plan_of(model, parts)
            if narrowed.mapping.keys() >= {a.target for a in draft.assignments if a.alias_of is None}:
                return narrowed
        return draft


def mark_loaded(model: nn.Module, report: Report) -> None:
    """Mark as transformers marks it what was loaded, so that an init pass that runs later leaves it alone."""
    loaded = {assignment.target for assignment in report.plan.assignments}
    for path, module in model.named_modules():
        own = dict(itertools.chain(module.named_parameters(path, False), module.named_buffers(path, False)))
        for name, tensor in own.items():
            if name in loaded:
                tensor._is_hf_initialized = True
        if own and own.keys() <= loaded:  # what releases before 5 look at
            module._is_hf_initialized = True


def reach_past_frozen(model: nn.Module) -> None:
    """Let gradients reach what trains behind frozen layers, where reentrant checkpointing would end them there.

    It passes on none for a layer whose inputs need none, as behind frozen embeddings. transformers' own remedy makes the
    embeddings' outputs need them; its releases before 5 apply it for adapters alone, later ones for text.

    Raises:
        TimingError: The model does not say where its embeddings are.
    """
    checkpoints = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules() if _checkpoints(m)]
    options = [function.keywords for function in checkpoints if isinstance(function, functools.partial)]
    if all(option.get("use_reentrant", True) is False for option in options):
        return
    remedy = getattr(model, "enable_input_require_grads", None)
    with contextlib.suppress(NotImplementedError):  # a model without embeddings of its own: refused below
        if callable(remedy):
            remedy()
    if getattr(model, "_require_grads_hook", None) is None:
        raise TimingError(
            f"{type(model).__name__} checkpoints activations reentrantly, which ends gradients at what is frozen, and does not "
            'say where its embeddings are\n  -> gradient_checkpointing_kwargs={"use_reentrant": False} '
            '(activation_checkpointing_kwargs={"use_reentrant": False} in later releases)'
        )


def _checkpoints(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def _into_base(part: Pretrained, number: int, draft: Plan[Report], prefix: str) -> Pretrained:
    """`into` the base, where everything that was found of a source lies there: the head is then out of its scope."""
    if part.into:
        return part
    entries = draft.targets.entries
    assigned = [a.target for a in draft.assignments if a.part == number and a.alias_of is None]
    found = [entries[name].clean for name in [*assigned, *draft.mismatched]]
    in_base = all(strip(name, prefix) is not None for name in found)
    return dataclasses.replace(part, into=prefix) if assigned and in_base else part


def _quantised(model: nn.Module) -> str | None:
    """By what a model is quantised, if it is: as transformers marks it, in torch's own modules, or in its tensors."""
    for module in model.modules():
        if getattr(module, "is_quantized", False):
            return type(getattr(module, "hf_quantizer", module)).__name__
        if ".quantized" in (path := type(module).__module__) and path.startswith("torch.ao.nn."):
            return type(module).__name__
    tensors = itertools.chain(model.parameters(), model.buffers())
    packed = (t.data for t in tensors if is_traceable_wrapper_subclass(t.data) and not isinstance(t.data, DTensor))
    return next((type(tensor).__name__ for tensor in packed), None)


def _without_adapters(model: nn.Module) -> nn.Module:
    get_base_model = getattr(model, "get_base_model", None)  # PEFT's
    base = get_base_model() if callable(get_base_model) else model
    return base if isinstance(base, nn.Module) else model
