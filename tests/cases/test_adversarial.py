"""Cases in which a peer's loader was silently wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart
from warmstart import MappingError


def test_x_11_what_the_checkpoint_lacks_is_missing_and_the_caller_s_dict_stays():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    keys = {f"a.{name}": torch.ones_like(tensor) for name, tensor in model["a"].state_dict().items()}
    before = dict(keys)
    plan = warmstart.plan(model, keys)
    assert plan.missing == ("b.bias", "b.weight")
    with pytest.raises(MappingError):
        plan.apply()
    warmstart.load(model, keys, allow_missing="b")
    assert keys.keys() == before.keys()
    assert all(keys[key] is before[key] for key in keys)


def test_x_13_a_model_on_meta_is_real_after_a_load():
    source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    report = warmstart.load(model, source.state_dict())
    assert report.coverage == 1
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert mine.device.type == "cpu"
        assert torch.equal(mine, theirs)


def test_x_19_sixteen_tokens_of_another_grid_are_resampled_once_the_grid_is_said():
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 16, 2))

    rows = torch.arange(8.0).repeat_interleave(2)  # row by row down a grid of 8 x 2
    source = {"pos_embed": torch.stack([rows, torch.ones(16)], dim=-1)[None]}
    model = Embedding()
    warmstart.load(model, source, adapt={"pos_embed": warmstart.ResizePosEmbed(prefix_tokens=0)})
    assert torch.equal(model.pos_embed, source["pos_embed"])  # no grid is named: equal counts are copied
    grids = warmstart.ResizePosEmbed(prefix_tokens=0, src_grid=(8, 2), dst_grid=(4, 4))
    warmstart.load(model, source, adapt={"pos_embed": grids})
    grid = model.pos_embed.detach()[0].view(4, 4, 2)
    assert torch.allclose(grid[..., 1], torch.ones(4, 4), atol=1e-5)
    assert torch.allclose(grid[:, :1, 0].expand(4, 4), grid[..., 0], atol=1e-5)  # the same along a row
    assert grid[0, 0, 0] < grid[1, 0, 0] < grid[2, 0, 0] < grid[3, 0, 0]


def test_x_25_a_released_parameter_joins_the_optimizer_though_another_has_its_value():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    nn.init.zeros_(model["backbone"].bias)
    nn.init.zeros_(model["head"].bias)
    frozen = warmstart.freeze(model, "backbone")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    frozen.release("backbone", optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    model["head"](model["backbone"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    assert model["backbone"].bias.abs().sum() > 0
