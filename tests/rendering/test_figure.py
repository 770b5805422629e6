"""The picture shows each module's elements by what became of them."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import warmstart
from warmstart.rendering.figure import figure, pixels


def drawn(picture):
    """Row label to {status: share}."""
    (axes,) = picture.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    shares = {label: {} for label in labels}
    for bars in axes.containers:
        for label, bar in zip(labels, bars, strict=True):
            if bar.get_width():
                shares[label][bars.get_label()] = pytest.approx(bar.get_width())
    return shares


def test_each_module_has_its_shares(mixed_plan):
    report = mixed_plan.apply()
    assert drawn(report.figure()) == {
        "position": {"adapted": 1},
        "gate": {"filled": 1},
        "encoder.layer.0": {"loaded": 1},
        "encoder.layer.1": {"loaded": 1},
        "encoder.layer.2": {"loaded": 1},
        "embed": {"loaded": 1},
        "decoder": {"tied": 1},
        "head": {"own init": 1},
        "other": {"out of scope": 1},
    }
    picture = report.figure()
    assert picture.get_suptitle() == "a state dict in memory into Net\n80.00 % of the elements in scope loaded"
    (axes,) = picture.axes
    beside = [t.get_text() for t in axes.texts]
    assert beside[2:4] == ["20, frozen", "20"]


def test_statuses_are_told_apart_by_more_than_colour(mixed_plan):
    (axes,) = figure(mixed_plan).axes
    hatches = {bars.get_label(): bars[0].get_hatch() for bars in axes.containers}
    assert len({hatches[s] for s in ("loaded", "adapted", "filled", "tied", "own init")}) == 5


def test_a_module_of_mixed_fate_has_its_parts_side_by_side():
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    report = warmstart.load(model, {"a.weight": torch.ones(1, 3)}, allow_missing="*")
    assert drawn(report.figure()) == {"a": {"loaded": 0.75, "own init": 0.25}, "b": {"own init": 1}}


@pytest.mark.parametrize("count", [3, 22, 500])
def test_there_are_about_twenty_rows_whatever_the_model(count):
    block = lambda: nn.ModuleDict({"attention": nn.ModuleDict({"q": nn.Linear(2, 2)}), "mlp": nn.Linear(2, 2)})
    model = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(count)), "head": nn.Linear(2, 2)})
    rows = drawn(warmstart.load(model, dict(model.state_dict())).figure())
    assert len(rows) <= 22
    if count == 3:  # layers are split all or none
        assert list(rows)[:2] == ["layers.0.attention.q", "layers.0.mlp"]
        assert len(rows) == 7


def test_five_hundred_tensors_side_by_side_are_summed_up():
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(i + 1)) for i in range(500)})
    rows = drawn(warmstart.load(model, dict(model.state_dict())).figure())
    assert list(rows)[-1] == "... 479 more"
    assert len(rows) == 22


def test_hostile_and_foreign_names_are_drawn_without_a_warning(hostile_report):
    picture = hostile_report.figure()
    picture.savefig(io.BytesIO(), format="png")
    labels = list(drawn(picture))
    assert "\\x1b[2J\\x1b]0;pwned\\x07" in labels
    assert "$\\frac{1}$" in labels
    assert max(map(len, labels)) <= 44
    model = nn.ModuleDict({"日本": nn.Linear(2, 2)})
    warmstart.load(model, dict(model.state_dict())).figure().savefig(io.BytesIO(), format="png")


def test_a_model_without_elements_has_a_picture_too():
    model = nn.ParameterDict({"empty": nn.Parameter(torch.zeros(0))})
    warmstart.load(model, {"empty": torch.zeros(0)}).figure().savefig(io.BytesIO(), format="png")


def test_no_state_of_pyplot_is_touched():
    import matplotlib.pyplot as plt

    warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2)).figure()
    assert plt.get_fignums() == []


def test_without_matplotlib_the_line_to_install_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'warmstart\[plot\]'"):
        warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2)).figure()


def test_pixels_are_what_the_figure_shows(mixed_plan):
    import matplotlib.image

    picture = mixed_plan.apply().figure()
    saved = io.BytesIO()
    picture.savefig(saved, format="png", dpi=picture.dpi)
    saved.seek(0)
    expected = matplotlib.image.imread(saved)[..., :3]
    found = pixels(picture)
    assert found.shape == expected.shape
    assert abs(found / 255 - expected).max() < 5 / 255  # a file of its own rounds transparency
