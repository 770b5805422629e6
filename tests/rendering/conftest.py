"""Models and names that pages and pictures are tested with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import warmstart

HOSTILE = [
    "<script>pwned=1</script>",
    "</script><script>pwned=1</script><!--",
    '"><img src=x onerror=pwned=1>',
    "' onmouseover='pwned=1' x='",
    "javascript:pwned=1",
    "{{ 7*7 }}{% raw %}",
    "__proto__",
    "constructor",
    "\x1b[2J\x1b]0;pwned\x07",
    "\u202egnp",
    "line\u2028break\nnew",
    "&lt;b&gt;",
    "]]>",
    "$\\frac{1}$",
    "\ud800",
    "a" * 5000,
]


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(2))


def hostile_model(tensors: int) -> nn.Module:
    each = tensors // len(HOSTILE)
    return nn.ModuleDict({name: nn.ModuleDict({str(i): Gain() for i in range(each)}) for name in HOSTILE})


@pytest.fixture(scope="session")
def hostile_report():
    """A load of 10,000 tensors under hostile names, with hostile keys left over."""
    model = hostile_model(10_000)
    state = {name: torch.ones(2) for name in model.state_dict()}
    state |= {f"{name}.left": torch.zeros(3) for name in HOSTILE}
    return warmstart.load(model, state, allow_unexpected="*", freeze=["__proto__"])


class Net(nn.Module):
    """Something for every status."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
        self.position = nn.Parameter(torch.zeros(6, 4))
        self.gate = nn.Parameter(torch.zeros(4))
        self.embed = nn.Embedding(8, 4)
        self.decoder = nn.Linear(4, 8, bias=False)
        self.decoder.weight = self.embed.weight
        self.head = nn.Linear(4, 2)
        self.other = nn.Linear(4, 4)
        self.register_buffer("steps", torch.arange(4), persistent=False)


def source() -> dict[str, torch.Tensor]:
    state = {
        f"net.blocks.{i}.{leaf}": torch.ones(shape)
        for i in range(3)
        for leaf, shape in (("weight", (4, 4)), ("bias", (4,)))
    }
    return state | {
        "net.position": torch.ones(3, 4),
        "net.embed.weight": torch.ones(8, 4),
        "net.head.weight": torch.ones(5, 4),
        "net.steps": torch.arange(4),
        "net.fc.weight": torch.ones(3),
        "temperature": torch.ones(1),
    }


RULES = {
    "select": "net",
    "strip_prefix": "net",
    "exclude": "other",
    "rename": {r"blocks\.(\d+)": r"encoder.layer.\1"},
    "adapt": {"position": "slice_or_pad"},
    "fill": {"gate": 1.0},
    "allow_missing": ["head.bias"],
    "allow_mismatched": ["head"],
    "allow_unexpected": ["net.fc"],
    "freeze": ["encoder.layer.0"],
}


@pytest.fixture
def mixed_plan():
    return warmstart.plan(Net(), source(), **RULES)


@pytest.fixture
def failed_plan():
    """Missing, mismatched and unexpected names, and a rule without a hit."""
    rules = {k: v for k, v in RULES.items() if not k.startswith("allow_")}
    return warmstart.plan(Net(), source(), **rules | {"exclude": ["other", "othr"]})
