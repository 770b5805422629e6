"""Writing: in place, identity and ties kept, nothing written if anything refuses, values verified."""

from __future__ import annotations

import copy
import hashlib
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart import CheckpointError, MappingError, Pretrained, TimingError, VerificationError
from warmstart.checkpoints.base import Checkpoint, TensorInfo
from warmstart.tensors import same_bits


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, classes)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.out = nn.Linear(3, 6, bias=False)
        self.out.weight = self.embed.weight


def other(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of the model's shapes with other values."""
    return {k: torch.randn(v.shape) if v.is_floating_point() else v + 7 for k, v in model.state_dict().items()}


def test_the_three_ways_people_do_it_by_hand(tmp_path):
    """A .pth state dict, tensors made by hand, numpy arrays (.npz, and .npy of a pickled dict): one call each, by value."""
    state = other(Net())
    arrays = {k: v.numpy() for k, v in state.items()}
    torch.save(state, tmp_path / "a.pth")
    np.savez(tmp_path / "a.npz", **arrays)
    np.save(tmp_path / "a.npy", np.array(arrays, dtype=object), allow_pickle=True)
    save_file(state, tmp_path / "a.safetensors")
    for source in (
        tmp_path / "a.pth",
        state,
        tmp_path / "a.npz",
        tmp_path / "a.npy",
        arrays,
        tmp_path / "a.safetensors",
    ):
        model = Net()
        report = warmstart.load(model, source)
        assert all(same_bits(v, state[k]) for k, v in model.state_dict().items()), source
        assert report.coverage == 1
        assert report.verified == "full"


def test_a_module_and_an_opened_checkpoint_are_sources(tmp_path):
    donor = Net()
    for source in (donor, warmstart.open_checkpoint(donor.state_dict())):
        model = Net()
        warmstart.load(model, source)
        assert all(
            same_bits(a, b) for a, b in zip(model.state_dict().values(), donor.state_dict().values(), strict=True)
        )


def test_field_note_5_parameters_keep_their_identity_and_the_optimizer_trains_them():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: id(p) for name, p in model.named_parameters()}
    warmstart.load(model, other(model))
    assert before == {name: id(p) for name, p in model.named_parameters()}
    loaded = model.head.weight.detach().clone()
    model.head(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, loaded)


def test_requires_grad_is_changed_by_freeze_alone():
    model = Net()
    model.head.weight.requires_grad_(False)
    warmstart.load(model, other(model))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]


def test_a_load_draws_nothing_from_the_global_random_state():
    model, state = Net(), other(Net())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    warmstart.load(model, state, verify="sample", freeze=True)
    assert torch.equal(torch.rand(4), expected)


def test_the_caller_s_dict_is_not_changed():
    state = other(Net())
    twin = {k: v.clone() for k, v in state.items()}
    warmstart.load(Net(), state)
    assert list(state) == list(twin)
    assert all(same_bits(state[k], twin[k]) for k in twin)


@pytest.mark.parametrize("keys", [("embed.weight",), ("out.weight",), ("embed.weight", "out.weight")])
def test_field_note_14_ties_are_kept_whichever_key_the_file_has(keys):
    model, value = Tied(), torch.randn(6, 3)
    report = warmstart.load(model, dict.fromkeys(keys, value))
    assert model.out.weight is model.embed.weight
    assert same_bits(model.embed.weight.detach(), value)
    assert report.missing == ()
    assert set(report.mapping) == {"embed.weight", "out.weight"}
    assert report.coverage == 1


def test_x_15_a_tied_tensor_with_two_values_is_refused(fingerprint):
    model = Tied()
    before = fingerprint(model)
    state = {"embed.weight": torch.zeros(6, 3), "out.weight": torch.ones(6, 3)}
    with pytest.raises(MappingError, match=r"one tied tensor(.|\n)*exclude=\[\"out\.weight\"\]"):
        warmstart.load(model, state)
    assert fingerprint(model) == before
    warmstart.load(model, state, exclude=["out.weight"])
    assert torch.equal(model.embed.weight, torch.zeros(6, 3))


def test_a_source_that_shares_memory_with_the_model_is_read_before_it_is_overwritten():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second = (copy.deepcopy(layer.state_dict()) for layer in model)
    warmstart.load(model, model.state_dict(), rename={r"0": "1", r"1": "0"})
    assert same_bits(model[0].weight.detach(), second["weight"])
    assert same_bits(model[1].bias.detach(), first["bias"])


def test_x_17_overflow_in_a_cast_is_an_error_before_anything_is_written(fingerprint):
    model = nn.Linear(2, 2)
    before = fingerprint(model)
    state = {"weight": torch.full((2, 2), 1e300, dtype=torch.float64), "bias": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(MappingError, match=r"weight +float64 to float32: 4 values are beyond its range"):
        warmstart.load(model, state)
    assert fingerprint(model) == before
    warmstart.load(model, state, dtype="checkpoint")
    assert model.weight.dtype == torch.float64
    assert same_bits(model.weight.detach(), state["weight"])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_field_note_37_the_model_s_dtype_stays_and_the_cast_is_bit_exact(source, target):
    model, value = nn.Linear(5, 5, bias=False).to(target), torch.randn(5, 5).to(source)
    report = warmstart.load(model, {"weight": value})
    assert model.weight.dtype == target
    assert same_bits(model.weight.detach(), value.to(target))
    assert report.assignments[0].cast == (source, target)


def test_int_buffers_are_cast_only_if_every_value_fits(fingerprint):
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2, dtype=torch.int8))

    model = Counter()
    warmstart.load(model, {"count": torch.tensor([1, -5])})
    assert model.count.tolist() == [1, -5]
    before = fingerprint(model)
    with pytest.raises(MappingError, match="int64 to int8: 1 values do not fit"):
        warmstart.load(model, {"count": torch.tensor([1, 300])})
    assert fingerprint(model) == before


def test_bits_are_kept_nan_payloads_and_negative_zero_included():
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800000, 1], dtype=torch.int32)
    model = nn.Linear(4, 1, bias=False)
    report = warmstart.load(model, {"weight": bits.view(torch.float32).reshape(1, 4)})
    assert torch.equal(model.weight.detach().view(torch.int32).reshape(-1), bits)
    assert any("non-finite" in note for note in report.notes)


def test_expanded_buffers_and_zero_dim_and_empty_entries_load():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("expanded", torch.zeros(1, 3).expand(4, 3))
            self.scalar = nn.Parameter(torch.tensor(0.0))
            self.register_buffer("empty", torch.zeros(0, 5))

    state = {"expanded": torch.randn(4, 3), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 5)}
    model = Odd()
    warmstart.load(model, state)
    assert all(same_bits(v.detach(), state[k]) for k, v in model.state_dict().items())


def test_sha256_is_checked_before_anything_is_written(tmp_path, fingerprint):
    path, model = tmp_path / "a.pt", Net()
    torch.save(other(model), path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=f'sha256="{right}"'):
        warmstart.load(model, path, sha256="0" * 64)
    assert fingerprint(model) == before
    warmstart.load(model, path, sha256=right.upper())


def test_a_file_that_changes_between_plan_and_apply_is_refused(tmp_path, fingerprint):
    path, model = tmp_path / "a.safetensors", Net()
    save_file(other(model), path)
    plan, before = warmstart.plan(model, path), fingerprint(model)
    save_file(other(model), path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="written to after it was opened"):
        plan.apply()
    assert fingerprint(model) == before


def test_a_model_that_changes_between_plan_and_apply_is_refused():
    model = Net()
    plan = warmstart.plan(model, other(model))
    model.head.weight = nn.Parameter(torch.zeros(10, 4))
    with pytest.raises(TimingError, match=r"'head\.weight' is not the tensor that was planned for"):
        plan.apply()


def test_freezing_inside_ddp_is_refused(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(TimingError, match="load and freeze first, then wrap"):
            warmstart.load(model, other(Net()), freeze=True)
        report = warmstart.load(model, other(Net()))
        assert report.coverage == 1
    finally:
        dist.destroy_process_group()


class Faulty(Checkpoint):
    """A source whose third read fails, as a disk does."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        infos = {k: TensorInfo(tuple(v.shape), v.dtype) for k, v in state.items()}
        super().__init__(location="faulty", format="test", infos=infos, files=())
        self.state, self.reads, self.limit = state, 0, 10**9

    def _read(self, key, index):
        self.reads += 1
        if self.reads > self.limit:
            raise OSError(5, "Input/output error")
        return self.state[key]


def test_a_fault_while_writing_names_what_was_written():
    model = Net()
    source = Faulty(other(model))
    plan = warmstart.plan(model, source)
    source.limit = len(plan.assignments) + 2  # a source in memory is looked at once before writing
    with pytest.raises(CheckpointError, match=r"Input/output error(.|\n)*2 of 9 entries had been written") as caught:
        plan.apply()
    assert caught.value.written == ("backbone.0.weight", "backbone.0.bias")
    assert same_bits(model.backbone[0].weight.detach(), source.state["backbone.0.weight"])


@pytest.mark.parametrize("verify", ["full", "sample"])
def test_verification_finds_what_does_not_hold_its_value(verify):
    model = Net()
    report = warmstart.load(model, other(model), verify=verify)
    report.check(model, verify=verify)
    with torch.no_grad():
        model.head.weight[3, 2] += 1
    with pytest.raises(VerificationError, match=r"head\.weight +has other values") as caught:
        report.check(model, verify=verify)
    assert caught.value.tensors == ("head.weight",)


def test_verification_finds_a_broken_tie():
    model = Tied()
    report = warmstart.load(model, {"embed.weight": torch.randn(6, 3)})
    model.out.weight = nn.Parameter(model.embed.weight.detach().clone())
    with pytest.raises(VerificationError, match=r"out\.weight +is no longer tied to embed\.weight"):
        report.check(model)


def test_an_in_memory_source_may_change_or_train_after_the_load():
    donor = Net()
    model = Net()
    report = warmstart.load(model, donor)
    with torch.no_grad():
        donor.head.weight.zero_()
    report.check(model)
    model.to(torch.bfloat16)
    report.check(model)


def test_wrong_shape_is_never_broadcast(fingerprint):
    model = nn.Linear(4, 4)
    before = fingerprint(model)
    for shape in ((1, 4), (4, 1), (4,), (16,), (2, 4)):
        with pytest.raises(MappingError, match=r"checkpoint \(.*\), model \(4, 4\)"):
            warmstart.load(model, {"weight": torch.ones(shape), "bias": torch.ones(4)})
    assert fingerprint(model) == before


def test_field_note_47_several_sources_into_one_model(tmp_path):
    model = Net()
    backbone, head = other(model.backbone), other(model.head)
    torch.save(backbone, tmp_path / "b.pt")
    report = warmstart.load(
        model, [Pretrained(tmp_path / "b.pt", into="backbone", freeze=True), Pretrained(head, into="head")]
    )
    assert same_bits(model.head.weight.detach(), head["weight"])
    assert same_bits(model.backbone[0].weight.detach(), backbone["0.weight"])
    assert report.frozen is not None
    assert all(name.startswith("backbone.") for name in report.frozen.names)


def test_a_submodule_replaced_after_planning_is_refused(fingerprint):
    model = Net()
    plan = warmstart.plan(model, other(model))
    model.head = nn.Linear(4, 10)
    before = fingerprint(model)
    with pytest.raises(TimingError, match=r"call warmstart\.plan"):
        plan.apply()
    assert fingerprint(model) == before


def shared_memory() -> nn.Module:
    model, values = nn.Module(), torch.zeros(3, 3)
    model.a, model.b = nn.Parameter(values), nn.Parameter(values)
    return model


def test_entries_that_are_one_memory_stay_so_when_the_dtype_is_the_checkpoint_s():
    model, value = shared_memory(), torch.randn(3, 3).to(torch.bfloat16)
    report = warmstart.load(model, {"a": value}, dtype="checkpoint")
    assert same_bits(model.a.detach(), value)
    assert model.b.data_ptr() == model.a.data_ptr()
    report.check(model)
    model.b = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(VerificationError, match=r"b +has other values"):
        report.check(model)


def test_entries_that_share_a_part_of_their_memory_are_refused_and_columns_of_one_matrix_are_not(fingerprint):
    model, flat = nn.Module(), torch.zeros(6)
    model.a, model.b = nn.Parameter(flat[:4]), nn.Parameter(flat[2:])
    before = fingerprint(model)
    with pytest.raises(MappingError, match=r"overlap others without being tied(.|\n)*exclude="):
        warmstart.load(model, {"a": torch.ones(4), "b": torch.ones(4)})
    assert fingerprint(model) == before
    fused = torch.zeros(2, 4)
    model.a, model.b = nn.Parameter(fused[:, :2]), nn.Parameter(fused[:, 2:])
    warmstart.load(model, {"a": torch.ones(2, 2), "b": torch.full((2, 2), 2.0)})
    assert fused.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32])
def test_dtypes_without_kernels_of_their_own(dtype):
    model, value = nn.Module(), torch.tensor([1.0, 2.0, -0.5, 4.0]).to(dtype)
    model.register_buffer("a", torch.zeros(4).to(dtype))
    report = warmstart.load(model, {"a": value})
    assert same_bits(model.a, value)
    report.check(model)


def test_a_value_that_float8_cannot_hold_is_refused(fingerprint):
    model = nn.Module()
    model.register_buffer("a", torch.zeros(2).to(torch.float8_e4m3fn))
    before = fingerprint(model)
    with pytest.raises(MappingError, match="1 values are beyond its range"):
        warmstart.load(model, {"a": torch.tensor([1.0, 1e9])})
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (torch.tensor([-1]), torch.uint64),
        (torch.tensor([2**63 + 5], dtype=torch.uint64), torch.int64),
        (torch.tensor([-1]), torch.uint8),
        (torch.tensor([256]), torch.uint8),
    ],
)
def test_integers_that_would_wrap_are_refused(value, target):
    model = nn.Module()
    model.register_buffer("a", torch.zeros(1, dtype=target))
    with pytest.raises(MappingError, match="1 values do not fit"):
        warmstart.load(model, {"a": value})
    warmstart.load(model, {"a": torch.tensor([7]).to(value.dtype)})
    assert model.a.tolist() == [7]


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(("written", "later"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_casts_of_the_whole_model_raise_no_false_alarm_nan_included(tmp_path, memory, written, later):
    model = nn.Linear(3, 3).to(written)
    state = {
        "weight": torch.tensor([[1.1, float("nan"), 3.0]] * 3, dtype=written),
        "bias": torch.randn(3, dtype=written),
    }
    torch.save(state, tmp_path / "a.pt")
    report = warmstart.load(model, state if memory else tmp_path / "a.pt")
    model.to(later)
    report.check(model)
    with torch.no_grad():
        model.bias[1] += 1
    with pytest.raises(VerificationError, match="bias"):
        report.check(model)


def test_surgery_that_keeps_the_parameters_is_healthy():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    report = warmstart.load(model, other(model), freeze=["0"])
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    report.check(model)
    report.frozen.check()


def test_a_source_that_is_gone_or_changed_cannot_be_compared_with(tmp_path):
    path, model = tmp_path / "a.pt", Net()
    torch.save(other(model), path)
    report = warmstart.load(model, path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.pt is gone; the model's values cannot be compared"):
        report.check(model)


def test_numpy_views_of_the_model_s_own_memory_are_read_before_they_are_overwritten():
    flat = np.arange(8, dtype=np.float32)
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.from_numpy(flat[i : i + 4])) for i in (0, 4))
    warmstart.load(model, {"a": flat[4:], "b": flat[:4]})
    assert flat.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize("verify", ["ful", True, None])
def test_an_unknown_verify_is_refused_before_anything_is_written(fingerprint, verify):
    model = Net()
    before = fingerprint(model)
    with pytest.raises(MappingError, match="one of 'full', 'sample', 'off'"):
        warmstart.load(model, other(model), verify=verify)
    assert fingerprint(model) == before


def test_the_model_comes_first():
    with pytest.raises(TypeError, match="the model comes first"):
        warmstart.load("weights.pt", Net())


def test_min_coverage_takes_any_number():
    assert warmstart.load(Net(), other(Net()), min_coverage=np.float32(0.5)).coverage == 1
    with pytest.raises(TypeError, match="min_coverage"):
        warmstart.load(Net(), other(Net()), min_coverage="half")


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda module: torch.jit.trace(module, torch.zeros(2, 3))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_module_loads_like_any_other(tmp_path, compiled):
    state = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).state_dict()
    torch.save(state, tmp_path / "w.pt")
    model = compiled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval())
    report = warmstart.load(model, tmp_path / "w.pt", freeze=["0"])
    report.check(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]
