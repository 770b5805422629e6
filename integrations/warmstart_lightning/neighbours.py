"""Other callbacks that copy, freeze, prune or average the model: who may stand beside a `WarmStart`, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from warmstart import FrozenChangedError, TimingError
from warmstart.freezing import Frozen

# Of these Lightning shows no more than private names; they are read here and nowhere else.
_AVERAGE = "_average_model"
_TICKETS = "_use_lottery_ticket_hypothesis"
_PRUNED = "_parameters_to_prune"

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def refuse_at_setup(trainer: Trainer, module: LightningModule, own: Callback, *, freezes: bool) -> None:
    """Refuse what would take the model as it was before the load, or freeze beside us.

    Raises:
        TimingError: One of the other callbacks would; it is named with what to write instead.
    """
    callbacks: Sequence[Callback] = getattr(trainer, "callbacks", [])  # an attribute that Lightning does not declare
    for other in callbacks:
        name = type(other).__name__
        if isinstance(other, WeightAveraging) or (isinstance(other, ModelPruning) and getattr(other, _TICKETS)):
            copies = "averages" if isinstance(other, WeightAveraging) else "puts back, as its lottery tickets,"
            if callbacks.index(other) < callbacks.index(own):
                raise TimingError(
                    f"{name} stands before WarmStart and {copies} the model as it was before the load; write "
                    f"Trainer(callbacks=[WarmStart(...), {name}(...)])"
                )
            # An averaging callback calls configure_model itself.
            late = ("setup",) if isinstance(other, WeightAveraging) else ("setup", "configure_model")
            if hook := next((hook for hook in late if is_overridden(hook, module)), None):
                places = "__init__ or configure_model" if hook == "setup" and len(late) == 1 else "__init__"
                raise TimingError(
                    f"{name} copies the model before {type(module).__name__}.{hook} has run, and so before the load; make the "
                    f"layers in {places} instead of {hook}"
                )
        if isinstance(other, BaseFinetuning) and freezes:
            raise TimingError(
                f"{name} freezes and unfreezes by itself, and WarmStart is told to freeze as well; leave one to it: give "
                f"WarmStart no freeze=, or leave {name} out and write WarmStart(..., freeze=True, "
                'unfreeze={10: "backbone"})'
            )


def refuse_frozen(trainer: Trainer, frozen: Frozen | None) -> None:
    """Refuse, before training, what would move frozen entries at its end.

    Raises:
        FrozenChangedError: Statistics would be reset, or parameters pruned.
    """
    if frozen is None:
        return
    for other in getattr(trainer, "callbacks", []):
        name = type(other).__name__
        if isinstance(other, StochasticWeightAveraging):
            reset = [n for n in frozen.names if n.rpartition(".")[2] in _STATISTICS]
            if reset:
                raise FrozenChangedError(
                    f"{name} resets the statistics of every BatchNorm at its end, and {len(reset)} of them are frozen: "
                    f"{_some(reset)}\n  -> average with WeightAveraging instead, or leave these out of freeze=",
                    tensors=tuple(reset),
                )
        if isinstance(other, ModelPruning):
            pruned = {id(getattr(owner, leaf, None)) for owner, leaf in getattr(other, _PRUNED) or ()}
            entries = dict(frozen.model.named_parameters(remove_duplicate=False))
            cut = [n for n in frozen.names if n in entries and id(entries[n]) in pruned]
            if cut:
                raise FrozenChangedError(
                    f"{name} would prune {len(cut)} frozen parameters: {_some(cut)}\n"
                    f"  -> give it parameters_to_prune= without them, or leave them out of freeze=",
                    tensors=tuple(cut),
                )


def averaged_notes(trainer: Trainer, frozen: Frozen | None) -> list[str]:
    """What averaging made of the frozen entries: it computes, and what it computes may round."""
    if frozen is None:
        return []
    notes = []
    for name, entries in _averages(trainer):
        own = frozen.model.state_dict()
        distance = {n: _distance(own[n], entries[n]) for n in frozen.names if n in own and n in entries}
        moved = {n: d for n, d in distance.items() if d > 0}
        if moved:
            worst = max(moved, key=lambda n: moved[n])
            notes.append(
                f"{name} rounded {len(moved)} frozen tensors in its average; the largest distance is {moved[worst]:.3g}, of "
                f"{worst}"
            )
    return notes


def _averages(trainer: Trainer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for other in getattr(trainer, "callbacks", []):
        average = getattr(other, _AVERAGE, None)
        if isinstance(other, WeightAveraging) and isinstance(average, nn.Module):
            yield type(other).__name__, {n.removeprefix("module."): t for n, t in average.state_dict().items()}
        elif isinstance(other, StochasticWeightAveraging) and isinstance(average, nn.Module):
            yield type(other).__name__, dict(average.named_parameters())  # it averages no buffers


def _distance(a: Tensor, b: Tensor) -> float:
    difference = (a.detach().cpu().to(torch.float64) - b.detach().cpu().to(torch.float64)).abs()
    return float(difference.nan_to_num(0.0).max()) if difference.numel() else 0.0


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
