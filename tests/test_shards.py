"""What of a tensor a process holds: regions against torch's own sharding, and that plain tensors cost nothing."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from warmstart.errors import MappingError
from warmstart.shards import Box, Run, _split, full_shape, is_sharded, local_of, shard_of


def spans_of(size, placements, mesh, coordinate):
    spans = ((0, size),)
    for placement, parts, part in zip(placements, mesh, coordinate, strict=True):
        if not isinstance(placement, Replicate):
            spans = _split(spans, getattr(placement, "split_factor", 1), parts, part)
    return spans


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 8, 13])
@pytest.mark.parametrize(
    ("placements", "mesh"),
    [
        ((Shard(0),), (2,)),
        ((Shard(0),), (5,)),
        ((Shard(0), Shard(0)), (2, 3)),
        ((_StridedShard(0, split_factor=2), Shard(0)), (2, 2)),
        ((_StridedShard(0, split_factor=4), Shard(0)), (3, 4)),
        ((Replicate(), Shard(0)), (2, 2)),
    ],
)
def test_positions_are_those_of_torch(size, placements, mesh):
    """field_note_6: uneven and empty shards, and strided ones of two dimensions."""
    whole = torch.arange(size)
    seen = []
    for coordinate in itertools.product(*map(range, mesh)):
        taken = Box((spans_of(size, placements, mesh, coordinate),)).take(whole)
        shape, offset = _compute_local_shape_and_global_offset((size,), mesh, list(coordinate), placements)
        assert tuple(taken.shape) == shape
        assert not taken.numel() or int(taken[0]) == offset[0]
        expected = whole
        for placement, parts, part in zip(placements, mesh, coordinate, strict=True):
            if not isinstance(placement, Replicate):
                expected = placement._split_tensor(expected, parts, with_padding=False)[0][part]
        assert torch.equal(taken, expected)
        seen += taken.tolist()
    copies = math.prod(n for p, n in zip(placements, mesh, strict=True) if isinstance(p, Replicate))
    assert sorted(seen) == sorted(list(range(size)) * copies)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 1, 5), (2, 3, 4)])
def test_a_region_is_a_run_exactly_where_nothing_lies_between_its_elements(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    spans = [
        [((a, b),) for a in range(n) for b in range(a + 1, n + 1)] + [((0, 1), (n - 1, n))] * (n > 2) for n in shape
    ]
    for each in itertools.product(*spans):
        taken = Box(each).take(whole).flatten().tolist()
        first = taken[0]
        together = taken == list(range(first, first + len(taken))) and all(len(dim) == 1 for dim in each)
        assert Box(each).run(shape) == ((first, first + len(taken)) if together else None)
    assert Run(shape, 1, 5).run(shape) == (1, 5)


def test_a_box_reads_one_slice_for_each_product_of_spans():
    whole = torch.arange(60).reshape(6, 10)
    box = Box((((0, 2), (4, 5)), ((1, 3), (6, 9))))
    asked = []

    def read(index):
        asked.append(index)
        return whole[index]

    assert torch.equal(box.read(read), whole[[0, 1, 4]][:, [1, 2, 6, 7, 8]])
    assert torch.equal(box.take(whole), whole[[0, 1, 4]][:, [1, 2, 6, 7, 8]])
    assert sum(whole[index].numel() for index in asked) == 15


@pytest.mark.parametrize("shape", [(), (7,), (1, 24), (5, 3), (2, 3, 4), (1, 1, 9), (0, 3), (3, 0)])
def test_a_run_reads_no_more_than_the_rows_it_meets(shape):
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        run, read = Run(shape, start, stop), []
        part = run.read(lambda index, read=read: read.append(whole[index]) or read[-1])
        assert torch.equal(part, whole.reshape(-1)[start:stop])
        assert torch.equal(run.take(whole), part)
        longest = next((math.prod(shape[i + 1 :]) for i, n in enumerate(shape) if n > 1), 1)
        assert read[0].numel() <= stop - start + 2 * longest


def test_a_plain_tensor_is_its_own_shard():
    tensor = torch.nn.Parameter(torch.rand(2, 3))
    assert shard_of(tensor).local is tensor is local_of(tensor)
    assert shard_of(tensor).region is None
    assert full_shape(tensor) == (2, 3)
    assert not is_sharded(tensor)


def partition(monkeypatch, rank, **more):
    """A parameter as DeepSpeed leaves it, of shape (3, 5) over 4 ranks; real ones are in distributed/."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    parameter = torch.nn.Parameter(torch.empty(0))
    flat = torch.arange(16.0)[4 * rank : 4 * rank + 4].clone()
    flat.ds_numel, flat.status = 4, SimpleNamespace(name="AVAILABLE")
    attributes = {
        "ds_id": 0,
        "ds_shape": torch.Size((3, 5)),
        "ds_numel": 15,
        "ds_tensor": flat,
        "ds_process_group": None,
    }
    for name, value in (attributes | more).items():
        setattr(parameter, name, value)
    return parameter


def test_a_zero3_parameter_is_never_of_size_zero(monkeypatch):
    """field_note_7."""
    whole = torch.arange(15.0).reshape(3, 5)
    for rank in range(4):
        parameter = partition(monkeypatch, rank)
        shard = shard_of(parameter)
        assert full_shape(parameter) == shard.shape == (3, 5)
        assert torch.equal(shard.local, shard.region.take(whole))
        shard.local.fill_(9)
        assert (parameter.ds_tensor[: len(shard.local)] == 9).all()
    assert parameter.ds_tensor.tolist() == [9, 9, 9, 15]  # the padding stays


def test_partitions_that_cannot_be_written_are_refused(monkeypatch):
    secondary = partition(monkeypatch, 0, ds_secondary_tensor=torch.empty(2))
    with pytest.raises(MappingError, match="zero_hpz_partition_size"):
        shard_of(secondary)
    offloaded = partition(monkeypatch, 0)
    offloaded.ds_tensor.status.name = "NOT_AVAILABLE"
    with pytest.raises(MappingError, match="NVMe"):
        shard_of(offloaded)
    quantised = partition(monkeypatch, 0)
    quantised.ds_tensor.ds_quant_scale = torch.ones(1)
    with pytest.raises(MappingError, match="quantised"):
        shard_of(quantised)


def test_plain_models_import_no_engine():
    code = (
        "import sys, torch, warmstart\n"
        "warmstart.load(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).state_dict())\n"
        "print(sorted(m for m in sys.modules if m in ('torch.distributed.tensor', 'torch.distributed.fsdp', 'deepspeed')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
