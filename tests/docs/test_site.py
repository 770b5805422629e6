"""The site builds without a network, fetches nothing when it is read, and its API page has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import warmstart
import warmstart_accelerate
import warmstart_lightning
import warmstart_transformers

ROOT = Path(__file__).parents[2]

OFFLINE = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError(f"the build asked for {args}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", sys.argv[1]]
runpy.run_module("mkdocs", run_name="__main__")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_every_page_is_built_and_fetches_nothing(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]+", text)
        assert fetched == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_the_api_page_shows_every_public_name_with_its_words(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for package in (warmstart, warmstart_accelerate, warmstart_lightning, warmstart_transformers):
        for name in set(package.__all__) - {"__version__"}:
            assert re.search(rf'<h3 id="{package.__name__}\.{name}"', text), f"{package.__name__}.{name}"
    assert "A pattern matches nothing." in text  # of `freeze`, under Raises
    assert "compares every element after writing" in text  # of `load`, under Args


class _Nav(yaml.SafeLoader):
    """mkdocs.yml may name Python objects, which are not wanted here."""


_Nav.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_the_navigation_names_every_page_once():
    def pages(item: object) -> list[str]:
        if isinstance(item, dict):
            return [page for value in item.values() for page in pages(value)]
        return [page for each in item for page in pages(each)] if isinstance(item, list) else [str(item)]

    nav = pages(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Nav)["nav"])
    assert sorted(nav) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
