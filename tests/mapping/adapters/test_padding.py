from __future__ import annotations

import pytest
import torch

from warmstart import MappingError
from warmstart.mapping.adapters.padding import SliceOrPad
from warmstart.tensors import same_bits


def test_each_dimension_is_cut_or_padded_at_its_end():
    value = torch.arange(6.0).view(2, 3)
    assert SliceOrPad(fill=9.0).apply(value, torch.zeros(3, 2)).tolist() == [[0, 1], [3, 4], [9, 9]]
    assert SliceOrPad(fill=9).apply(value, torch.zeros(2, 4)).tolist() == [[0, 1, 2, 9], [3, 4, 5, 9]]
    assert SliceOrPad().apply(value, torch.full((3, 2), 7.0)).tolist() == [[0, 1], [3, 4], [7, 7]]
    assert SliceOrPad().apply(value, torch.zeros(1, 2)).tolist() == [[0, 1]]


def test_the_mask_is_what_the_checkpoint_gave():
    assert SliceOrPad().loaded((2, 3), (2, 2)) is None
    assert SliceOrPad().loaded((2, 3), (3, 4)).tolist() == [[True] * 3 + [False]] * 2 + [[False] * 4]
    assert SliceOrPad().loaded((2, 3), (3, 3)).shape == (3, 1)


def test_growing_comes_back_and_cutting_does_not():
    value = torch.randn(2, 3)
    value[0, 0] = float("nan")
    grown = SliceOrPad().apply(value, torch.randn(4, 3))
    assert SliceOrPad().no_inverse((2, 3), (4, 3)) is None
    assert same_bits(SliceOrPad().undo(grown, (2, 3)), value)
    assert SliceOrPad().no_inverse((2, 3), (4, 2)) == "what was cut off is gone"


def test_an_empty_tensor_leaves_the_entry_as_it_was():
    current = torch.randn(3, 2)
    assert same_bits(SliceOrPad().apply(torch.empty(0, 2), current), current)
    assert not SliceOrPad().loaded((0, 2), (3, 2)).any()
    assert SliceOrPad().apply(torch.randn(3, 2), torch.empty(0, 2)).shape == (0, 2)


def test_another_number_of_dimensions_is_refused():
    with pytest.raises(MappingError, match=r"^checkpoint \(2, 3\), model \(6,\): the same number of dimensions"):
        SliceOrPad().check((2, 3), (6,))


@pytest.mark.parametrize("fill", ["mean", True, None, "0.0"])
def test_a_fill_that_is_none(fill):
    with pytest.raises(MappingError, match=r'write SliceOrPad\(fill="keep"\) or SliceOrPad\(fill=0.0\)'):
        SliceOrPad(fill=fill)
