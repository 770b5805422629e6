from __future__ import annotations

import pytest
import torch
from torch import nn

from warmstart import MappingError
from warmstart.mapping.adapters.channels import AdaptInChannels
from warmstart.tensors import same_bits


def adapted(mode: str, weight: torch.Tensor, channels: int) -> torch.Tensor:
    adapter = AdaptInChannels(mode)  # type: ignore[arg-type]
    target = (weight.shape[0], channels, *weight.shape[2:])
    adapter.check(tuple(weight.shape), target)
    return adapter.apply(weight, torch.zeros(target, dtype=weight.dtype))


@pytest.mark.parametrize("mode", ["repeat", "mean"])
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("m", range(1, 9))
def test_field_note_29_a_constant_image_gives_the_same_output(mode, n, m):
    old, new = nn.Conv2d(n, 4, 3), nn.Conv2d(m, 4, 3)
    with torch.no_grad():
        new.weight.copy_(adapted(mode, old.weight.detach(), m))
        new.bias.copy_(old.bias)
        image = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(new(image.expand(2, m, 8, 8)), old(image.expand(2, n, 8, 8)), rtol=1e-5, atol=1e-6)


def test_repeat_deals_the_channels_out_in_turn():
    weight = torch.tensor([[3.0, 6.0, 8.0]])
    assert adapted("repeat", weight, 1).tolist() == [[17]]
    assert adapted("repeat", weight, 2).tolist() == [[11, 6]]
    assert adapted("repeat", weight, 4).tolist() == [[1.5, 6, 8, 1.5]]
    assert adapted("repeat", weight, 6).tolist() == [[1.5, 3, 4, 1.5, 3, 4]]


def test_mean_gives_every_channel_the_same():
    assert adapted("mean", torch.tensor([[3.0, 6.0, 9.0]]), 2).tolist() == [[9, 9]]
    assert adapted("mean", torch.tensor([[3.0, 6.0, 9.0]]), 6).tolist() == [[3] * 6]


def test_slice_takes_the_first_channels_bit_for_bit():
    weight = torch.randn(4, 5, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    assert same_bits(adapted("slice", weight, 3), weight[:, :3])
    with pytest.raises(MappingError, match=r"(?s)the first 6 of 5 .*-> adapt={\"<entry>\": AdaptInChannels\(\)}$"):
        adapted("slice", weight, 6)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_any_rank_and_grouped_ones(conv):
    old, new = conv(6, 4, 3, groups=2), conv(10, 4, 3, groups=2)
    weight = old.weight.detach()
    assert adapted("repeat", weight, 5).shape == new.weight.shape
    torch.testing.assert_close(adapted("repeat", weight, 5).sum(1), weight.sum(1))


@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 3, 3, 3), (5, 3, 3, 3)), ((4, 3, 3, 3), (4, 1, 5, 3)), ((3,), (4,)), ((4, 3), (4, 3, 1)), ((4, 0), (4, 3))],
)
def test_only_dimension_1_may_differ(source, target):
    with pytest.raises(MappingError) as error:
        AdaptInChannels().check(source, target)
    assert str(error.value).startswith(f"checkpoint {source}, model {target}: ")


def test_a_mode_that_there_is_not():
    with pytest.raises(MappingError, match=r'mode=\'sum\': write AdaptInChannels\(mode="repeat"\)'):
        AdaptInChannels(mode="sum")  # type: ignore[arg-type]
