"""Which strategies are refused, and what is refused beside those that make their memory late; no process is started."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from warmstart import TimingError
from warmstart_lightning.strategies import moment

pytestmark = pytest.mark.filterwarnings("ignore")


class OnProcessors(FSDPStrategy):
    """Lightning keeps FSDP1 itself to accelerators; not what is made of it."""


def trainer(strategy, *callbacks) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=2 if strategy != "auto" else 1, strategy=strategy, logger=False,
        enable_checkpointing=False, callbacks=list(callbacks),
    )  # fmt: skip


def test_each_strategy_has_its_moment():
    assert isinstance(trainer("auto").strategy, SingleDeviceStrategy)
    assert moment(trainer("auto"), ("fit", "validate")) == "set up"
    assert moment(trainer(DDPStrategy()), ("fit", "validate")) == "set up"
    assert moment(trainer(ModelParallelStrategy()), ("fit",)) == "on_fit_start"


def test_fsdp_of_version_1_is_refused_with_what_to_use():
    with pytest.raises(TimingError, match=r"OnProcessors flattens parameters(.|\n)*use ModelParallelStrategy\(\)"):
        moment(trainer(OnProcessors()), ("fit",))


@pytest.mark.parametrize(
    "other",
    [
        LearningRateFinder(),
        BatchSizeFinder(),
        EMAWeightAveraging(),
        WeightAveraging(),
        StochasticWeightAveraging(swa_lrs=0.1),
    ],
    ids=lambda other: type(other).__name__,
)
def test_what_takes_the_model_before_its_memory_is_made_is_refused_by_name(other):
    with pytest.raises(TimingError, match=rf"{type(other).__name__} takes the model before ModelParallelStrategy has"):
        moment(trainer(ModelParallelStrategy(), other), ("fit",))
    assert moment(trainer(DDPStrategy(), other), ("fit",)) == "set up"


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_stages_that_have_no_hook_between_memory_and_restore_are_refused(stage):
    with pytest.raises(TimingError, match=r'ModelParallelStrategy makes the memory(.|\n)*write stages=\("fit",\)'):
        moment(trainer(ModelParallelStrategy()), ("fit", stage))
