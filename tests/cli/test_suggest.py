"""`warmstart suggest`: rules as YAML that the other commands take."""

from __future__ import annotations

import json

import torch
from torch import nn

from warmstart.cli import main


def net() -> nn.Module:
    blocks = (nn.ModuleDict({n: nn.Linear(8, 8) for n in ("query", "key", "value", "out")}) for _ in range(3))
    return nn.ModuleDict(
        {"layer": nn.ModuleList(nn.ModuleDict({"attention": b, "norm": nn.LayerNorm(8)}) for b in blocks)}
    )


def foreign() -> dict[str, torch.Tensor]:
    words = {"layer.": "model.layers.", "attention": "self_attn", "query": "q_proj", "key": "k_proj"}
    words |= {"value": "v_proj", "out": "o_proj", "norm": "ln"}
    state = net().state_dict()
    for old, new in words.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def test_what_is_suggested_is_planned(tmp_path, capsys, monkeypatch):
    torch.save(foreign(), tmp_path / "old.pt")
    torch.save(net().state_dict(), tmp_path / "new.pt")
    monkeypatch.chdir(tmp_path)
    assert main(["suggest", "old.pt", "--model", "new.pt"]) == 0
    (tmp_path / "rules.yaml").write_text(capsys.readouterr().out)
    assert main(["plan", "old.pt", "--model", "new.pt", "--config", "rules.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    keys = {a["target"]: a["sources"] for a in plan["assignments"]}
    assert len(keys) == 30
    assert keys["layer.2.attention.value.bias"] == ["model.layers.2.self_attn.v_proj.bias"]
    assert main(["suggest", "old.pt", "--model", "new.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mapping"] == keys


def test_what_has_nothing_in_common_is_said_so(tmp_path, capsys, monkeypatch):
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt")
    torch.save(net().state_dict(), tmp_path / "new.pt")
    monkeypatch.chdir(tmp_path)
    assert main(["suggest", "old.pt", "--model", "new.pt"]) == 1
