"""Start training from pretrained weights: planned, verified by value, frozen, reported."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from warmstart.version import __version__

if TYPE_CHECKING:
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
    from warmstart.mapping.conversions.ops.applying import Apply
    from warmstart.mapping.conversions.ops.joining import Concat, Split
    from warmstart.mapping.conversions.ops.layout import Permute, Reshape, RopePermute, Transpose
    from warmstart.mapping.conversions.ops.stacking import Stack, Unstack
    from warmstart.mapping.plan.plan import Plan
    from warmstart.mapping.pretrained import Pretrained, PretrainedFields
    from warmstart.mapping.suggesting.suggestion import Suggestion
    from warmstart.optimizer_groups import param_groups
    from warmstart.report import Report

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

# A public name is imported when it is first used, so that a program pays for what it uses; type checkers read the imports
# above, and a test holds both to the same modules.
_HOMES = {
    "api": ("freeze", "load", "plan", "suggest"),
    "checkpoints.averaging": ("average",),
    "checkpoints.base": ("Checkpoint", "TensorInfo"),
    "checkpoints.opening": ("open_checkpoint",),
    "errors": (
        "CheckpointError",
        "FrozenChangedError",
        "MappingError",
        "TimingError",
        "VerificationError",
        "WarmStartError",
    ),
    "freezing": ("Frozen",),
    "mapping.adapters.base": ("Adapter",),
    "mapping.adapters.channels": ("AdaptInChannels",),
    "mapping.adapters.inflation": ("InflateConv",),
    "mapping.adapters.padding": ("SliceOrPad",),
    "mapping.adapters.patch_embed": ("ResizePatchEmbed",),
    "mapping.adapters.position_grid": ("ResizePosEmbed",),
    "mapping.adapters.relative_bias": ("ResizeRelPosBias",),
    "mapping.adapters.rows": ("MapRows",),
    "mapping.buckets": ("Assignment", "Mismatch"),
    "mapping.conversions.conversion": ("Conversion",),
    "mapping.conversions.ops.applying": ("Apply",),
    "mapping.conversions.ops.joining": (
        "Concat",
        "Split",
    ),
    "mapping.conversions.ops.layout": (
        "Permute",
        "Reshape",
        "RopePermute",
        "Transpose",
    ),
    "mapping.conversions.ops.stacking": (
        "Stack",
        "Unstack",
    ),
    "mapping.plan.plan": ("Plan",),
    "mapping.pretrained": ("Pretrained", "PretrainedFields"),
    "mapping.suggesting.suggestion": ("Suggestion",),
    "optimizer_groups": ("param_groups",),
    "report": ("Report",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'warmstart' has no attribute {name!r}")
    value = getattr(import_module(f"warmstart.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
