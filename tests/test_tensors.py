from __future__ import annotations

import math

import pytest
import torch

from warmstart.tensors import as_words, bits_lost, digest, range_lost, same_bits, sample

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = [F16, BF16, F32, F64, E4M3, E5M2, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
          torch.complex64, torch.complex128]  # fmt: skip


def bits32(*words: int) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 1, 3)])
def test_a_copy_has_the_same_bits_and_the_same_digest(dtype, shape):
    tensor = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    assert same_bits(tensor, tensor.clone())
    assert digest(tensor) == digest(tensor.clone())
    assert as_words(tensor).dim() == 1
    assert as_words(tensor).numel() * as_words(tensor).element_size() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.bool])
def test_a_change_of_any_single_element_changes_the_digest(dtype):
    tensor = torch.arange(1, 13, dtype=torch.float64).reshape(3, 4).to(dtype)
    for position in range(12):
        other = tensor.clone()
        other.view(-1)[position] = 99 if dtype != E4M3 else 96
        assert not same_bits(tensor, other)
        assert digest(tensor) != digest(other)


def test_a_nan_equals_the_same_nan_only_and_minus_zero_is_not_zero():
    quiet, payload = bits32(0x7FC00000), bits32(0x7FC00001)
    assert math.isnan(quiet.item())
    assert math.isnan(payload.item())
    assert same_bits(quiet, quiet.clone())
    assert not same_bits(quiet, payload)
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))


def test_shape_and_dtype_belong_to_the_value():
    flat = torch.zeros(6)
    assert not same_bits(flat, flat.reshape(2, 3))
    assert not same_bits(flat, flat.to(torch.int32))
    assert len({digest(t) for t in (flat, flat.reshape(2, 3), flat.reshape(3, 2), flat.to(torch.int32))}) == 4


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_a_digest_of_a_cast_is_that_of_the_tensor_cast(dtype):
    tensor = torch.randn(3, 70_000, dtype=F64).t()  # more than is cast at a time
    assert digest(tensor, dtype) == digest(tensor.to(dtype))
    assert digest(tensor, F64) == digest(tensor)


def test_layout_does_not_belong_to_the_value():
    tensor = torch.randn(4, 6)
    strided = torch.empty(6, 4).t().copy_(tensor)
    assert same_bits(tensor, strided)
    assert digest(tensor) == digest(strided)
    expanded = torch.randn(1, 5).expand(3, 5)
    assert same_bits(expanded, expanded.contiguous())


def test_a_part_of_a_storage_compares_wherever_it_starts():
    """A shard of an odd number of elements before it: its words are no multiple of eight bytes into its storage."""
    flat = bits32(*range(12))
    for start in range(4):
        part = flat.narrow(0, start, 8)
        assert same_bits(part, part.clone())
        assert not same_bits(part, part + 1)
    behind = torch.from_numpy(flat.numpy()[1:])  # its address is odd too: offset and address do not go together
    assert same_bits(behind[1:9], flat[2:10])


def test_lazy_conjugates_and_negatives_count_as_what_they_mean():
    tensor = torch.randn(3, dtype=torch.complex64)
    conjugate = tensor.conj()
    assert conjugate.is_conj()
    assert same_bits(conjugate, conjugate.resolve_conj())
    assert not same_bits(tensor, conjugate)
    negative = tensor.conj().imag
    assert negative.is_neg()
    assert same_bits(negative, negative.resolve_neg())


def test_swapped_elements_and_rows_change_the_digest():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert digest(tensor) != digest(tensor.flip(0))
    assert digest(tensor) != digest(tensor[:, [1, 0, 2, 3]])


def test_the_digest_goes_on_beyond_one_chunk():
    tensor = torch.zeros((1 << 20) + 3, dtype=torch.uint8)
    digests = {digest(tensor)}
    for position in (0, (1 << 20) - 1, 1 << 20, (1 << 20) + 2):
        other = tensor.clone()
        other[position] = 1
        digests.add(digest(other))
    assert len(digests) == 5


def test_a_digest_needs_no_grad_and_leaves_the_tensor_alone():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert 0 <= digest(parameter) < 1 << 64
    assert parameter.grad is None
    assert parameter.requires_grad


@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 100_003])
def test_a_sample_is_always_the_same_few_elements_spread_evenly(size):
    tensor = torch.arange(size)
    chosen = sample(tensor)
    assert chosen.numel() == min(size, 4096)
    assert torch.equal(chosen, sample(tensor))
    assert chosen.unique().numel() == chosen.numel()
    assert chosen[0] == 0
    assert chosen[-1] >= size - 1 - size // 4096


@pytest.mark.parametrize(
    ("source", "target", "lost"),
    [
        (F32, F32, False),
        (F32, BF16, False),  # bfloat16 has float32's range
        (BF16, F32, False),
        (F32, F16, True),
        (BF16, F16, True),
        (F16, BF16, False),
        (F64, F32, True),
        (F64, BF16, True),
        (F16, E5M2, True),
        (E5M2, F16, False),
        (E4M3, F16, False),
        (F32, torch.int8, True),
        (torch.int64, torch.int32, True),
        (torch.int64, F16, True),
        (torch.complex128, torch.complex64, True),
        (torch.complex64, torch.complex128, False),
    ],
)
def test_range_is_lost_where_a_finite_value_can_become_another_kind_of_value(source, target, lost):
    assert range_lost(source, target) is lost


@pytest.mark.parametrize(
    ("source", "target", "lost"),
    [
        (F32, F32, False),
        (F32, F64, False),
        (F16, F32, False),
        (BF16, F32, False),
        (F32, BF16, True),
        (F32, F16, True),
        (F64, F32, True),
        (BF16, F16, True),  # its range
        (F16, BF16, True),  # its precision
        (F32, E4M3, True),
        (E4M3, F16, False),
        (torch.int64, torch.int32, False),  # integers do not round
        (torch.complex128, torch.complex64, True),
        (torch.complex64, torch.complex128, False),
    ],
)
def test_bits_are_lost_where_a_cast_can_round(source, target, lost):
    assert bits_lost(source, target) is lost
