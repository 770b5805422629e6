"""Start training from pretrained weights: planned, verified by value, frozen, reported."""

from warmstart.api import freeze, load, plan
from warmstart.checkpoints.averaging import average
from warmstart.checkpoints.base import Checkpoint, TensorInfo
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import (
    CheckpointError,
    FrozenChangedError,
    MappingError,
    TimingError,
    VerificationError,
    WarmStartError,
)
from warmstart.freezing import Frozen
from warmstart.mapping.buckets import Assignment, Mismatch
from warmstart.mapping.plan import Plan
from warmstart.mapping.pretrained import Pretrained, PretrainedFields
from warmstart.report import Report
from warmstart.version import __version__

__all__ = [
    "Assignment",
    "Checkpoint",
    "CheckpointError",
    "Frozen",
    "FrozenChangedError",
    "MappingError",
    "Mismatch",
    "Plan",
    "Pretrained",
    "PretrainedFields",
    "Report",
    "TensorInfo",
    "TimingError",
    "VerificationError",
    "WarmStartError",
    "__version__",
    "average",
    "freeze",
    "load",
    "open_checkpoint",
    "plan",
]
