"""The distribution holds every package of the tree."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import warmstart

ROOT = Path(__file__).parent.parent


def test_the_wheel_lists_every_package_and_each_is_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    found = {
        str(p.parent.relative_to(ROOT)) for root in ("src", "integrations") for p in (ROOT / root).glob("*/__init__.py")
    }
    assert listed == found
    assert all((ROOT / package / "py.typed").exists() for package in listed)


def test_the_installed_version_is_the_package_s_own():
    assert version("warmstart") == warmstart.__version__


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?({re.escape(warmstart.__version__)}|Unreleased)\b", text, re.MULTILINE)


def test_imports_point_down():
    """No module imports from a floor above its own, and the core imports no host."""
    ground = ["version", "errors", "patterns", "tensors", "showing", "locations", "modules", "shards"]
    floors = [
        *ground,
        "checkpoints",
        "mapping",
        "lineage",
        "held_modules",
        "held_rows",
        "freezing",
        "loading",
        "outcome",
        "layers",
        "optimizer_groups",
        "drift",
        "rendering",
        "report",
        "api",
    ]
    floors += ["lifecycle", "cli", "__main__"]
    package = ROOT / "src" / "warmstart"
    for path in package.rglob("*.py"):
        relative = path.relative_to(package).with_suffix("").parts
        if relative[0] == "__init__":
            continue
        code = path.read_text()
        for imported in re.findall(r"^\s*(?:from|import) (warmstart[\w.]*)(?: import (\w+))?", code, re.MULTILINE):
            dotted = imported[0].split(".")[1:] or [imported[1]]
            assert floors.index(dotted[0]) <= floors.index(relative[0]), f"{path.name} imports {'.'.join(dotted)}"
        assert not re.search(r"^\s*(?:from|import) (lightning|transformers|accelerate)\b", code, re.MULTILINE), path
