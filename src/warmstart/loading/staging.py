"""Bytes onto a CUDA device, or compared with what lies there: through pinned memory, from which a device reads by itself."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stage:
    """A thread's own pinned memory and stream. What it is asked for is done when it returns.

    Attributes:
        size: How many bytes of pinned memory it has.
        address: Where they start, to be read to.
    """

    size = 4 << 20  # eight threads hold 32 MiB

    def __init__(self, device: torch.device) -> None:
        with torch.device("cpu"):
            self._pinned = torch.empty(self.size, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.address = self._pinned.data_ptr()

    def put(self, to: Tensor) -> None:
        """Copy the first bytes, as many as `to` has."""
        with torch.cuda.stream(self._stream):
            to.copy_(self._pinned[: to.numel()], non_blocking=True)
        self._stream.synchronize()

    def is_at(self, at: Tensor) -> bool:
        """Whether the first bytes are what `at` has: compared on the device, to which they go a second time."""
        with torch.cuda.stream(self._stream):
            return torch.equal(at, self._pinned[: at.numel()].to(at.device, non_blocking=True))

    def all_finite(self, at: Tensor, size: int, least: int) -> bool:
        """Whether no float of `size` bytes in `at` has all the bits of `least`, as NaN and infinity have."""
        with torch.cuda.stream(self._stream):
            return not bool(((at.view(_INTEGER[size]) & least) == least).any())
