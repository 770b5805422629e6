from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart import MappingError
from warmstart.mapping.adapters.position_grid import ResizePosEmbed
from warmstart.tensors import same_bits


def table(tokens: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, dim, dtype=torch.float64)


def resized(adapter: ResizePosEmbed, value: torch.Tensor, tokens: int) -> torch.Tensor:
    target = (*value.shape[:-2], tokens, value.shape[-1])
    adapter.check(tuple(value.shape), target)
    return adapter.apply(value, torch.zeros(target, dtype=value.dtype))


def interpolated(rows: torch.Tensor, src: tuple[int, int], dst: tuple[int, int], mode: str) -> torch.Tensor:
    image = rows.reshape(1, *src, -1).permute(0, 3, 1, 2).contiguous()
    image = F.interpolate(image, size=dst, mode=mode, antialias=True, align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(1, dst[0] * dst[1], -1)


@settings(max_examples=40, deadline=None)
@given(
    src=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dst=st.tuples(st.integers(1, 9), st.integers(2, 9)),  # torch itself errs where the new width is 1
    prefix=st.integers(0, 3),
    mode=st.sampled_from(["bicubic", "linear"]),
)
def test_resampling_is_torch_s_antialiased_interpolation(src, dst, prefix, mode):
    value = table(prefix + src[0] * src[1])
    got = resized(ResizePosEmbed(prefix, src, dst, mode), value, prefix + dst[0] * dst[1])
    want = interpolated(value[:, prefix:], src, dst, {"linear": "bilinear"}.get(mode, mode))
    assert same_bits(got[:, :prefix], value[:, :prefix])
    torch.testing.assert_close(got[:, prefix:], want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("tokens", "prefix"), [(196, 0), (197, 1), (198, 2)])
def test_field_note_27_prefix_tokens_stay_and_the_rest_is_a_square(tokens, prefix):
    value = table(tokens)
    got = resized(ResizePosEmbed(prefix_tokens=prefix), value, prefix + 576)
    assert same_bits(got[:, :prefix], value[:, :prefix])
    torch.testing.assert_close(got[:, prefix:], interpolated(value[:, prefix:], (14, 14), (24, 24), "bicubic"))


@pytest.mark.parametrize(("tokens", "prefix"), [(196, 1), (197, 0), (198, 1)])
def test_field_note_27_a_wrong_prefix_is_refused_with_the_right_one(tokens, prefix):
    right = tokens - 196
    with pytest.raises(MappingError) as error:
        ResizePosEmbed(prefix_tokens=prefix).check((1, tokens, 5), (1, 576 + right, 5))
    assert f"checkpoint (1, {tokens}, 5), model (1, {576 + right}, 5)" in str(error.value)
    right_line = "ResizePosEmbed()" if right == 1 else f"ResizePosEmbed(prefix_tokens={right})"
    assert str(error.value).endswith(f'-> adapt={{"<entry>": {right_line}}}')


def test_field_note_27_different_prefixes_are_refused_in_words():
    with pytest.raises(MappingError, match="2 prefix tokens in the checkpoint and 1 in the model"):
        ResizePosEmbed().check((1, 198, 5), (1, 577, 5))


def test_x_19_equal_counts_are_resampled_between_two_grids():
    value = table(17)
    got = resized(ResizePosEmbed(src_grid=(8, 2), dst_grid=(4, 4)), value, 17)
    torch.testing.assert_close(got[:, 1:], interpolated(value[:, 1:], (8, 2), (4, 4), "bicubic"))
    assert same_bits(got[:, :1], value[:, :1])
    assert ResizePosEmbed(src_grid=(8, 2)).no_inverse((1, 17, 5), (1, 17, 5))  # the model's grid left out is square
    assert same_bits(got, resized(ResizePosEmbed(src_grid=(8, 2)), value, 17))
    assert same_bits(value, resized(ResizePosEmbed(), value, 17))


def test_no_square_is_refused_until_the_grid_is_spelled_out():
    with pytest.raises(MappingError) as error:
        ResizePosEmbed(mode="linear").check((1, 16, 5), (1, 25, 5))
    message = "checkpoint (1, 16, 5), model (1, 25, 5): 15 and 24 positions beside 1 prefix tokens: a grid"
    assert str(error.value).startswith(message)
    line = """adapt={"<entry>": ResizePosEmbed(prefix_tokens=0, mode='linear')}"""
    assert str(error.value).endswith(line)
    with pytest.raises(MappingError, match=r"src_grid=\(3, 5\), dst_grid=\(4, 6\)\)}$"):
        ResizePosEmbed(dst_grid=(4, 6)).check((1, 16, 5), (1, 25, 5))
    ResizePosEmbed(src_grid=(3, 5), dst_grid=(4, 6)).check((1, 16, 5), (1, 25, 5))


@pytest.mark.parametrize("grids", [((3, 3), (2, 2)), ((4, 4), (4, 5)), ((16,), (5, 5)), ((2, 8), 25)])
def test_grids_that_do_not_hold_the_table_are_refused_with_ones_that_do(grids):
    with pytest.raises(MappingError) as error:
        ResizePosEmbed(1, *grids).check((17, 5), (26, 5))
    line = str(error.value).rpartition('-> adapt={"<entry>": ')[2].removesuffix("}")
    eval(line).check((17, 5), (26, 5))


def test_one_dimensional_tables_stretch_or_repeat():
    value = torch.arange(4.0).view(4, 1)
    repeat = resized(ResizePosEmbed(0, 4, 10, "repeat"), value, 10)
    assert repeat.view(-1).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert torch.equal(repeat, resized(ResizePosEmbed(0, mode="repeat"), value, 10))
    linear = resized(ResizePosEmbed(0, (4,), (8,), "linear"), value, 8)
    assert linear.view(-1).tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert torch.equal(linear, resized(ResizePosEmbed(0, [4], mode="linear"), value, 8))
    assert torch.equal(linear, resized(ResizePosEmbed(0, dst_grid=8, mode="linear"), value, 8))
    cubic = resized(ResizePosEmbed(0, 4, 8), value.double(), 8)
    torch.testing.assert_close(cubic[None], interpolated(value.double(), (1, 4), (1, 8), "bicubic"))


@pytest.mark.parametrize("mode", ["bicubic", "linear"])
def test_a_grid_of_one_column_is_resampled_like_one_of_one_row(mode):
    value = table(7)
    column = resized(ResizePosEmbed(0, (7, 1), (12, 1), mode), value, 12)
    assert same_bits(column, resized(ResizePosEmbed(0, (1, 7), (1, 12), mode), value, 12))
    assert same_bits(column, resized(ResizePosEmbed(0, 7, 12, mode), value, 12))


def test_repeat_copies_bits_and_shrinks_to_the_first():
    value = torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-42], [3.0, 4.0]], dtype=torch.bfloat16)
    assert same_bits(resized(ResizePosEmbed(1, mode="repeat"), value, 5), value[[0, 1, 2, 1, 2]])
    assert same_bits(resized(ResizePosEmbed(0, mode="repeat"), value, 2), value[:2])


def test_repeat_on_a_grid_tiles_it():
    value = torch.arange(4.0).view(4, 1)
    got = resized(ResizePosEmbed(0, (2, 2), (3, 4), "repeat"), value, 12)
    assert got.view(3, 4).tolist() == [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1]]


def test_grids_of_another_rank_are_spelled_out_both():
    with pytest.raises(MappingError, match="a grid that is left out must be a square; spell out the grids"):
        ResizePosEmbed(0, src_grid=(2, 2, 4)).check((16, 5), (25, 5))
    value = table(2 * 3 * 4)
    got = resized(ResizePosEmbed(0, (2, 3, 4), (2, 5, 6)), value, 60).view(2, 30, 5)
    for step in range(2):
        want = interpolated(value.view(2, 12, 5)[step], (3, 4), (5, 6), "bicubic")
        torch.testing.assert_close(got[step][None], want)


def test_a_table_with_the_grid_in_its_shape():
    value = table(12)
    adapter = ResizePosEmbed(0, (3, 4), (5, 2))
    want = resized(adapter, value, 10)
    last, first = torch.zeros(1, 5, 2, 5, dtype=torch.float64), torch.zeros(1, 7, 5, 2, dtype=torch.float64)
    adapter.check((1, 3, 4, 5), (1, 5, 2, 5))
    assert same_bits(adapter.apply(value.view(1, 3, 4, 5), last).flatten(1, 2), want)
    value = table(12, 7)
    channels = adapter.apply(value.view(1, 3, 4, 7).permute(0, 3, 1, 2), first)
    assert channels.shape == first.shape
    assert same_bits(channels.permute(0, 2, 3, 1).flatten(1, 2).contiguous(), resized(adapter, value, 10))


@pytest.mark.parametrize(
    ("options", "source", "target"),
    [
        ({"prefix_tokens": 0}, (1, 5, 4, 4), (1, 5, 8, 8)),
        ({"src_grid": (4, 4), "dst_grid": (8, 8)}, (1, 4, 4, 5), (1, 8, 8, 5)),  # one prefix token
        ({"prefix_tokens": 0, "src_grid": (4, 4), "dst_grid": (8, 8)}, (1, 4, 4, 5), (1, 8, 8, 6)),
        ({"prefix_tokens": 0, "src_grid": (4, 4), "dst_grid": (4, 4)}, (1, 4, 4, 4), (1, 4, 4, 4)),  # which two?
        ({"prefix_tokens": 0, "src_grid": (4, 4), "dst_grid": (8, 8)}, (2, 4, 4, 5), (2, 8, 8, 5)),
    ],
)
def test_a_grid_in_a_shape_is_refused_where_it_is_ambiguous(options, source, target):
    with pytest.raises(MappingError, match="need both grids, and have no prefix tokens"):
        ResizePosEmbed(**options).check(source, target)


def test_a_grid_of_one_point_becomes_a_constant_and_a_constant_stays_one():
    value = table(2)
    assert torch.equal(resized(ResizePosEmbed(), value, 10)[:, 1:], value[:, 1:].expand(1, 9, 5))
    constant = torch.full((16, 3), 0.3)
    assert torch.equal(resized(ResizePosEmbed(0), constant, 49), torch.full((49, 3), 0.3))


def test_one_nan_does_not_spread_over_the_table():
    value = table(82)
    value[0, 1, 0] = float("nan")
    got = resized(ResizePosEmbed(), value, 325)
    assert 0 < got.isnan().sum() <= 25  # the cubic reaches two points far
    assert not got[..., 1:].isnan().any()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1, 17, 5), (1, 26, 6)),
        ((1, 17, 5), (26, 5)),
        ((2, 17, 5), (2, 26, 5)),
        ((17,), (26,)),
        ((1, 0, 5), (1, 26, 5)),
        ((1, 1, 5), (1, 26, 5)),
        ((), (1,)),
    ],
)
def test_other_layouts_are_refused(source, target):
    with pytest.raises(MappingError, match=r"(?s)^checkpoint \(.*\n  -> "):
        ResizePosEmbed().check(source, target)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_tokens": -1},
        {"prefix_tokens": True},
        {"prefix_tokens": "1"},
        {"src_grid": (0, 4)},
        {"src_grid": "14x14"},
        {"src_grid": ()},
        {"dst_grid": (4.0, 4.0)},
        {"dst_grid": 14.0},
        {"dst_grid": True},
        {"mode": "nearest"},
    ],
)
def test_values_that_cannot_be_meant_are_refused_with_the_line_to_type(options):
    with pytest.raises(MappingError, match="write "):
        ResizePosEmbed(**options)
