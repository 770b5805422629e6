"""Names on real modules and by value: wrappers on either side, prefixes either way, and models left as they were."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import warmstart
from warmstart import MappingError

WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint": checkpoint_wrapper,
}
SEGMENTS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(OrderedDict(conv=nn.Conv1d(2, 3, 1), norm=nn.BatchNorm1d(3)))
        self.head = nn.Linear(3, 2)


def filled(model: nn.Module) -> nn.Module:
    """Every element of every entry its own value."""
    start = 1
    for tensor in model.state_dict().values():
        tensor.copy_(torch.arange(start, start + tensor.numel()).view(tensor.shape))
        start += tensor.numel()
    return model


def wrapped(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        module = WRAPPERS[name](module)
    return module


def plain_values(model: nn.Module) -> list[torch.Tensor]:
    """The values of parameters and buffers, but for an averaged model's own counter."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor.detach().clone() for name, tensor in named if not name.endswith("n_averaged")]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(plain_values(model), plain_values(other), strict=True):
        assert torch.equal(mine, theirs)


# ---- wrappers in every order and depth, by value ----


@pytest.mark.parametrize("names", list(itertools.permutations(WRAPPERS)), ids=" ".join)
@pytest.mark.parametrize("place", ["whole", "encoder", "encoder.conv"])
def test_field_note_2_four_real_wrappers_in_every_order_take_a_plain_file_and_give_one(names, place):
    def net() -> nn.Module:
        model = Net()
        if place == "encoder":
            model.encoder = wrapped(model.encoder, names)
        elif place == "encoder.conv":
            model.encoder.conv = wrapped(model.encoder.conv, names)
        return wrapped(model, names) if place == "whole" else model

    source = filled(Net())
    model = net()
    report = warmstart.load(model, source.state_dict())
    assert (report.coverage, report.missing, report.unexpected) == (1, (), ())
    assert_same(model, source)

    fresh = Net()
    counter = [name for name in model.state_dict() if name.endswith("n_averaged")]
    back = warmstart.load(fresh, model.state_dict(), allow_unexpected="*n_averaged")
    assert (back.coverage, list(back.unexpected)) == (1, counter)
    assert_same(fresh, source)

    twin = net()
    warmstart.load(twin, model.state_dict(), allow_unexpected="?*n_averaged")  # its own spelling
    assert_same(twin, source)


@pytest.mark.parametrize("order", list(itertools.permutations(SEGMENTS)), ids=" ".join)
@pytest.mark.parametrize("averaged", [False, True])
def test_x_5_segments_in_every_order_and_place_fit_plain_and_wrapped_models_alike(order, averaged):
    source = filled(Net())
    a, b, c, d = order
    keys = {}
    for number, (name, tensor) in enumerate(source.state_dict().items()):
        path, _, leaf = name.rpartition(".")
        keys[
            [f"{a}.{b}.{path}.{c}.{d}.{leaf}", f"{path}.{a}.{b}.{c}.{d}.{leaf}", f"{a}.{b}.{c}.{d}.{name}", name][
                number % 4
            ]
        ] = tensor
    model = AveragedModel(Net()) if averaged else Net()
    plan = warmstart.plan(model, keys)
    assert (plan.errors, plan.prefix) == ((), None)
    assert set(plan.mapping.values()) == {(key,) for key in keys}
    plan.apply()
    assert_same(model, source)


def test_field_note_2_compiled_models_and_plain_files_without_a_compilation():
    source = filled(Net())
    compiled = torch.compile(Net(), backend="eager")
    assert type(compiled).__name__ == "OptimizedModule"
    torch._dynamo.utils.counters.clear()
    warmstart.load(compiled, source.state_dict())
    assert_same(compiled, source)
    plain = Net()
    report = warmstart.load(plain, compiled)
    assert report.mapping["encoder.conv.weight"] == ("_orig_mod.encoder.conv.weight",)
    assert_same(plain, source)
    assert not torch._dynamo.utils.counters["frames"]


def test_field_note_2_a_compiled_child_in_the_middle_of_the_tree():
    source, model = filled(Net()), Net()
    model.encoder = torch.compile(model.encoder, backend="eager")
    report = warmstart.load(model, source.state_dict(), into="encoder", freeze="encoder.norm")
    assert report.mapping["encoder._orig_mod.conv.bias"] == ("encoder.conv.bias",)
    assert torch.equal(model.encoder.conv.bias, source.encoder.conv.bias)
    assert not model.encoder.norm.weight.requires_grad
    assert model.encoder.conv.weight.requires_grad


def test_field_note_2_an_averaged_model_s_copy_is_filled_and_its_counter_kept():
    model = AveragedModel(Net())
    model.n_averaged += 5
    report = warmstart.load(model, filled(Net()).state_dict())
    assert report.excluded == ("n_averaged",)
    assert int(model.n_averaged) == 5
    assert_same(model, filled(Net()))


@pytest.mark.parametrize("names", [("AveragedModel", "checkpoint"), ("AveragedModel", "compile", "DataParallel")])
def test_field_note_2_an_averaged_model_inside_another_wrapper_takes_its_own_state_dict(names):
    model, source = wrapped(Net(), names), wrapped(filled(Net()), names)
    report = warmstart.load(model, source)
    (ignored,), (excluded,) = report.ignored, report.excluded  # a wrapper may leave itself out of its state dict
    assert ignored.rpartition(".")[2] == excluded.rpartition(".")[2] == "n_averaged"
    assert [name.rpartition(".")[2] for name in report.ignored] == ["n_averaged"]
    assert_same(model, source)


# ---- real children with a wrapper's name ----


class Named(nn.Module):
    """Nothing here is a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.submodule = nn.Linear(2, 2)
        self.base_module = nn.Sequential(nn.Linear(2, 2))


@pytest.mark.parametrize("names", [(), ("DataParallel",), ("compile", "DataParallel"), ("AveragedModel", "checkpoint")])
def test_field_note_2_children_called_module_submodule_and_base_module_keep_their_names(names):
    source, model = filled(Named()), wrapped(Named(), names)
    warmstart.load(model, source.state_dict())
    assert_same(model, source)
    fresh = Named()
    warmstart.load(fresh, model.state_dict(), allow_unexpected="?*n_averaged")
    assert_same(fresh, source)


def test_field_note_2_a_file_of_wrapped_children_of_a_model_with_a_child_called_module():
    keys = {f"_orig_mod.{name}": tensor for name, tensor in filled(Named()).state_dict().items()}
    model = Named()
    warmstart.load(model, keys)
    assert_same(model, filled(Named()))


# ---- one prefix, either way ----


@pytest.mark.parametrize(
    ("strip", "add"), [("", ""), ("bert", ""), ("", "model"), ("bert", "model"), ("a.b.c", "x.y"), ("module.bert", "")]
)
def test_a_prefix_is_stripped_added_or_replaced(strip, add):
    source, model = filled(Net()), Net()
    for segment in reversed(add.split(".") if add else []):
        model = nn.ModuleDict({segment: model})
    keys = {f"{strip}.{name}".lstrip("."): tensor for name, tensor in source.state_dict().items()}
    plan = warmstart.plan(model, keys)
    assert plan.errors == ()
    clean = strip.removeprefix("module.")
    assert plan.prefix == ((clean, add) if clean or add else None)
    plan.apply()
    assert_same(model, source)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_towers_that_fit_equally_well_are_an_error_naming_the_pairs(wrap, fingerprint):
    model = wrap(nn.ModuleDict({"student": Net(), "teacher": Net()}))
    before = fingerprint(model)
    keys = {f"net.{name}": tensor for name, tensor in Net().state_dict().items()}
    with pytest.raises(MappingError) as error:
        warmstart.load(model, keys)
    assert "2 prefix changes fit equally well (9 keys each)" in str(error.value)
    assert "strip 'net' and add 'student'; strip 'net' and add 'teacher'" in str(error.value)
    assert 'into="student", strip_prefix="net"' in str(error.value)
    assert fingerprint(model) == before
    # What it says can be typed.
    report = warmstart.load(model, keys, into="student", strip_prefix="net")
    assert report.coverage == 1


def test_a_key_that_is_right_stays_though_the_prefix_fits_it_too():
    inner = filled(Net())
    model = nn.ModuleDict({"net": Net(), "extra": nn.ModuleDict({"net": nn.Linear(3, 2)})})
    keys = {f"extra.net.{name}": tensor for name, tensor in inner.state_dict().items() if name.startswith("encoder")}
    keys |= {"extra.net.weight": inner.head.weight, "extra.net.bias": inner.head.bias}  # right as they are
    report = warmstart.load(model, keys, allow_missing="net.head")
    assert report.prefix == ("extra", "")
    assert report.mapping["extra.net.weight"] == ("extra.net.weight",)
    assert report.mapping["net.encoder.conv.weight"] == ("extra.net.encoder.conv.weight",)
    assert torch.equal(model["extra"]["net"].weight, inner.head.weight)


# ---- rules ----

RULES = [
    (
        {"backbone": "encoder", "c": "conv", "n": "norm", "fc": "head"},
        [("encoder.conv", "backbone.c"), ("encoder.norm", "backbone.n"), ("head", "fc")],
    ),
    ([{r"^net\.": ""}, {r"stem\.(conv|norm)": r"encoder.\1"}], [("encoder", "net.stem"), ("head", "net.head")]),
    ({r"^(\w+)\.x\b": r"\1"}, [("encoder", "encoder.x"), ("head", "head.x")]),
]


@pytest.mark.parametrize(("rules", "names"), RULES)
@pytest.mark.parametrize("outer", [(), ("DataParallel",), ("compile", "DataParallel", "AveragedModel")])
def test_a_checkpoint_that_is_renamed_already_gives_the_same_mapping_without_the_rules(rules, names, outer):
    def old(name: str) -> str:
        mine, theirs = next(pair for pair in names if name.startswith(pair[0]))
        return theirs + name.removeprefix(mine)

    source = filled(Net()).state_dict()
    model = wrapped(Net(), outer)
    plan = warmstart.plan(model, {old(name): tensor for name, tensor in source.items()}, rename=rules)
    assert plan.errors == ()
    assert set(plan.mapping.values()) == {(old(name),) for name in source}
    again = warmstart.plan(model, source)
    assert again.errors == ()
    assert {target: (old(key),) for target, (key,) in again.mapping.items()} == plan.mapping
    # And loading the model's own state over it once more changes nothing.
    plan.apply()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert warmstart.plan(model, own).mapping == {t: (t,) for t in plan.mapping}


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_renames_commute_with_wrappers(data):
    """A rule hits the same keys, whatever wrappers the file and the model have, and gives the same values."""
    source = filled(Net()).state_dict()
    spelled = {}
    for name, tensor in source.items():
        segments = name.replace("encoder", "backbone").split(".")
        for _ in range(data.draw(st.integers(0, 3))):
            segments.insert(data.draw(st.integers(0, len(segments) - 1)), data.draw(st.sampled_from(SEGMENTS)))
        spelled[".".join(segments)] = (name, tensor)
    model = wrapped(Net(), tuple(data.draw(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3, unique=True))))
    plan = warmstart.plan(model, {key: tensor for key, (_, tensor) in spelled.items()}, rename={"^backbone": "encoder"})
    assert plan.errors == ()
    clean = {target.name: target.clean for target in plan.targets.entries.values()}
    assert {clean[target]: key for target, (key,) in plan.mapping.items()} == {
        name: key for key, (name, _) in spelled.items()
    }
    plan.apply()
    assert_same(model, filled(Net()))


# ---- failed plans ----


@pytest.mark.parametrize("names", [(), ("DataParallel",), ("compile", "AveragedModel")])
@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        (lambda state: {f"q.{k}": v for k, v in state.items()}, {"strip_prefix": ""}),
        (lambda state: {k: v for k, v in state.items() if k != "head.bias"}, {}),
        (lambda state: {**state, "more.w": torch.ones(1)}, {}),
        (lambda state: {**state, "head.weight": torch.ones(7, 3)}, {}),
        (lambda state: {**state, "module.head.weight": torch.ones(2, 3)}, {}),
        (lambda state: state, {"rename": {"head": "encoder.norm"}}),
        (lambda state: state, {"rename": {"hed": "head"}}),
        (lambda state: state, {"into": "encodr"}),
        (lambda state: {k: v.to(torch.complex64) for k, v in state.items()}, {}),
    ],
    ids=["prefix", "missing", "unexpected", "shape", "two spellings", "two to one", "no hit", "into", "dtype"],
)
def test_a_plan_with_errors_leaves_the_model_bit_for_bit_as_it_was(names, keys, fields, fingerprint):
    model = wrapped(Net(), names)
    before, grads = fingerprint(model), {name: p.requires_grad for name, p in model.named_parameters()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    plan = warmstart.plan(model, keys(filled(Net()).state_dict()), **fields, freeze=True)
    assert plan.errors
    with pytest.raises(MappingError):
        plan.apply()
    assert fingerprint(model) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert {name: id(p) for name, p in model.named_parameters()} == objects
