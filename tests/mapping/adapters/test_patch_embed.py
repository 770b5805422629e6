from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from warmstart import MappingError
from warmstart.mapping.adapters.patch_embed import ResizePatchEmbed
from warmstart.mapping.adapters.resampling import pseudo_inverse, resampling


def resized(kernel: torch.Tensor, *size: int) -> torch.Tensor:
    target = (*kernel.shape[:2], *size)
    ResizePatchEmbed().check(tuple(kernel.shape), target)
    return ResizePatchEmbed().apply(kernel, torch.zeros(target, dtype=kernel.dtype))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (5, 9), (4, 7), (32, 6)])
def test_a_larger_patch_gives_the_output_of_the_smaller_one(size):
    kernel = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    patches = torch.randn(20, 3, 4, 4, dtype=torch.float64)
    larger = F.interpolate(patches, size=size, mode="bicubic", antialias=True)
    new = resized(kernel, *size)
    torch.testing.assert_close(F.conv2d(larger, new), F.conv2d(patches, kernel))


def test_a_patch_of_14_becomes_one_of_16_in_float32_on_a_whole_image():
    kernel = torch.randn(8, 3, 14, 14)
    images = torch.randn(2, 3, 4, 14, 4, 14)  # 4 x 4 patches, each resized alone
    patches = images.permute(0, 2, 4, 1, 3, 5).reshape(32, 3, 14, 14)
    larger = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    whole = larger.reshape(2, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    old = F.conv2d(images.reshape(2, 3, 56, 56), kernel, stride=14)
    torch.testing.assert_close(F.conv2d(whole, resized(kernel, 16, 16), stride=16), old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("src", "dst"), [((4, 4), (8, 6)), ((8, 8), (5, 3)), ((8, 3), (4, 6))])
def test_it_is_flexivit_s_pseudo_inverse_of_the_whole_resize(src, dst):
    kernel = torch.randn(2, 3, *src, dtype=torch.float64)
    basis = torch.eye(src[0] * src[1], dtype=torch.float64).view(-1, 1, *src)
    resize = F.interpolate(basis, size=dst, mode="bicubic", antialias=True).flatten(1).T  # (dst, src)
    want = torch.einsum("ds,ois->oid", torch.linalg.pinv(resize.T), kernel.flatten(2)).view(2, 3, *dst)
    torch.testing.assert_close(resized(kernel, *dst), want)


def test_a_smaller_patch_gives_the_output_of_the_larger_one_for_patches_without_finer_detail():
    # Those in the span of the resizing's rows; for others the smaller kernel is the closest there is.
    height, width = resampling(8, 5, "bicubic"), resampling(8, 6, "bicubic")
    kernel = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    patches = torch.einsum("Hh,ncHW,Ww->nchw", height, torch.randn(20, 3, 5, 6, dtype=torch.float64), width)
    smaller = F.interpolate(patches, size=(5, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(F.conv2d(smaller, resized(kernel, 5, 6)), F.conv2d(patches, kernel))


@pytest.mark.parametrize("size", [(6,), (3, 6, 5)])
def test_kernels_with_one_or_three_spatial_axes(size):
    small = (4,) if len(size) == 1 else (2, 4, 4)
    kernel = torch.randn(5, 2, *small, dtype=torch.float64)
    patch = torch.randn(1, 2, *small, dtype=torch.float64)
    larger = patch
    for dim, (a, b) in enumerate(zip(small, size, strict=True), start=2):
        larger = torch.tensordot(larger, resampling(a, b, "bicubic"), dims=([dim], [1])).movedim(-1, dim)
    convolve = F.conv1d if len(size) == 1 else F.conv3d
    torch.testing.assert_close(convolve(larger, resized(kernel, *size)), convolve(patch, kernel))


@pytest.mark.parametrize("src", [1, 2, 3, 8, 14, 16, 31, 32])
def test_the_pseudo_inverse_is_the_moore_penrose_inverse(src):
    for dst in (1, 2, 7, 14, 15, 16, 17, 32, 33):
        matrix = resampling(src, dst, "bicubic")
        torch.testing.assert_close(pseudo_inverse(matrix), torch.linalg.pinv(matrix), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((8, 3, 4, 4), (8, 4, 8, 8)),
        ((8, 3, 4, 4), (4, 3, 8, 8)),
        ((8, 3, 4, 4), (8, 3, 8)),
        ((8, 48), (8, 192)),
        ((8, 3, 4, 4), (8, 3, 0, 4)),
        ((8, 3, 0, 4), (8, 3, 4, 4)),
    ],
)
def test_what_is_no_kernel_is_refused(source, target):
    with pytest.raises(MappingError) as error:
        ResizePatchEmbed().check(source, target)
    assert str(error.value).startswith(f"checkpoint {source}, model {target}: ")
    assert str(error.value).endswith('-> allow_mismatched=["<entry>"]')
