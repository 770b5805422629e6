"""How far the loaded layers have moved from their pretrained values."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warmstart.errors import CheckpointError
from warmstart.loading.values import Values
from warmstart.mapping.model.targets import Live, Target
from warmstart.outcome import Outcome
from warmstart.shards import is_sharded, shard_of
from warmstart.tensors import sample

_MODULES = 12  # each is a column in a table of metrics


@dataclass(frozen=True, slots=True)
class _Reference:
    target: Target
    values: Tensor


class Drift:
    """The relative L2 distance of loaded parameters from their pretrained values, per module, by at most 4096 elements of each.

    Parameters of which only a part was loaded are left out.
    """

    def __init__(self, references: list[_Reference]) -> None:
        self._references = references
        self._modules = _group([reference.target.name for reference in references])

    @classmethod
    def of(cls, outcome: Outcome, model: nn.Module) -> Drift:
        """The pretrained values: the model's own if it holds them, else those of the source if it can still be read."""
        live, values = Live(model), Values(outcome.plan)
        found = []
        for assignment in outcome.plan.written:
            target = outcome.plan.targets.entries[assignment.target]
            tensor = live.tensor(target)
            if target.kind != "parameter" or tensor is None or not tensor.is_floating_point() or assignment.keeps:
                continue
            if outcome.status != "applied":
                if not outcome.plan.parts[assignment.part].checkpoint.lasting:
                    continue  # what came from memory may have trained by now
                with contextlib.suppress(CheckpointError):
                    found.append(_Reference(target, sample(values.planned(assignment, shard_of(tensor))).clone()))
                continue
            found.append(_Reference(target, sample(shard_of(tensor).local).clone()))
        return cls(found)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Path of each module, to the distance of its parameters that train now; on a sharded model all ranks ask."""
        live = Live(model)
        modules = sorted(set(self._modules.values()))
        sums = torch.zeros(len(modules), 2, dtype=torch.float64)
        sharded = False
        for reference in self._references:
            tensor = live.tensor(reference.target)
            if tensor is None:
                continue
            sharded |= is_sharded(tensor)
            if tensor.requires_grad:
                local = shard_of(tensor).local
                now, before = sample(local).double().cpu(), reference.values.double().cpu()
                share = local.numel() / max(now.numel(), 1)
                squares = torch.stack([(now - before).square().sum(), before.square().sum()])
                sums[modules.index(self._modules[reference.target.name])] += squares * share
        if sharded:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, sums)
            sums = torch.stack(gathered).sum(0)
        return {m: float((d / r).sqrt()) for m, (d, r) in zip(modules, sums, strict=True) if r > 0}


def _group(names: list[str]) -> dict[str, str]:
    """Each name to the path of a module above it: as deep as leaves few enough of them."""
    paths = {name: name.split(".")[:-1] for name in names}
    depth = 0
    deepest = max(map(len, paths.values()), default=0)
    while depth < deepest and len({tuple(path[: depth + 1]) for path in paths.values()}) <= _MODULES:
        depth += 1
    return {name: ".".join(path[:depth]) for name, path in paths.items()}
