from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from warmstart import MappingError
from warmstart.mapping.model.targets import Targets


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.absent = None
        self.register_parameter("no_bias", None)
        self.register_buffer("position_ids", torch.arange(5), persistent=False)
        self.register_buffer("table", torch.zeros(2))

    def get_extra_state(self):
        return {"step": 1}

    def set_extra_state(self, state):
        pass


def test_entries_are_the_parameters_and_persistent_buffers_of_the_state_dict():
    model = Net()
    targets = Targets.of(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    assert set(targets.entries) == set(state)
    for name, target in targets.entries.items():
        assert target.tensor.data_ptr() == state[name].data_ptr()
        assert (target.shape, target.dtype) == (tuple(state[name].shape), state[name].dtype)
        assert getattr(target.owner, target.leaf) is target.tensor
        assert target.kind == ("buffer" if name in dict(model.named_buffers()) else "parameter")
        assert targets.spellings(name) == (name,)
    assert targets.transient == {"position_ids"}
    assert targets.extra_state == {"_extra_state"}
    assert targets.modules["encoder.1"] is model.encoder[1]
    assert targets.modules[""] is model
    assert targets.groups == {}
    assert targets.clean_segments() == {
        "encoder", "0", "1", "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "head", "scale",
        "table", "position_ids", "_extra_state"}  # fmt: skip


def test_ac_5_scanning_leaves_non_persistent_buffers_as_they_were():
    model = Net()
    before = set(model._non_persistent_buffers_set)
    Targets.of(model)
    assert model._non_persistent_buffers_set == before == {"position_ids"}


def test_mm_5_entries_of_a_tree_whose_every_child_is_wrapped_have_the_plain_names():
    plain, wrapped = Net(), Net()
    wrapped.encoder[0] = nn.DataParallel(wrapped.encoder[0])
    wrapped.encoder = nn.DataParallel(wrapped.encoder)
    wrapped.head = nn.DataParallel(nn.DataParallel(wrapped.head))
    targets = Targets.of(nn.DataParallel(wrapped))
    assert {t.clean for t in targets.entries.values()} == set(Targets.of(plain).entries)
    assert targets.entries["module.encoder.module.0.module.weight"].clean == "encoder.0.weight"
    assert targets.spellings("module.head.module.module.bias") == ("module.head.module.module.bias", "head.bias")
    assert targets.modules["encoder"] is wrapped.encoder
    assert targets.modules["module.encoder"] is wrapped.encoder
    assert targets.modules["module.encoder.module"] is wrapped.encoder.module
    assert targets.wrapped == {"DataParallel"}


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (nn.DataParallel, "module.{}"),
        (AveragedModel, "module.{}"),
        (lambda m: torch.compile(m, backend="eager"), "_orig_mod.{}"),
        (checkpoint_wrapper, "_checkpoint_wrapped_module.{}"),
        (lambda m: AveragedModel(nn.DataParallel(m)), "module.module.{}"),
        (lambda m: torch.compile(checkpoint_wrapper(nn.DataParallel(m)), backend="eager"),
         "_orig_mod._checkpoint_wrapped_module.module.{}"),
    ],
)  # fmt: skip
def test_field_note_2_real_wrappers_are_seen_through(wrap, name):
    targets = Targets.of(wrap(nn.Linear(2, 2)))
    assert {n: t.clean for n, t in targets.entries.items()} == {
        name.format("weight"): "weight", name.format("bias"): "bias"}  # fmt: skip


def test_field_note_2_real_children_called_as_wrappers_do_are_real():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.submodule = nn.Linear(2, 2)
    model.base_module = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})
    assert {t.clean for t in Targets.of(model).entries.values()} == set(model.state_dict())
    wrapped = Targets.of(nn.DataParallel(model))
    assert {t.clean for t in wrapped.entries.values()} == set(model.state_dict())
    assert wrapped.entries["module.module.weight"].clean == "module.weight"


def test_what_a_wrapper_holds_itself_is_no_entry():
    targets = Targets.of(nn.ModuleDict({"teacher": AveragedModel(nn.Linear(2, 2))}))
    assert sorted(targets.entries) == ["teacher.module.bias", "teacher.module.weight"]
    assert targets.wrapper_own == {"teacher.n_averaged": "teacher.n_averaged"}


def tied() -> nn.Module:
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "proj": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["emb"].weight
    return model


def test_ac_4_ties_are_found_by_identity_and_the_first_name_is_the_owner():
    targets = Targets.of(tied())
    assert targets.groups == {"emb.weight": ["emb.weight", "head.weight"]}
    assert targets.entries["head.weight"].alias_of == "emb.weight"
    assert targets.entries["head.weight"].canonical == targets.entries["emb.weight"].canonical == "emb.weight"


def test_ac_4_one_module_twice_is_a_tie_of_each_of_its_tensors():
    linear = nn.Linear(2, 2)
    assert Targets.of(nn.Sequential(linear, linear)).groups == {
        "0.weight": ["0.weight", "1.weight"], "0.bias": ["0.bias", "1.bias"]}  # fmt: skip


def test_ac_4_two_groups_across_blocks_keep_apart():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    blocks = nn.ModuleDict({name: nn.ModuleDict({"x": a, "y": b}) for name in ("one", "two", "three")})
    assert Targets.of(blocks).groups == {
        "one.x.weight": ["one.x.weight", "two.x.weight", "three.x.weight"],
        "one.y.weight": ["one.y.weight", "two.y.weight", "three.y.weight"],
    }


def test_equal_values_slices_and_views_of_other_shapes_are_no_ties():
    model = nn.Module()
    base = torch.zeros(4, 4)
    model.a, model.b = nn.Parameter(base), nn.Parameter(torch.zeros(4, 4))
    model.register_buffer("rows", base[:2])
    model.register_buffer("turned", base.t())
    model.register_buffer("flat", base.view(16))
    assert Targets.of(model).groups == {}
    model.register_buffer("whole", base)
    assert Targets.of(model).groups == {"a": ["a", "whole"]}


def test_empty_tensors_are_not_tied_to_each_other():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(0, 3))
    assert Targets.of(model).groups == {}


def test_a_module_that_holds_itself_ends():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["a"].up = model
    assert sorted(Targets.of(model).entries) == ["a.bias", "a.weight"]


def test_deep_trees_need_no_recursion():
    import torch.distributed.fsdp  # once it is there, every model is searched for its modules

    model = inner = nn.Module()
    for _ in range(3000):
        inner.m = nn.Module()
        inner = inner.m
    inner.w = nn.Parameter(torch.zeros(1))
    assert list(Targets.of(model).entries) == [".".join(["m"] * 3000 + ["w"])]


def test_two_entries_of_one_name_without_wrappers_are_an_error_that_names_both():
    model = nn.DataParallel(nn.Linear(2, 2))
    model.extra = nn.ModuleDict({"x": nn.Linear(2, 2)})
    model.module.extra = nn.ModuleDict({"x": nn.Linear(2, 2)})
    with pytest.raises(MappingError, match=r"'module\.extra\.x\.weight' and 'extra\.x\.weight' are both 'extra\.x\.weight' "
                       r"without their wrappers; load into the module inside"):  # fmt: skip
        Targets.of(model)


def test_lazy_entries_have_no_shape_yet():
    targets = Targets.of(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    assert [name for name, t in targets.entries.items() if t.lazy] == ["1.weight", "1.bias"]
    assert targets.entries["1.weight"].shape == ()
    assert targets.entries["1.weight"].numel == 0
