"""Every adapter there is, and how one is declared: an object, its name, or `{name: {field: value}}`."""

from __future__ import annotations

from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.channels import AdaptInChannels
from warmstart.mapping.adapters.inflation import InflateConv
from warmstart.mapping.adapters.padding import SliceOrPad
from warmstart.mapping.adapters.patch_embed import ResizePatchEmbed
from warmstart.mapping.adapters.position_grid import ResizePosEmbed
from warmstart.mapping.adapters.relative_bias import ResizeRelPosBias
from warmstart.mapping.adapters.rows import MapRows
from warmstart.mapping.declared import declared

ADAPTERS: tuple[type[Adapter], ...] = (
    ResizePosEmbed,
    ResizePatchEmbed,
    ResizeRelPosBias,
    AdaptInChannels,
    InflateConv,
    MapRows,
    SliceOrPad,
)


def adapter(value: object, where: str) -> Adapter:
    """The adapter that `value` declares: an `Adapter`, `"resize_patch_embed"`, or `{"resize_pos_embed": {"prefix_tokens": 1}}`.

    Raises:
        MappingError: No adapter of that name, no such field, or a value that cannot be meant. `where` says which rule.
        TypeError: A value of another type.
    """
    if isinstance(value, Adapter):
        return value
    return declared(value, ADAPTERS, where)
