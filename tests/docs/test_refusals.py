"""The page of errors knows every kind and every type, each kind is met, and what the page says mends it does."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import warmstart
from warmstart import AdaptInChannels, Concat, Conversion, MappingError, Pretrained, SliceOrPad, Split, errors
from warmstart.mapping.buckets import Problem

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/tasks/refusals.md").read_text(encoding="utf-8")


def kinds_in_code() -> set[str]:
    """What is given as a `Problem`'s kind, and the heads of what preflight finds."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in ("Problem", "problem", "_failing"):
                    found.add(str(node.args[0].value))
    for name in ("preflight", "materialising"):
        text = (ROOT / f"src/warmstart/loading/{name}.py").read_text(encoding="utf-8")
        found.update(re.findall(r'f"([a-z ]+): ', text))
    return found


def kinds_in_page() -> set[str]:
    section = PAGE.partition("## The plan")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def test_every_kind_is_on_the_page_and_in_the_docstring():
    assert kinds_in_page() == kinds_in_code()
    assert Problem.__doc__ is not None
    assert set(re.findall(r"`([a-z ]+)`", Problem.__doc__)) == kinds_in_code() - {"memory", "meta"}


def test_every_type_of_error_has_a_section():
    types = {name for name, kind in vars(errors).items() if isinstance(kind, type) and name.endswith("Error")}
    assert set(re.findall(r"^## .*`(\w+)`$", PAGE, re.MULTILINE)) == types - {"WarmStartError"}


class Net(nn.Module):
    def __init__(self, **entries: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in entries.items():
            path, _, leaf = name.replace("__", ".").rpartition(".")
            module: nn.Module = self
            for segment in path.split(".") if path else ():
                module = module._modules.setdefault(segment, nn.Module()) or module
            module._parameters[leaf] = nn.Parameter(tensor)


ONE = {"a": torch.ones(2)}
FUSE = Conversion(["q", "k"], "qk", [Concat(0)])

# kind: (entries, keys, rules that are refused, rules that are not)
MET: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]] = {
    "missing": (ONE | {"b": torch.ones(1)}, ONE, {}, {"allow_missing": "b"}),
    "unexpected": (ONE, ONE | {"b": torch.ones(1)}, {}, {"allow_unexpected": "b"}),
    "mismatched": (ONE | {"b": torch.ones(1)}, ONE | {"b": torch.ones(3)}, {}, {"adapt": {"b": SliceOrPad()}}),
    "nothing matched": (ONE, {"z": torch.ones(2)}, {}, {"rename": {"z": "a"}}),
    "unused": (ONE, ONE, {"exclude": "zz"}, {"exclude": "?zz"}),
    "into": ({"m__a": torch.ones(2)}, ONE, {"into": "n", "strip_prefix": ""}, {"into": "m"}),
    "ambiguous": (
        {"x__w": torch.ones(2), "y__w": torch.ones(2)}, {"w": torch.ones(2)}, {"allow_missing": "*"},
        {"into": "x"},
    ),
    "collision": (ONE, ONE | {"z": torch.ones(2)}, {"rename": {"z": "a"}}, {"select": "a"}),
    "conversion": (
        {"x": torch.ones(1), "y": torch.ones(2)}, {"a": torch.ones(3)},
        {"convert": [Conversion("a", ["x", "y"], [Split(0, sizes=(1, 3))])]},
        {"convert": [Conversion("a", ["x", "y"], [Split(0, sizes=(1, 2))])]},
    ),
    "incomplete": (
        {"qk": torch.ones(4)}, {"q": torch.ones(2), "k": torch.ones(2)},
        {"convert": [Conversion(["q", "k", "v"], "qk", [Concat(0)])]}, {"convert": [FUSE]},
    ),
    "adapter": (
        {"a": torch.ones(2, 3, 1, 1)}, {"a": torch.ones(2, 1, 2, 2)},
        {"adapt": {"a": AdaptInChannels()}}, {"adapt": {"a": SliceOrPad()}},
    ),
    "fill": (ONE | {"b": torch.ones(1)}, ONE, {"fill": {"*": 1.0}}, {"fill": {"b": 1.0}}),
    "dtype": ({"a": torch.ones(2)}, {"a": torch.ones(2).double()}, {"allow_narrowing": False}, {"dtype": "checkpoint"}),
    "coverage": (
        ONE | {"b": torch.ones(9)}, ONE, {"min_coverage": 0.9, "allow_missing": "b"}, {"min_coverage": 0.9, "include": "a"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MET)
def test_a_kind_is_met_and_mended(kind):
    entries, keys, refused, mended = MET[kind]
    plan = warmstart.plan(Net(**entries), keys, **refused)
    assert kind in {problem.kind for problem in plan.errors}, plan
    again = warmstart.plan(Net(**entries), keys, **mended)
    assert again.errors == (), again


def test_overlap():
    model, parts = Net(**ONE, b=torch.ones(1)), [Pretrained(ONE), Pretrained(ONE | {"b": torch.ones(1)})]
    assert [problem.kind for problem in warmstart.plan(model, parts).errors] == ["overlap"]
    parts[1] = Pretrained(ONE | {"b": torch.ones(1)}, exclude="a")
    assert warmstart.plan(model, parts).errors == ()


def test_lock(tmp_path):
    path = tmp_path / "warmstart.lock.yaml"
    path.write_text(warmstart.plan(Net(**ONE), ONE).to_yaml())
    (problem,) = warmstart.plan(Net(**ONE), ONE, freeze=True, lock=path).errors
    assert problem.kind == "lock"
    assert warmstart.plan(Net(**ONE), ONE, lock=path).errors == ()


def test_load_hook():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(2))

        def _load_from_state_dict(self, state_dict, *rest):
            raise RuntimeError("not like this")

    model = nn.ModuleDict({"picky": Picky(), "plain": nn.Linear(1, 1)})
    state = {"picky.a": torch.ones(2), "plain.weight": torch.ones(1, 1), "plain.bias": torch.ones(1)}
    assert [problem.kind for problem in warmstart.plan(model, state).errors] == ["load hook"]
    assert warmstart.plan(model, state, exclude="picky").errors == ()


def test_memory():
    both = torch.zeros(3)
    model = nn.ParameterDict({"a": nn.Parameter(both[:2]), "b": nn.Parameter(both[1:])})
    state = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(MappingError, match="memory: "):
        warmstart.load(model, state)
    warmstart.load(model, state, exclude="b")


def test_meta():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))

    with torch.device("meta"):
        model, again = Scaled(), Scaled()
    with pytest.raises(MappingError, match="meta: "):
        warmstart.load(model, ONE, allow_missing="scale")
    warmstart.load(again, ONE, fill={"scale": 1.0})
    assert again.scale.item() == 1
