"""When the values go in: every strategy makes its memory, its shards and its optimizer in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from warmstart import TimingError

# "set up": as soon as the layers are there. "on_fit_start": frozen then, and loaded once the strategy has made the memory.
Moment = Literal["set up", "on_fit_start"]

_EARLIER = (LearningRateFinder, BatchSizeFinder, WeightAveraging, StochasticWeightAveraging)


def moment(trainer: Trainer, stages: Sequence[str]) -> Moment:
    """When this trainer's strategy wants the values.

    A `ModelParallelStrategy` initialises a model of which anything is left on the meta device, all of it: values go in after
    that. DeepSpeed makes its engine, with the optimizer's own copies, as the last thing of its setup: values go in before.

    Raises:
        TimingError: It is a strategy whose shards cannot be written or compared, or another callback or stage would see the
            model before the values are there.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, DeepSpeedStrategy) or not strategy.restore_checkpoint_after_setup:
        return "set up"
    if not isinstance(strategy, ModelParallelStrategy):
        raise TimingError(
            f"{name} flattens parameters into shards that name no tensor, which WarmStart can neither write nor compare; use "
            "ModelParallelStrategy() with fully_shard in configure_model (FSDP2), or load before: warmstart.load(model, ...)"
        )
    for other in getattr(trainer, "callbacks", []):
        if isinstance(other, _EARLIER):
            raise TimingError(
                f"{type(other).__name__} takes the model before {name} has made its memory, and so before the load; leave it "
                "out here, or run it with one device"
            )
    if set(stages) != {"fit"}:
        raise TimingError(
            f"{name} makes the memory of a model after any hook of validate, test and predict alone that comes before their "
            'restore; write stages=("fit",)'
        )
    return "on_fit_start"


def own_optimizers(trainer: Trainer) -> Sequence[Optimizer] | None:
    """The optimizers that hold the model's own parameters; DeepSpeed's hold flat copies of them."""
    return None if isinstance(trainer.strategy, DeepSpeedStrategy) else trainer.optimizers
