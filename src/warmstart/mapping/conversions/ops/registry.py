"""Every op there is."""

from __future__ import annotations

from warmstart.mapping.conversions.ops.applying import Apply
from warmstart.mapping.conversions.ops.base import Op
from warmstart.mapping.conversions.ops.joining import Concat, Split
from warmstart.mapping.conversions.ops.layout import Permute, Reshape, RopePermute, Transpose
from warmstart.mapping.conversions.ops.stacking import Stack, Unstack

OPS: tuple[type[Op], ...] = (Split, Concat, Stack, Unstack, Transpose, Permute, Reshape, RopePermute, Apply)
