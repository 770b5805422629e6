"""Values that do not survive the way: casts, adapters, functions and constants, refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart import AdaptInChannels, Apply, CheckpointError, Conversion, MappingError, MapRows, SliceOrPad


def entry(tensor: torch.Tensor, name: str = "x") -> nn.Module:
    model = nn.Module()
    if tensor.is_floating_point():
        model.register_parameter(name, nn.Parameter(tensor))
    else:
        model.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize(
    ("target", "value", "adapter"),
    [
        (torch.zeros(4, dtype=torch.int32), torch.tensor([2**33 + 5, 1, 2]), SliceOrPad(0)),
        (torch.zeros(4, dtype=torch.float16), torch.tensor([-torch.inf, 1e6, 2.0]), SliceOrPad(0)),
        (torch.zeros(1, 1, 1, 1, dtype=torch.float16), torch.full((1, 3, 1, 1), 4e4), AdaptInChannels()),
        (torch.zeros(1, 1, 1, 1), torch.full((1, 3, 1, 1), 2e38), AdaptInChannels()),
    ],
)
def test_x_17_what_an_adapter_makes_is_looked_at_before_it_is_written(fingerprint, target, value, adapter):
    model = entry(target)
    before = fingerprint(model)
    with pytest.raises(MappingError, match=r"^the plan for Module cannot be carried out.*\n\ndtype:"):
        warmstart.load(model, {"x": value}, adapt={"x": adapter})
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float16, SliceOrPad(1e6)),
        (torch.float16, MapRows([0], [0, 1, 2], new_rows=1e6)),
        (torch.uint8, SliceOrPad(300.0)),
        (torch.int64, SliceOrPad(1.7)),
        (torch.uint8, SliceOrPad(-1.0)),
        (torch.bool, SliceOrPad(2.0)),
    ],
)
def test_a_constant_that_the_entry_cannot_hold_is_an_error_of_the_plan(dtype, adapter):
    plan = warmstart.plan(entry(torch.zeros(3, dtype=dtype)), {"x": torch.zeros(1, dtype=dtype)}, adapt={"x": adapter})
    assert [p.kind for p in plan.errors if p.kind == "adapter"] == ["adapter"]


@pytest.mark.parametrize("adapter", [SliceOrPad(), MapRows(range(4), range(6), new_rows="keep")])
def test_kept_elements_of_a_half_precision_model_on_meta(adapter):
    with torch.device("meta"):
        model = nn.Embedding(6, 4, dtype=torch.float16)
    value = torch.randn(4, 4)
    warmstart.load(model, {"weight": value}, adapt={"weight": adapter})
    assert torch.equal(model.weight[:4], value.half())
    assert model.weight[4:].abs().max() > 0  # its own initialisation


def refuses(tensors):
    if not tensors[0].is_meta and tensors[0].any():
        raise ValueError("no")
    return tensors


def test_a_function_that_refuses_values_is_asked_before_anything_is_written():
    with torch.device("meta"):
        model = nn.Linear(2, 2, bias=False)
    with pytest.raises(MappingError, match="ValueError: no"):
        warmstart.load(model, {"w": torch.ones(2, 2)}, convert=[Conversion("w", "weight", [Apply(refuses)])])
    assert model.weight.is_meta


class Breaks(warmstart.Checkpoint):
    def __init__(self, state):
        infos = {k: warmstart.TensorInfo(tuple(t.shape), t.dtype) for k, t in state.items()}
        super().__init__(location="breaks", format="none", infos=infos)
        self.state, self.left = state, len(infos)

    def _read(self, key, index):
        self.left -= 1  # a source in memory is looked at once before writing
        if self.left < -1:
            raise OSError(5, "Input/output error")
        return self.state[key]


def test_a_fault_while_writing_leaves_a_report_that_says_failed():
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="1 of 2 entries had been written") as caught:
        warmstart.load(model, Breaks({"weight": torch.ones(2, 2), "bias": torch.ones(2)}))
    assert caught.value.written == ("weight",)
    assert caught.value.report.status == "failed"
    assert "FAILED, do not train" in str(caught.value.report)


def test_a_fault_after_a_meta_model_got_memory_is_no_untouched_model():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    source = Breaks({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    source.left -= 1
    with pytest.raises(CheckpointError, match="0 of 2 entries had been written") as caught:
        warmstart.load(model, source)
    assert caught.value.report.status == "failed"
