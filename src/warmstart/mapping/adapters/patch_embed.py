"""Patch embeddings: the kernel of a convolution whose stride is its size, for patches of another size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.refusals import KEEP_OWN, refused
from warmstart.mapping.adapters.resampling import along, pseudo_inverse, resampling, wide
from warmstart.mapping.derivations import Shape


@dataclass(frozen=True)
class ResizePatchEmbed(Adapter):
    """A patch embedding's kernel (out, in, h, w), or with one or three spatial axes, resized to another patch size.

    By the pseudo-inverse of FlexiViT (Beyer et al. 2022, arXiv:2212.08013, equation 4; timm's `resample_patch_embed`): with B
    the bicubic, antialiased resizing of a patch, the new kernel is `pinv(B.T) @ kernel`. A patch resized to a larger size
    then gives the output that the old kernel gives for the patch; for a smaller size it is the closest kernel. Since B is
    separable, each axis is solved alone. In float64.
    """

    def check(self, source: Shape, target: Shape) -> None:
        if source == target:
            return
        if len(source) != len(target) or not 3 <= len(source) <= 5 or source[:2] != target[:2]:
            why = "kernels (out, in, height, width) are needed that differ in their sizes alone"
            raise refused(source, target, why, KEEP_OWN)
        if 0 in source or 0 in target:
            raise refused(source, target, "an empty kernel cannot be resized", KEEP_OWN)

    def apply(self, value: Tensor, current: Tensor) -> Tensor:
        if value.shape == current.shape:
            return value.to(current.dtype)
        kernel = wide(value)
        for dim in range(2, value.ndim):
            src, dst = value.shape[dim], current.shape[dim]
            if src != dst:
                kernel = along(kernel, dim, pseudo_inverse(resampling(src, dst, "bicubic")).T)
        return kernel.to(current.dtype)
