"""Rows that stay what they are while the others train: `MapRows(..., freeze_old=True)`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import warmstart
from warmstart import FrozenChangedError, MapRows
from warmstart.held_rows import HeldRows


class Tied(nn.Module):
    def __init__(self, rows: int, sparse: bool = False):
        super().__init__()
        self.embed = nn.Embedding(rows, 4, sparse=sparse)
        self.head = nn.Linear(4, rows)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


OLD, NEW = ["a", "b", "c"], ["c", "x", "a", "b", "y"]


def loaded(**options) -> tuple[Tied, Tied, warmstart.Report]:
    source, model = Tied(3), Tied(5)
    state = {k: v for k, v in source.state_dict().items() if k != "head.weight"}
    rows = MapRows(OLD, NEW, freeze_old=True, **options)
    return source, model, warmstart.load(model, state, adapt={"embed": rows})


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=False),
    ],
)
def test_field_note_28_old_rows_are_bit_equal_after_every_step_and_new_ones_train(optimizer):
    source, model, report = loaded()
    before = copy.deepcopy(model.state_dict())
    old, new = [0, 2, 3], [1, 4]
    assert torch.equal(before["embed.weight"][old], source.embed.weight[[2, 0, 1]])
    trainer = optimizer(model.parameters())
    for _ in range(5):
        trainer.zero_grad()
        model(torch.tensor([0, 1, 2, 3, 4])).square().sum().backward()
        assert torch.equal(model.embed.weight.grad[old], torch.zeros(3, 4))
        trainer.step()
        assert torch.equal(model.embed.weight[old], before["embed.weight"][old])
        assert torch.equal(model.head.bias[old], before["head.bias"][old])
    assert model.head.weight is model.embed.weight
    assert (model.embed.weight[new] != before["embed.weight"][new]).all()
    assert (model.head.bias[new] != before["head.bias"][new]).all()
    report.frozen.check()


def test_sparse_gradients_lose_the_held_rows():
    embed = nn.Embedding(4, 2, sparse=True)
    HeldRows(embed.weight, torch.tensor([[True], [False], [True], [False]]))
    embed(torch.tensor([0, 1, 1, 2])).sum().backward()
    assert torch.equal(embed.weight.grad.to_dense(), torch.tensor([[0.0, 0], [2, 2], [0, 0], [0, 0]]))


def test_a_row_that_something_else_writes_is_found():
    _, model, report = loaded()
    with torch.no_grad():
        model.embed.weight[2, 1] += 1
    with pytest.raises(FrozenChangedError, match=r"embed.weight.*rows that are held"):
        report.frozen.check()


def test_released_rows_train():
    _, model, report = loaded()
    before = model.embed.weight.detach().clone()
    assert report.frozen.release("embed") == ("embed.weight",)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([0, 2, 3])).square().sum().backward()
    optimizer.step()
    assert (model.embed.weight[[0, 2, 3]] != before[[0, 2, 3]]).all()


def test_other_parameters_of_the_optimizer_are_not_touched_and_other_optimizers_neither():
    _, _model, _ = loaded()
    other = nn.Linear(2, 2)
    before = other.weight.detach().clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert (other.weight != before).all()


def test_freeze_true_leaves_a_partly_loaded_entry_trainable_with_a_note():
    source, model = Tied(3), Tied(5)
    state = {k: v for k, v in source.state_dict().items() if k != "head.weight"}
    report = warmstart.load(model, state, adapt={"embed": MapRows(OLD, NEW)}, freeze=True)
    assert model.embed.weight.requires_grad
    assert model.head.bias.requires_grad
    assert any("stays trainable" in note for note in report.notes)
    assert 0.59 < report.coverage < 0.61


def test_rows_along_another_dimension():
    weight = nn.Parameter(torch.zeros(2, 4))
    rows = HeldRows(weight, torch.tensor([[True, False, False, True]]))
    (weight * torch.ones(2, 4)).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[0.0, 1, 1, 0]] * 2))
    assert torch.equal(rows.mask, torch.tensor([[True, False, False, True]]))
