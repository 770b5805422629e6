"""Linear maps along one dimension of a tensor, in float64, with the same bits whatever the number of threads."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FILTERS = {"bicubic": "bicubic", "linear": "bilinear"}


def wide(value: Tensor) -> Tensor:
    """The values in float64, or complex128."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def resampling(src: int, dst: int, mode: str) -> Tensor:
    """The matrix (dst, src) in float64 that resamples `src` points to `dst`.

    "bicubic" and "linear" are `torch.nn.functional.interpolate(..., antialias=True)`, pixel centres aligned
    (`align_corners=False`), as in timm's `resample_abs_pos_embed`; all of them are separable, so a grid of any rank is
    resampled axis by axis. "repeat" gives point i the value of point i mod `src`.
    """
    identity = torch.eye(src, dtype=torch.float64, device="cpu")
    if mode == "repeat":
        return identity[torch.arange(dst, device="cpu") % src]
    # As rows of an image, not as channels: of an image one pixel wide, some versions of torch read the wrong rows.
    image = F.interpolate(identity[None, None], size=(dst, src), mode=_FILTERS[mode], antialias=True)
    return image[0, 0]


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """The Moore-Penrose inverse (n, m) of a matrix (m, n) of full rank, in float64.

    By the normal equations, which resampling matrices allow (their condition number stays below 4 for up to 48
    points), and without BLAS or LAPACK: the last bits of `torch.linalg.pinv` depend on the number of threads.
    """
    m, n = matrix.shape
    tall = (matrix if m >= n else matrix.T).numpy()
    size = tall.shape[1]
    system = np.concatenate([np.add.reduce(tall[:, :, None] * tall[:, None, :], axis=0), tall.T], axis=1)
    for i in range(size):  # Gauss-Jordan; a positive definite matrix needs no pivots
        system[i] /= system[i, i]
        others = np.arange(size) != i
        system[others] -= system[others, i, None] * system[i]
    inverse = torch.from_numpy(system[:, size:])
    return inverse if m >= n else inverse.T


def along(value: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """`value` (..., src, ...) with `matrix` (dst, src) applied to dimension `dim`: (..., dst, ...).

    Sums in a fixed order, one tap of each output after the other, where a matrix product's order is BLAS's own. An
    element that a tap does not weigh does not enter, be it NaN.
    """
    taps = matrix != 0
    count = max(1, int(taps.sum(dim=1).max()))
    index = torch.argsort(~taps, dim=1, stable=True)[:, :count]
    weights = matrix.gather(1, index)
    shape = [-1 if d == dim else 1 for d in range(value.ndim)]
    total: Tensor | None = None
    for tap in range(count):
        weight = weights[:, tap].view(shape)
        part = value.index_select(dim, index[:, tap]).mul_(weight).masked_fill_(weight == 0, 0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
