"""fvcore, mmengine and timm: what a file holds beside weights, who keeps its own initialisation, and other heads."""

from __future__ import annotations

import argparse
from collections import OrderedDict

import pytest
import torch
from torch import nn

import warmstart
from warmstart import CheckpointError, MappingError


def test_fv_5_what_is_not_weights_stays_in_the_file(tmp_path):
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.Adam(source.parameters())
    source(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tree = {
        "model": source.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": 7,
        "x_checker": {"seen": [1]},
    }
    torch.save(tree, tmp_path / "w.pth")
    report = warmstart.load(model, tmp_path / "w.pth")
    assert report.mapping == {"weight": ("weight",), "bias": ("bias",)}
    assert torch.equal(model.weight, source.weight)
    assert report.unexpected == report.ignored == ()


@pytest.mark.parametrize(
    "place",
    ["modelzoo://resnet50", "open-mmlab://x", "mmcls://x", "pavi://x", "ss3://b/x.pt", ":s3://b/x.pt", " s3://b/x.pt"],
)
def test_mm_4_a_scheme_that_is_none_is_refused_and_not_guessed_at(place):
    with pytest.raises(CheckpointError):
        warmstart.plan(nn.Linear(2, 2), place)


class Child(nn.Module):
    """Fills itself with ones and twos when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.conv.weight, 1)
        nn.init.constant_(self.conv.bias, 2)


def test_mm_7_a_child_that_the_checkpoint_lacks_keeps_its_own_initialisation():
    source = nn.Sequential(OrderedDict(body=nn.Linear(2, 2)))
    model = nn.Sequential(OrderedDict(body=nn.Linear(2, 2), child=Child()))
    with pytest.raises(MappingError, match=r'allow_missing=\["child"\]'):
        warmstart.load(model, source.state_dict())
    report = warmstart.load(model, source.state_dict(), allow_missing="child")
    assert report.missing == ("child.conv.bias", "child.conv.weight")
    assert torch.equal(model.body.weight, source.body.weight)
    assert model.child.conv.weight.unique().tolist() == [1]
    assert model.child.conv.bias.tolist() == [2]


class Custom:
    """A class of the user's own code."""

    def __reduce__(self):
        return (Custom, ())


@pytest.mark.parametrize(
    "beside",
    [argparse.Namespace(lr=0.1), Custom(), [Custom(), {"deep": Custom()}]],
    ids=["namespace", "own class", "nested"],
)
@pytest.mark.parametrize("trust", [False, True])
def test_ti_1_ti_2_ti_3_objects_beside_the_weights_are_not_built_unless_trusted(beside, trust, tmp_path):
    source, model = nn.Sequential(OrderedDict(layer=nn.Linear(2, 2))), nn.Sequential(OrderedDict(layer=nn.Linear(2, 2)))
    torch.save({"state_dict": source.state_dict(), "args": beside}, tmp_path / "w.pth")
    report = warmstart.load(model, tmp_path / "w.pth", trust_pickle=trust)
    assert torch.equal(model.layer.weight, source.layer.weight)
    assert any("not built" in note for note in report.notes) == (not trust)


@pytest.mark.parametrize("classes", [5, 0])
def test_ti_6_one_input_channel_and_another_head(classes):
    def net(channels: int, classes: int) -> nn.Module:
        head = nn.Linear(4, classes) if classes else nn.Identity()
        return nn.Sequential(OrderedDict(stem=nn.Conv2d(channels, 4, 3), norm=nn.BatchNorm2d(4), head=head))

    source, model = net(3, 10), net(1, classes)
    fields = {"allow_mismatched": "head"} if classes else {"allow_unexpected": "head"}
    report = warmstart.load(model, source.state_dict(), adapt={"stem.weight": warmstart.AdaptInChannels()}, **fields)
    # A grey image gives what the same image in three channels gave.
    grey = torch.randn(2, 1, 8, 8)
    expected = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), source.stem.weight, source.stem.bias)
    assert torch.allclose(model.stem(grey), expected, atol=1e-5)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert sorted(report.mismatched) == (["head.bias", "head.weight"] if classes else [])
