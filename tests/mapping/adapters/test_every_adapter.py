"""What holds for every adapter: exact where nothing changes, the entry's dtype, untouched arguments, the same bits."""

from __future__ import annotations

import pickle
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart import MappingError
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.registry import (
    ADAPTERS,
    AdaptInChannels,
    InflateConv,
    MapRows,
    ResizePatchEmbed,
    ResizePosEmbed,
    ResizeRelPosBias,
    SliceOrPad,
)
from warmstart.tensors import same_bits

CHANGES: list[tuple[Adapter, tuple[int, ...], tuple[int, ...]]] = [
    (ResizePosEmbed(), (1, 17, 6), (1, 26, 6)),
    (ResizePosEmbed(mode="linear"), (17, 6), (10, 6)),
    (ResizePosEmbed(0, 16, 30, mode="repeat"), (16, 6), (30, 6)),
    (ResizePatchEmbed(), (4, 3, 8, 8), (4, 3, 7, 11)),
    (ResizeRelPosBias(extra_rows=3), (28, 4), (84, 4)),
    (AdaptInChannels(), (4, 3, 3, 3), (4, 5, 3, 3)),
    (AdaptInChannels("mean"), (4, 3), (4, 2)),
    (AdaptInChannels("slice"), (4, 3, 3), (4, 2, 3)),
    (InflateConv(), (4, 3, 3, 3), (4, 3, 5, 3, 3)),
    (InflateConv("center"), (4, 3, 3, 3), (4, 3, 4, 3, 3)),
    (MapRows(["a", "b", "c"], ["c", "x", "a", "b"]), (3, 5), (5, 5)),
    (MapRows(["a", "b", "c"], ["c", "x", "a", "b"], new_rows="keep"), (3,), (5,)),
    (SliceOrPad(), (3, 5), (5, 4)),
    (SliceOrPad(fill=0.5), (3, 5), (5, 4)),
]
SAME: list[tuple[Adapter, tuple[int, ...]]] = [
    (ResizePosEmbed(), (1, 198, 6)),
    (ResizePosEmbed(1, (4, 4), (4, 4)), (1, 17, 6)),
    (ResizePosEmbed(0), (0, 6)),
    (ResizePatchEmbed(), (4, 3, 8, 8)),
    (ResizePatchEmbed(), (4,)),
    (ResizeRelPosBias(), (50, 4)),
    (AdaptInChannels("mean"), (4, 3, 3, 3)),
    (AdaptInChannels("repeat"), (4, 3, 3, 3)),
    (AdaptInChannels("slice"), (4, 0, 3, 3)),
    (InflateConv(), (4, 3, 2, 3, 3)),
    (InflateConv("center"), (4, 3, 3, 3)),
    (MapRows(list("abc"), list("abc")), (3, 5)),
    (MapRows(None, [0, 1, 2]), (3,)),
    (MapRows([], []), (0, 5)),
    (SliceOrPad(), (3, 5)),
    (SliceOrPad(), ()),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def odd_values(shape: tuple[int, ...]) -> torch.Tensor:
    value = torch.randn(shape)
    if value.numel() > 3:
        value.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    return value


@pytest.mark.parametrize(("adapter", "shape"), SAME)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_change_is_bit_exact(adapter, shape, dtype):
    value = odd_values(shape).to(dtype)
    adapter.check(shape, shape)
    assert same_bits(adapter.apply(value, torch.zeros(shape, dtype=dtype)), value)
    assert adapter.no_inverse(shape, shape) is None
    assert adapter.loaded(shape, shape) is None
    assert same_bits(adapter.undo(value, shape), value)


@pytest.mark.parametrize(("adapter", "source", "target"), CHANGES)
@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
def test_the_result_is_rounded_from_float64_to_the_entry_s_dtype(adapter, source, target, of, into):
    value = torch.randn(source).to(of)
    current = torch.randn(target).to(into)
    adapter.check(source, target)
    result = adapter.apply(value, current)
    exact = adapter.apply(value.double(), current.double())
    assert result.dtype == into
    assert result.device.type == "cpu"
    assert same_bits(result, exact.to(into))


@pytest.mark.parametrize(("adapter", "source", "target"), CHANGES)
def test_the_arguments_are_not_written_to(adapter, source, target):
    value, current = torch.randn(source), torch.randn(target, requires_grad=True)
    before = value.clone(), current.detach().clone()
    result = adapter.apply(value, current)
    assert not result.requires_grad
    result.fill_(7)
    assert torch.equal(current, before[1])
    assert torch.equal(value, before[0])


@pytest.mark.parametrize(("adapter", "source", "target"), CHANGES)
def test_the_same_bits_whatever_the_memory_layout(adapter, source, target):
    value, current = torch.randn(source, dtype=torch.float64), torch.zeros(target, dtype=torch.float64)
    strided = torch.randn((*source[:-1], source[-1] * 2), dtype=torch.float64)[..., ::2]
    strided.copy_(value)
    turned = value.permute(*reversed(range(value.ndim))).contiguous().permute(*reversed(range(value.ndim)))
    assert same_bits(adapter.apply(value, current), adapter.apply(strided, current))
    assert same_bits(adapter.apply(value, current), adapter.apply(turned, current))


@pytest.mark.parametrize(("adapter", "source", "target"), CHANGES)
def test_the_same_bits_whatever_the_number_of_threads(adapter, source, target):
    # Large enough for torch to share the work out, in a dimension that stays as it is.
    dim = next((d for d, (s, t) in enumerate(zip(source, target, strict=False)) if s == t and s > 1), None)
    if dim is not None:
        source, target = ((*x[:dim], x[dim] * 1024, *x[dim + 1 :]) for x in (source, target))
    value, current = torch.randn(source, dtype=torch.float64), torch.zeros(target, dtype=torch.float64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(adapter.apply(value, current))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize(("adapter", "source", "target"), CHANGES)
def test_the_entry_may_be_on_another_device_and_so_may_be_the_default_one(adapter, source, target):
    value, current = torch.randn(source), torch.zeros(target)
    want = adapter.apply(value, current)
    kept = "keep" in (getattr(adapter, "new_rows", 0), getattr(adapter, "fill", 0))
    with torch.device("meta"):
        adapter.check(source, target)
        assert same_bits(adapter.apply(value, current if kept else current.to("meta")), want)
        mask = adapter.loaded(source, target)
    assert mask is None or mask.device.type == "cpu"


@pytest.mark.parametrize(("adapter", "source", "target"), CHANGES)
def test_a_mask_broadcasts_to_the_entry_and_marks_what_does_not_depend_on_it(adapter, source, target):
    value = torch.randn(source)
    one, other = (adapter.apply(value, torch.full(target, fill)) for fill in (1.0, 2.0))
    mask = adapter.loaded(source, target)
    assert prod(torch.broadcast_shapes(target, () if mask is None else mask.shape)) == prod(target)
    loaded = torch.ones(target, dtype=torch.bool) if mask is None else mask.expand(target)
    assert torch.equal(one[loaded], other[loaded])


@pytest.mark.parametrize(("adapter", "source", "target"), CHANGES)
def test_what_has_an_inverse_comes_back_bit_for_bit(adapter, source, target):
    value = odd_values(source)
    if adapter.no_inverse(source, target) is None:
        assert same_bits(adapter.undo(adapter.apply(value, torch.zeros(target)), source).contiguous(), value)


def test_which_of_them_have_an_inverse():
    assert [type(a).__name__ for a, s, t in CHANGES if a.no_inverse(s, t) is None] == [
        "InflateConv",
        "MapRows",
        "MapRows",
    ]


@pytest.mark.parametrize("adapter", [a for a, *_ in CHANGES])
def test_adapters_are_values(adapter):
    again = pickle.loads(pickle.dumps(adapter))
    assert again == adapter
    assert hash(again) == hash(adapter)
    assert len(repr(adapter)) < 300


def refusal(adapter: Adapter, source: tuple[int, ...], target: tuple[int, ...]) -> str:
    try:
        adapter.check(source, target)
    except MappingError as error:
        return str(error)
    return ""


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_passes_the_check_can_be_applied(data):
    adapter, *shapes = data.draw(st.sampled_from([*CHANGES, (MapRows(None, {1: 0, 0: 0}, dim=-1), (3, 1), (3, 2))]))
    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 9, 16, 25, 30])
    source, target = (
        tuple(
            data.draw(sizes) if data.draw(st.integers(0, 5)) == 0 else n
            for n in shape[data.draw(st.integers(0, 9)) == 0 :]
        )
        for shape in shapes
    )
    if message := refusal(adapter, source, target):
        assert message.startswith(f"checkpoint {source}, model {target}: ")
        assert message.rpartition("\n  -> ")[2].startswith(("adapt={", "allow_mismatched=["))
        return
    value, current = torch.randn(source), torch.randn(target).bfloat16()
    result = adapter.apply(value, current)
    assert (result.shape, result.dtype) == (current.shape, current.dtype)
    mask = adapter.loaded(source, target)
    if mask is not None:
        assert torch.broadcast_shapes(mask.shape, target) == target
    if adapter.no_inverse(source, target) is None:
        exact = adapter.apply(value, current.float())
        assert same_bits(adapter.undo(exact, source).contiguous(), value)


def test_every_adapter_is_in_the_registry():
    assert {type(a) for a, *_ in CHANGES} == set(ADAPTERS)
