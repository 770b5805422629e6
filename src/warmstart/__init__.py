"""Start training from pretrained weights: planned, verified by value, frozen, reported."""

from warmstart.api import freeze, load, plan, suggest
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
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.channels import AdaptInChannels
from warmstart.mapping.adapters.inflation import InflateConv
from warmstart.mapping.adapters.padding import SliceOrPad
from warmstart.mapping.adapters.patch_embed import ResizePatchEmbed
from warmstart.mapping.adapters.position_grid import ResizePosEmbed
from warmstart.mapping.adapters.relative_bias import ResizeRelPosBias
from warmstart.mapping.adapters.rows import MapRows
from warmstart.mapping.buckets import Assignment, Mismatch
from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.ops import (
    Apply,
    Concat,
    Permute,
    Reshape,
    RopePermute,
    Split,
    Stack,
    Transpose,
    Unstack,
)
from warmstart.mapping.plan import Plan
from warmstart.mapping.pretrained import Pretrained, PretrainedFields
from warmstart.mapping.suggesting.suggestion import Suggestion
from warmstart.param_groups import param_groups
from warmstart.report import Report
from warmstart.version import __version__

__all__ = [
    "AdaptInChannels",
    "Adapter",
    "Apply",
    "Assignment",
    "Checkpoint",
    "CheckpointError",
    "Concat",
    "Conversion",
    "Frozen",
    "FrozenChangedError",
    "InflateConv",
    "MapRows",
    "MappingError",
    "Mismatch",
    "Permute",
    "Plan",
    "Pretrained",
    "PretrainedFields",
    "Report",
    "Reshape",
    "ResizePatchEmbed",
    "ResizePosEmbed",
    "ResizeRelPosBias",
    "RopePermute",
    "SliceOrPad",
    "Split",
    "Stack",
    "Suggestion",
    "TensorInfo",
    "TimingError",
    "Transpose",
    "Unstack",
    "VerificationError",
    "WarmStartError",
    "__version__",
    "average",
    "freeze",
    "load",
    "open_checkpoint",
    "param_groups",
    "plan",
    "suggest",
]
