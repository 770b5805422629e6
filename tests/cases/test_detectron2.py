"""detectron2: matching by suffix, options in a path, and the table of Caffe2 names."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import warmstart
from warmstart import CheckpointError, MappingError


class Complex(nn.Module):
    """The model of detectron2's own test."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(OrderedDict(layer1=nn.Linear(2, 3)))
        self.layer2 = nn.Linear(3, 2)
        self.res = nn.Sequential(OrderedDict(layer2=nn.Linear(3, 2)))


def state() -> dict[str, torch.Tensor]:
    shapes = {"layer1.weight": (3, 2), "layer1.bias": (3,), "layer2.weight": (2, 3), "layer2.bias": (2,)}
    shapes |= {"res.layer2.weight": (2, 3), "res.layer2.bias": (2,)}
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "DataParallel"])
def test_d2_1_and_d2_2_each_layer_takes_the_longest_suffix(wrapped):
    inner, keys = Complex(), state()
    model = nn.DataParallel(inner) if wrapped else inner
    report = warmstart.load(model, keys, match="suffix")
    under = "module." if wrapped else ""
    expected = {f"{under}{key}": (key,) for key in keys if not key.startswith("layer1")}
    expected |= {f"{under}block1.{key}": (key,) for key in keys if key.startswith("layer1")}
    assert report.mapping == expected
    assert (report.coverage, report.prefix) == (1, None)
    mine = dict(model.named_parameters())
    for target, (key,) in expected.items():
        assert torch.equal(mine[target], keys[key])
        assert mine[target].data_ptr() != keys[key].data_ptr()


def test_d2_3_a_match_by_suffix_is_opt_in(fingerprint):
    model, keys = Complex(), state()
    nn.init.ones_(model.block1.layer1.weight)
    before = fingerprint(model)
    with pytest.raises(MappingError) as error:
        warmstart.load(model, keys)
    assert error.value.plan.missing == ("block1.layer1.bias", "block1.layer1.weight")
    assert error.value.plan.unexpected == ("layer1.bias", "layer1.weight")
    assert fingerprint(model) == before
    warmstart.load(model, keys, match="suffix")
    assert torch.equal(model.block1.layer1.weight, keys["layer1.weight"])


def test_d2_1_rivals_are_an_error_that_names_them(fingerprint):
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"conv": nn.Linear(2, 2)}), "b": nn.ModuleDict({"conv": nn.Linear(2, 2)})}
    )
    before = fingerprint(model)
    with pytest.raises(MappingError) as error:
        warmstart.load(model, {"conv.weight": torch.ones(2, 2), "conv.bias": torch.ones(2)}, match="suffix")
    assert "ambiguous" in {problem.kind for problem in error.value.plan.errors}
    for name in ("a.conv.weight", "b.conv.weight", "conv.weight"):
        assert name in str(error.value)
    assert fingerprint(model) == before


def test_d2_4_options_are_arguments_and_not_part_of_a_path(tmp_path):
    torch.save(state(), tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError):
        warmstart.plan(Complex(), f"{tmp_path}/checkpoint.pth?matching_heuristics=True")
    with pytest.raises(TypeError, match="unknown field matching_heuristics; the fields are adapt, allow_mismatched, "):
        warmstart.plan(Complex(), tmp_path / "checkpoint.pth", matching_heuristics=True)


@pytest.mark.parametrize(
    ("keys", "entries", "prefix"),
    [
        (["class.w", "dlaps_model.w"], ["class.w", "dlaps_model.w"], None),
        (["classA.w", "classB.w"], ["A.w", "B.w"], None),  # a prefix is a path: `class` is none of these
        (["cla.ssA.w", "cla.ssB.w", "cla.b.w"], ["ssA.w", "ssB.w", "b.w"], ("cla", "")),
    ],
)
def test_d2_5_a_common_prefix_is_one_of_whole_segments(keys, entries, prefix):
    model = nn.ModuleDict({name.removesuffix(".w"): nn.Module() for name in entries})
    for module in model.values():
        module.w = nn.Parameter(torch.zeros(2))
    plan = warmstart.plan(model, {key: torch.ones(2) for key in keys})
    assert plan.prefix == prefix
    assert [problem.kind for problem in plan.errors] == (["ambiguous"] if keys[0] == "classA.w" else [])


C2_NAMES = {
    "conv1_w": "stem.conv1.weight",
    "res_conv1_bn_s": "stem.conv1.norm.weight",
    "res2_0_branch2a_bn_b": "res2.0.conv1.norm.bias",
    "fpn_inner_res2_2_sum_lateral_w": "fpn_lateral2.weight",
    "fpn_res2_2_sum_w": "fpn_output2.weight",
}
C2_RULES = [
    {r"fpn_inner_res(\d)_\d_sum_lateral_(\w)": r"fpn_lateral\1.\2", r"fpn_res(\d)_\d_sum_(\w)": r"fpn_output\1.\2",
     r"res(\d)_(\d+)_branch2a_bn_(\w)": r"res\1.\2.conv1.norm.\3", r"res_conv1_bn_(\w)": r"stem.conv1.norm.\1",
     r"conv1_(\w)": r"stem.conv1.\1"},
    {r"w$": "weight", r"s$": "weight", r"b$": "bias"},
]  # fmt: skip


def test_d2_naming_a_table_of_regexes_renames_caffe2_s_keys():
    model = nn.Module()
    for name in C2_NAMES.values():
        *path, leaf = name.split(".")
        module = model
        for segment in path:
            module = module._modules.setdefault(segment, nn.Module())
        module.register_parameter(leaf, nn.Parameter(torch.zeros(2)))
    report = warmstart.load(model, {key: torch.full((2,), float(i)) for i, key in enumerate(C2_NAMES)}, rename=C2_RULES)
    assert report.mapping == {name: (key,) for key, name in C2_NAMES.items()}
    assert [int(model.get_parameter(name)[0]) for name in C2_NAMES.values()] == [0, 1, 2, 3, 4]


def test_d2_naming_rows_that_move_with_a_name_are_an_adapter_s():
    """`cls_score` keeps the background first in Caffe2 and last here; `bbox_pred` drops its four rows."""
    model = nn.ModuleDict({"cls_score": nn.Linear(2, 3), "bbox_pred": nn.Linear(2, 8)})
    keys = {"cls_score.weight": torch.arange(6.0).view(3, 2), "cls_score.bias": torch.arange(3.0)}
    keys |= {"bbox_pred.weight": torch.arange(24.0).view(12, 2), "bbox_pred.bias": torch.arange(12.0)}
    classes = warmstart.MapRows(old=["bg", "a", "b"], new=["a", "b", "bg"])
    boxes = warmstart.MapRows(old=list(map(str, range(12))), new=list(map(str, range(4, 12))), allow_drop=True)
    warmstart.load(model, keys, adapt={"cls_score": classes, "bbox_pred": boxes})
    assert torch.equal(model["cls_score"].weight, keys["cls_score.weight"].roll(-1, 0))
    assert torch.equal(model["cls_score"].bias, torch.tensor([1.0, 2.0, 0.0]))
    assert torch.equal(model["bbox_pred"].weight, keys["bbox_pred.weight"][4:])
    assert torch.equal(model["bbox_pred"].bias, keys["bbox_pred.bias"][4:])
