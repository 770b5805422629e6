from __future__ import annotations

import pytest
import torch
from torch import nn

from warmstart import MappingError
from warmstart.mapping.adapters.inflation import InflateConv
from warmstart.tensors import same_bits


def inflated(mode: str, weight: torch.Tensor, steps: int) -> torch.Tensor:
    adapter = InflateConv(mode)  # type: ignore[arg-type]
    target = (*weight.shape[:2], steps, *weight.shape[2:])
    adapter.check(tuple(weight.shape), target)
    return adapter.apply(weight, torch.zeros(target, dtype=weight.dtype))


@pytest.mark.parametrize("mode", ["average", "center"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_a_clip_that_repeats_one_frame_gives_the_output_of_the_frame(mode, steps):
    flat, deep = nn.Conv2d(3, 5, 3, padding=1), nn.Conv3d(3, 5, (steps, 3, 3), padding=(0, 1, 1))
    with torch.no_grad():
        deep.weight.copy_(inflated(mode, flat.weight.detach(), steps))
        deep.bias.copy_(flat.bias)
        frame = torch.randn(2, 3, 6, 6)
        out = deep(frame.unsqueeze(2).repeat(1, 1, 8, 1, 1))
        torch.testing.assert_close(out, flat(frame).unsqueeze(2).expand_as(out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 5])
def test_center_does_not_mix_frames_at_all(steps):
    flat, deep = nn.Conv2d(3, 5, 3), nn.Conv3d(3, 5, (steps, 3, 3), padding=(steps // 2, 0, 0))
    with torch.no_grad():
        deep.weight.copy_(inflated("center", flat.weight.detach(), steps))
        deep.bias.copy_(flat.bias)
        clip = torch.randn(2, 3, 6, 8, 8)
        alone = torch.stack([flat(clip[:, :, t]) for t in range(6)], dim=2)
        torch.testing.assert_close(deep(clip), alone, rtol=1e-5, atol=1e-5)


def test_center_comes_back_bit_for_bit_and_average_says_why_not():
    weight = torch.randn(4, 3, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    target = (4, 3, 4, 3, 3)
    assert InflateConv("center").no_inverse((4, 3, 3, 3), target) is None
    assert same_bits(InflateConv("center").undo(inflated("center", weight, 4), (4, 3, 3, 3)).contiguous(), weight)
    assert InflateConv().no_inverse((4, 3, 3, 3), target) == "dividing by 4 rounds"
    assert InflateConv().no_inverse((4, 3, 3, 3), (4, 3, 1, 3, 3)) is None
    assert same_bits(InflateConv().undo(inflated("average", weight, 1), (4, 3, 3, 3)).contiguous(), weight)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((4, 3, 3, 3), (4, 3, 3, 5, 3)),
        ((4, 3, 3, 3), (4, 3, 0, 3, 3)),
        ((4, 3, 3, 3), (4, 2, 3, 3, 3)),
        ((4, 3, 3), (4, 3, 3, 3)),
        ((4, 3, 3, 3, 3), (4, 3, 3, 3)),
    ],
)
def test_what_is_no_such_pair_is_refused(source, target):
    with pytest.raises(MappingError) as error:
        InflateConv().check(source, target)
    assert str(error.value).startswith(f"checkpoint {source}, model {target}: ")
