"""Frozen means frozen: parameters, statistics, mode; until released."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import warmstart
from warmstart import FrozenChangedError, MappingError
from warmstart.freezing import freeze_patterns


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.encoder2 = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder2(self.encoder(x)) * self.scale)


def train(model: nn.Module, steps: int = 10) -> None:
    """AdamW over all parameters with weight decay, and train() before each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


def test_field_note_33_frozen_tensors_do_not_move_under_weight_decay_and_stale_gradients():
    model = Net()
    model(torch.randn(16, 4)).sum().backward()
    frozen = warmstart.freeze(model, "encoder")
    assert all(p.grad is None for p in model.encoder.parameters())
    before = copy.deepcopy(model.encoder.state_dict())
    train(model)
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    frozen.check()


def test_field_note_11_a_frozen_subtree_is_held_in_eval_dropout_included():
    model = Net()
    frozen = warmstart.freeze(model, ["encoder"])
    assert frozen.held == ("encoder",)
    model.train()
    assert model.training
    assert model.head.training
    assert not any(module.training for module in model.encoder.modules())
    x = torch.randn(16, 4)
    assert torch.equal(model.encoder(x), model.encoder(x))


def test_es_5_and_field_note_32_patterns_name_paths_and_bare_parameters():
    model = Net()
    frozen = warmstart.freeze(model, ["encoder", "scale"])
    assert "encoder2.weight" not in frozen.names
    assert "scale" in frozen.names
    assert model.encoder2.weight.requires_grad
    with pytest.raises(MappingError, match=r"freeze='encodr' matches no model entry \(did you mean 'encoder'"):
        warmstart.freeze(Net(), "encodr")


def test_ti_5_one_norm_alone_is_held_with_its_statistics():
    model = Net()
    frozen = warmstart.freeze(model, "encoder.1")
    assert frozen.held == ("encoder.1",)
    train(model)
    frozen.check()
    assert model.encoder[0].training


def test_frozen_statistics_hold_their_module_although_its_parameters_train():
    model = Net()
    frozen = warmstart.freeze(model, ["encoder.1.running_mean", "encoder.1.running_var"])
    weight = model.encoder[1].weight.detach().clone()
    train(model)
    frozen.check()
    assert not torch.equal(model.encoder[1].weight, weight)
    assert "encoder.1.num_batches_tracked" in frozen.names


def test_freeze_true_freezes_exactly_what_was_loaded():
    model, donor = Net(), Net()
    report = warmstart.load(model, donor, include=["encoder"], freeze=True)
    assert set(report.frozen.names) == {f"encoder.{k}" for k in donor.encoder.state_dict()}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "scale", "encoder2.weight", "encoder2.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    train(model)
    report.frozen.check()


def test_a_change_is_named_in_full_and_in_a_sample():
    model = Net()
    frozen = warmstart.freeze(model, "encoder")
    with torch.no_grad():
        model.encoder[3].bias[2] += 1
    for sampled in (False, True):
        with pytest.raises(FrozenChangedError, match=r"encoder\.3\.bias +has other values") as caught:
            frozen.check(sampled=sampled)
        assert caught.value.tensors == ("encoder.3.bias",)


def test_a_replaced_parameter_is_found():
    model = Net()
    frozen = warmstart.freeze(model, "head")
    model.head.weight = nn.Parameter(model.head.weight + 1)
    with pytest.raises(FrozenChangedError, match=r"head\.weight"):
        frozen.check()


def test_release_ends_freeze_and_hold_and_joins_the_optimizer():
    model = Net()
    frozen = warmstart.freeze(model, "encoder")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    released = frozen.release("encoder.3", optimizer)
    assert released == ("encoder.3.weight", "encoder.3.bias")
    assert model.encoder[3].training
    assert not model.encoder[1].training
    assert frozen.held == ("encoder.0", "encoder.1")
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == {id(p) for p in model.encoder[3].parameters()}
    before = model.encoder[3].weight.detach().clone()
    model.train()
    model(torch.randn(16, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.encoder[3].weight, before)
    frozen.check()
    frozen.release("*")
    assert frozen.held == ()
    assert "train" not in model.encoder.__dict__
    with pytest.raises(MappingError, match="matches nothing that is frozen"):
        frozen.release("encoder")


def test_a_held_model_pickles_and_deep_copies_and_the_copy_is_held_too():
    model = Net()
    warmstart.freeze(model, "encoder")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.train()
        assert not twin.encoder[1].training
        assert twin.encoder.__dict__["train"].module is twin.encoder
        assert twin.head.training


def test_a_tied_tensor_is_frozen_under_all_its_names():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    report = warmstart.load(model, {"a.weight": torch.ones(2, 2)}, include=["a.weight", "b.weight"], freeze=True)
    assert report.frozen.names == ("a.weight", "b.weight")
    assert not model["b"].weight.requires_grad


def test_freezing_from_a_report():
    model = Net()
    report = warmstart.load(model, Net().head.state_dict(), into="head")
    frozen = warmstart.freeze(model, report)
    assert frozen.names == ("head.bias", "head.weight")


def test_a_replaced_module_is_found():
    model = Net()
    frozen = warmstart.freeze(model, "encoder")
    model.encoder = copy.deepcopy(model.encoder)
    with pytest.raises(FrozenChangedError, match="no longer part of the model"):
        frozen.check()


def test_every_module_of_a_frozen_subtree_is_held_by_itself():
    model = Net()
    frozen = warmstart.freeze(model, "encoder")
    for module in model.modules():
        module.train()
    assert not any(module.training for module in model.encoder.modules())
    model(torch.randn(8, 4))
    frozen.check()


def test_a_train_method_with_more_arguments_is_held_as_well():
    class Backbone(nn.Sequential):
        def train(self, mode: bool = True, deep: bool = True) -> nn.Module:
            return super().train(mode)

    model = nn.ModuleDict({"a": Backbone(nn.Linear(2, 2), nn.Dropout()), "b": nn.Linear(2, 2)})
    warmstart.freeze(model, "a")
    model["a"].train(True, deep=False)
    assert not model["a"].training


def test_release_gives_back_the_mode_that_was_asked_for_and_only_what_trained_before():
    model = Net()
    model.encoder[0].bias.requires_grad_(False)
    frozen = warmstart.freeze(model, "encoder")
    model.eval()
    frozen.release("encoder.1")
    assert not model.encoder[1].training
    model.train()
    frozen.release("encoder")
    assert model.encoder[3].training
    assert model.encoder[1].training
    assert not model.encoder[0].bias.requires_grad
    assert model.encoder[0].weight.requires_grad


def test_a_report_freezes_the_model_it_is_given():
    model = Net()
    report = warmstart.load(model, Net().head.state_dict(), into="head")
    twin = copy.deepcopy(model)
    frozen = warmstart.freeze(twin, report)
    assert not twin.head.weight.requires_grad
    assert model.head.weight.requires_grad
    frozen.check()
    model.half()
    warmstart.freeze(model, report).check()


def test_what_is_deferred_goes_into_the_optimizer_first_and_is_frozen_afterwards():
    model = Net()
    frozen = warmstart.freeze(model, ["encoder", "encoder2"])
    assert frozen.defer(["encoder2", "?none"]) == ("encoder2.weight", "encoder2.bias")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert {id(p) for p in model.encoder2.parameters()} <= {id(p) for p in optimizer.param_groups[0]["params"]}
    model(torch.randn(16, 4)).sum().backward()
    frozen.enforce()
    frozen.check()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder2.parameters())
    assert not model.encoder2.training  # its hold began at once
    frozen.release("encoder2", optimizer)
    assert len(optimizer.param_groups) == 1


def test_deferring_what_is_not_frozen_is_an_error():
    with pytest.raises(MappingError, match="unfreeze='head' matches nothing that is frozen"):
        warmstart.freeze(Net(), "encoder").defer("head")


def test_a_release_holds_nothing_where_modes_were_to_be_left_alone():
    model = Net()
    frozen = freeze_patterns(model, ["encoder", "encoder2"], held="train")
    frozen.release("encoder2")
    assert frozen.held == ()
    assert model.encoder.training


def test_field_note_11_statistics_that_run_on_because_modes_are_left_alone_are_told_so():
    model = Net()
    frozen = freeze_patterns(model, "encoder", held="train")
    model.train()(torch.randn(16, 4))
    with pytest.raises(FrozenChangedError, match=r'(?s)encoder\.1.*leave held="train" out'):
        frozen.check()
    held = warmstart.freeze(Net(), "encoder")
    with torch.no_grad():
        held.model.encoder[1].running_mean.add_(1)
    with pytest.raises(FrozenChangedError, match="something wrote to them") as caught:
        held.check()
    assert "held=" not in str(caught.value)


def test_what_fsdp2_keeps_gathered_trains_when_it_is_released_and_rests_when_it_is_frozen(tmp_path):
    """Each a root of its own, what has no backward is never let go of again."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, mesh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), init_device_mesh("cpu", (1,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        frozen = warmstart.freeze(model, "0")
        first = optimizer.param_groups[0]["params"][0]

        def moves() -> bool:
            before = first.full_tensor().clone()
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            return not torch.equal(first.full_tensor(), before)

        assert not moves()
        frozen.release("0")
        assert moves()
        with torch.no_grad():
            model(torch.randn(3, 4))  # as in a validation
        warmstart.freeze(model, "0")
        assert not moves()
    finally:
        dist.destroy_process_group()
