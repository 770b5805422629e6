from __future__ import annotations

import pytest

from warmstart import MappingError
from warmstart.mapping.adapters.registry import (
    ADAPTERS,
    AdaptInChannels,
    MapRows,
    ResizePatchEmbed,
    ResizePosEmbed,
    ResizeRelPosBias,
    SliceOrPad,
    adapter,
)
from warmstart.mapping.declared import plain


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"resize_pos_embed": {"prefix_tokens": 1}}, ResizePosEmbed()),
        ({"resize_pos_embed": {"src_grid": [8, 2], "dst_grid": [4, 4]}}, ResizePosEmbed(1, (8, 2), (4, 4))),
        ({"resize_pos_embed": {"src_grid": 512, "mode": "repeat"}}, ResizePosEmbed(1, (512,), mode="repeat")),
        ("resize_patch_embed", ResizePatchEmbed()),
        ({"resize_rel_pos_bias": {"extra_rows": 3}}, ResizeRelPosBias(3)),
        ({"adapt_in_channels": {"mode": "mean"}}, AdaptInChannels("mean")),
        (
            {"map_rows": {"old": ["a", "b"], "new": ["b"], "allow_drop": True}},
            MapRows(["a", "b"], ["b"], allow_drop=True),
        ),
        ({"map_rows": {"old": None, "new": [1, None]}}, MapRows(None, (1, -1))),
        ({"slice_or_pad": {"fill": 0}}, SliceOrPad(0)),
        (SliceOrPad(), SliceOrPad()),
    ],
)
def test_yaml_declares_what_python_does(written, meant):
    assert adapter(written, 'adapt["pos_embed"]') == meant


def test_every_adapter_s_plain_form_is_what_declares_it_again():
    for made in (ResizePosEmbed(2, (8, 2), [4, 4]), ResizePatchEmbed(), AdaptInChannels("mean"), SliceOrPad(0.5)):
        assert adapter(plain(made), "adapt") == made


def test_the_plain_form_of_a_vocabulary_is_short_and_tells_vocabularies_apart():
    names = [f"token {i}" for i in range(10_000)]
    form = plain(MapRows(names, names[::-1]))
    assert len(str(form)) < 300
    assert form != plain(MapRows(names, [*names[:-2:-1], *names[:-1]]))


@pytest.mark.parametrize("value", ["resize", {"resize_pos_embed": {"grid": 4}}, {"adapt_in_channels": {"mode": "sum"}}])
def test_what_is_no_adapter_is_refused(value):
    with pytest.raises(MappingError):
        adapter(value, 'adapt["pos_embed"]')


def test_their_names_in_yaml():
    with pytest.raises(MappingError) as error:
        adapter("?", "adapt")
    assert str(error.value).endswith(
        "resize_pos_embed, resize_patch_embed, resize_rel_pos_bias, adapt_in_channels, inflate_conv, map_rows, slice_or_pad"
    )
    assert len(ADAPTERS) == 7
