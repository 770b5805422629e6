from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits


def test_a_state_dict_is_not_copied_and_reads_without_gradient() -> None:
    weights = {"w": torch.ones(2, 3, requires_grad=True), "b": torch.zeros(())}
    checkpoint = open_checkpoint(weights)
    assert checkpoint.location == "a state dict in memory"
    assert checkpoint.files == ()
    assert checkpoint.keys() == ("w", "b")
    tensor = checkpoint.read("w")
    assert tensor.data_ptr() == weights["w"].data_ptr()
    assert not tensor.requires_grad
    assert torch.equal(checkpoint.read("w", (0, slice(1, 3))), torch.ones(2))
    assert checkpoint.header_digest() == open_checkpoint({k: v.clone() for k, v in weights.items()}).header_digest()


def test_a_module_gives_its_persistent_state_and_versions() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("cache", torch.zeros(3), persistent=False)
    checkpoint = open_checkpoint(module)
    assert set(checkpoint.keys()) == set(module.state_dict())
    assert checkpoint.versions["1"] == {"version": 2}
    for name, tensor in module.state_dict().items():
        assert same_bits(checkpoint.read(name), tensor)
    assert module[0].weight.requires_grad


def test_numpy_arrays_of_every_layout() -> None:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    readonly = base.copy()
    readonly.flags.writeable = False
    record = np.zeros(3, dtype=[("a", "i1"), ("b", "f4")])
    source = {
        "plain": base,
        "reversed": base[::-1, :, ::-1],
        "fortran": np.asfortranarray(base),
        "big": base.astype(">f4"),
        "readonly": readonly,
        "strided": base[:, ::2],
        "field": record["b"],
        "scalar": np.float64(3),
        "empty": np.zeros((0, 2), dtype=np.int8),
    }
    checkpoint = open_checkpoint(source)
    for name, value in source.items():
        expected = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        assert checkpoint.info(name).shape == value.shape
        assert same_bits(checkpoint.read(name), expected)
    assert same_bits(checkpoint.read("reversed", 1), torch.from_numpy(base[::-1, :, ::-1][1].copy()))
    assert same_bits(checkpoint.read("big", (0, 0, 1)), torch.tensor(1.0))
    assert checkpoint.read("plain").data_ptr() == base.ctypes.data


def test_nested_mappings_are_spelled_with_dots() -> None:
    source = OrderedDict(encoder={"w": torch.ones(2)}, decoder={"layers": [torch.zeros(1), {"w": torch.zeros(3)}]})
    assert open_checkpoint(source).keys() == ("encoder.w", "decoder.layers.0", "decoder.layers.1.w")


def test_several_trees_in_memory_need_a_choice() -> None:
    source = {"model": {"w": torch.ones(2)}, "model_ema": {"w": torch.zeros(2)}}
    with pytest.raises(CheckpointError, match='checkpoint_key="model_ema"'):
        open_checkpoint(source)
    checkpoint = open_checkpoint(source, checkpoint_key="model_ema")
    assert checkpoint.checkpoint_key == "model_ema"
    assert torch.equal(checkpoint.read("w"), torch.zeros(2))


def test_what_is_no_tensor_is_left_out_with_a_note() -> None:
    checkpoint = open_checkpoint({"w": torch.ones(1), "epoch": 3, "name": "x", "labels": np.array(["a"])})
    assert checkpoint.keys() == ("w",)
    assert checkpoint.notes == (
        "2 entries are not tensors and were left out: 'epoch', 'name'",
        "strings or dates were left out: 'labels'",
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "holds no weights; it is empty"),
        ({"epoch": 3}, "holds no weights; it holds 'epoch'"),
        ({"labels": np.array(["a"])}, "holds no numeric tensors, only 'labels'"),
        ({"w": torch.zeros(2, device="meta")}, "'w' is on the meta device and has no data"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is a torch.sparse_coo or nested tensor"),
        ({"w": np.zeros(2, dtype="V2")}, "'w' has dtype |V2: numpy spells bfloat16"),
        ({"w": np.zeros(2, dtype=np.longdouble)}, "torch has no such dtype"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "two keys are both spelled '1'"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "two keys are both spelled 'a.b'"),
        ({(1, 2): torch.ones(1)}, "a tensor lies under a key of type tuple"),
        (nn.Linear(1, 1, device="meta"), "'weight' is on the meta device"),
        (nn.ReLU(), "holds no weights"),
    ],
)
def test_sources_that_cannot_be_taken(source: object, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_cycle_ends_and_a_structure_shared_without_end_is_refused() -> None:
    cycle: dict[str, object] = {"w": torch.ones(1)}
    cycle["again"] = cycle
    assert open_checkpoint(cycle).keys() == ("w",)

    shared: dict[str, object] = {"w": torch.ones(1)}
    for _ in range(60):
        shared = {"a": shared, "b": shared}
    with pytest.raises(CheckpointError, match="shared over and over"):
        open_checkpoint(shared)

    deep: dict[str, object] = {"w": torch.ones(1)}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(CheckpointError, match="nested deeper than 64 levels"):
        open_checkpoint(deep)
