from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from warmstart import MappingError
from warmstart.mapping.adapters.relative_bias import ResizeRelPosBias
from warmstart.tensors import same_bits


def resized(adapter: ResizeRelPosBias, value: torch.Tensor, rows: int) -> torch.Tensor:
    adapter.check(tuple(value.shape), (rows, value.shape[1]))
    return adapter.apply(value, torch.zeros(rows, value.shape[1], dtype=value.dtype))


def test_swin_a_window_of_7_becomes_one_of_12():
    value = torch.randn(13 * 13, 4, dtype=torch.float64)
    image = value.T.reshape(1, 4, 13, 13)
    want = F.interpolate(image, size=(23, 23), mode="bicubic", antialias=True).reshape(4, -1).T
    got = resized(ResizeRelPosBias(), value, 23 * 23)
    torch.testing.assert_close(got, want)
    assert same_bits(got, resized(ResizeRelPosBias(src_window=[7, 7], dst_window=[12, 12]), value, 23 * 23))


def test_the_middle_offset_stays_in_the_middle():
    value = torch.linspace(-6, 6, 13, dtype=torch.float64).repeat(13, 1).reshape(-1, 1)  # the offset in x itself
    got = resized(ResizeRelPosBias(mode="linear"), value, 23 * 23).view(23, 23)
    torch.testing.assert_close(got[:, 11], torch.zeros(23, dtype=torch.float64))
    torch.testing.assert_close(got, -got.flip(1))


def test_beit_s_three_rows_stay_at_the_end_bit_for_bit():
    value = torch.randn(27 * 27 + 3, 12)
    got = resized(ResizeRelPosBias(extra_rows=3), value, 47 * 47 + 3)
    assert same_bits(got[-3:], value[-3:])
    plain = resized(ResizeRelPosBias(), value[:-3], 47 * 47)
    assert same_bits(got[:-3], plain)


def test_beit_s_table_without_its_extra_rows_names_them():
    with pytest.raises(MappingError, match=r'-> adapt={"<entry>": ResizeRelPosBias\(extra_rows=3\)}$'):
        ResizeRelPosBias().check((732, 12), (2212, 12))


def test_windows_that_are_no_squares_and_of_three_axes():
    value = torch.randn(3 * 5, 2, dtype=torch.float64)
    got = resized(ResizeRelPosBias(0, (2, 3), (3, 4)), value, 5 * 7)
    want = F.interpolate(value.T.reshape(1, 2, 3, 5), size=(5, 7), mode="bicubic", antialias=True).reshape(2, -1).T
    torch.testing.assert_close(got, want)
    video = torch.randn(3 * 5 * 5, 2, dtype=torch.float64)
    deep = resized(ResizeRelPosBias(0, (2, 3, 3), (2, 4, 4)), video, 3 * 7 * 7).view(3, 49, 2)
    for step in range(3):
        same = resized(ResizeRelPosBias(0, (3, 3), (4, 4)), video.view(3, 25, 2)[step], 49)
        torch.testing.assert_close(deep[step], same)


def test_equal_counts_are_resampled_between_two_windows():
    value = torch.randn(9 * 5, 2)
    assert not torch.equal(resized(ResizeRelPosBias(0, (5, 3), (3, 5)), value, 45), value)
    assert ResizeRelPosBias(0, (5, 3), (3, 5)).no_inverse((45, 2), (45, 2))
    assert same_bits(resized(ResizeRelPosBias(0, (5, 3), (5, 3)), value, 45), value)


@pytest.mark.parametrize(
    ("options", "source", "target"),
    [
        ({}, (169, 4), (529, 5)),
        ({}, (1, 169, 4), (1, 529, 4)),
        ({}, (64, 4), (169, 4)),  # an even square is no table of offsets
        ({}, (45, 4), (169, 4)),
        ({"src_window": (7, 7), "dst_window": (12, 12)}, (169, 4), (400, 4)),
        ({"src_window": (7, 7, 7)}, (169, 4), (529, 4)),
        ({"extra_rows": 200}, (169, 4), (529, 4)),
        ({"extra_rows": 3}, (0, 4), (84, 4)),
    ],
)
def test_what_does_not_fit_is_refused(options, source, target):
    with pytest.raises(MappingError) as error:
        ResizeRelPosBias(**options).check(source, target)
    assert str(error.value).startswith(f"checkpoint {source}, model {target}: ")
    assert "\n  -> " in str(error.value)


def test_windows_are_suggested_where_there_are_some():
    with pytest.raises(MappingError, match=r"src_window=\(3, 5\), dst_window=\(7, 7\)\)}$"):
        ResizeRelPosBias().check((45, 4), (169, 4))
    ResizeRelPosBias(src_window=(3, 5), dst_window=(7, 7)).check((45, 4), (169, 4))


@pytest.mark.parametrize("options", [{"extra_rows": -1}, {"src_window": (7, 0)}, {"mode": "repeat"}])
def test_values_that_cannot_be_meant_are_refused(options):
    with pytest.raises(MappingError, match="write "):
        ResizeRelPosBias(**options)
