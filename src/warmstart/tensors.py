"""Tensors as bits: equality, digests and casts that treat NaN and -0.0 as what they are."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 16  # elements of the multiplier table: with as many of a tensor it stays in a core's cache
_MASK = (1 << 64) - 1


def as_words(tensor: Tensor) -> Tensor:
    """The tensor's bits as a flat integer tensor, on the CPU (no copy where it already lies there contiguously)."""
    flat = _flat(tensor)
    return flat.view(_WORD[flat.element_size()])


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().cpu().contiguous().reshape(-1)


def wide_words(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of two tensors of one shape and dtype as flat integers, of eight bytes where that goes: the fastest."""
    a, b = as_words(a), as_words(b)
    if a.element_size() < 8 and not a.nbytes % 8 and all(map(_starts_wide, (a, b))):
        a, b = a.view(torch.int64), b.view(torch.int64)
    return a, b


def _starts_wide(words: Tensor) -> bool:
    """Whether eight bytes can be read where it starts: by its address, and as torch asks, by its place in its storage."""
    return not (words.data_ptr() % 8 or words.storage_offset() * words.element_size() % 8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits (NaN equals the same NaN, -0.0 is not 0.0)."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*wide_words(a, b))


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """A 64-bit position-dependent checksum of a tensor's bits, dtype and shape, at memory speed.

    A weighted sum with odd multipliers modulo 2**64: every change of a single element changes it. It tells accidents
    apart, not adversaries.

    Args:
        tensor: The tensor.
        dtype: Of a real floating-point tensor, what to cast it to first; no more than a piece of it is cast at a time.
    """
    flat, total = _flat(tensor), _seed(dtype or tensor.dtype, tensor.shape)
    cast = dtype is not None and dtype != tensor.dtype  # a complex tensor lies flat as real numbers
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        words = as_words(piece.to(dtype) if cast else piece).to(torch.int64)
        part = int(torch.dot(words, _multipliers()[: words.numel()]))
        total = (total * 0x9E3779B97F4A7C15 + part) & _MASK
    return total


def sample(tensor: Tensor, count: int = 4096) -> Tensor:
    """At most `count` elements of a tensor, flat, evenly spread and always the same ones."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= count:
        return flat
    return flat[_spread(flat.numel(), count).to(flat.device)]


@functools.lru_cache(maxsize=64)
def _spread(numel: int, count: int) -> Tensor:
    # A stride coprime to common row lengths, so that the sample does not run down one column.
    with torch.device("cpu"):
        return (torch.arange(count, dtype=torch.float64) * (numel / count)).to(torch.int64)


def non_finite(tensor: Tensor) -> Tensor:
    """Where a floating or complex tensor is NaN or infinite, as booleans; dtypes without kernels of their own included."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    elif tensor.dtype == torch.complex32:
        tensor = tensor.to(torch.complex64)
    return ~torch.isfinite(tensor)


def castable(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast keeps the kind of number: float to float, integer to integer, complex to complex."""

    def kind(dtype: torch.dtype) -> str:
        if dtype.is_floating_point:
            return "float"
        if dtype.is_complex:
            return "complex"
        return "bool" if dtype == torch.bool else "int"

    quantised = {torch.quint8, torch.qint8, torch.qint32}
    return kind(source) == kind(target) and not {source, target} & quantised


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def range_lost(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast can turn a finite value into another kind of value (inf, or a wrapped integer)."""
    if source == target:
        return False
    if target.is_floating_point or target.is_complex:
        if not (source.is_floating_point or source.is_complex):
            return True
        return torch.finfo(target).max < torch.finfo(source).max * (1 - 2**-6)
    return True


def bits_lost(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast from `source` to `target` can round."""
    if source == target or not (source.is_floating_point or source.is_complex):
        return False
    s, t = torch.finfo(source), torch.finfo(target)
    return t.eps > s.eps or t.max < s.max or t.tiny > s.tiny


_table: Tensor | None = None


def _multipliers() -> Tensor:
    global _table
    if _table is None:
        index = torch.arange(_CHUNK, dtype=torch.int64)
        _table = (index * 0x5851F42D4C957F2D) ^ 0x14057B7EF767814F | 1
    return _table


def _seed(dtype: torch.dtype, shape: torch.Size) -> int:
    seed = 14695981039346656037
    for byte in f"{dtype}{tuple(shape)}".encode():
        seed = ((seed ^ byte) * 1099511628211) & _MASK
    return seed
