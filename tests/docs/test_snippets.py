"""Every snippet of the README and of the pages runs, and prints what the page says it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import snippets

# Pages whose snippets need more than the core, and what they need.
NEEDS = {
    "README.md": ("lightning", "transformers", "jsonargparse", "jinja2", "matplotlib"),
    "accelerate.md": ("accelerate",),
    "freezing.md": ("lightning", "transformers"),
    "lightning-checkpoint.md": ("lightning",),
    "mapping.md": ("transformers",),
    "resuming.md": ("lightning", "transformers"),
    "vocabulary.md": ("transformers",),
}

# Snippets that cannot run anywhere, for the reasons that stand above them.
UNRUN: dict[str, int] = {}


ENV = {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(snippets.ROOT / "examples")}


def name(page: Path) -> str:
    return str(page.relative_to(snippets.ROOT))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # each `warmstart` in it is a process that imports torch
@pytest.mark.parametrize("page", [page for page in snippets.PAGES if snippets.snippets(page)], ids=name)
def test_the_snippets_of_a_page_run_in_order(page, tmp_path):
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", snippets.__file__, page],
        cwd=tmp_path, env=os.environ | ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert not wrong, "\n\n".join(wrong)


def test_what_does_not_run_is_counted():
    unrun = Counter(name(page) for page in snippets.PAGES for s in snippets.snippets(page) if s.unrun is not None)
    assert unrun == UNRUN


@pytest.mark.parametrize("page", snippets.PAGES, ids=name)
def test_code_is_fenced_so_that_it_is_run(page):
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\n\n {4,}[^ *\-0-9]", text), "an indented block, which nothing runs"


def test_every_world_has_a_page():
    assert {path.name for path in snippets.WORLDS.glob("*.py")} <= {
        snippets.world(page).name for page in snippets.PAGES
    }


def test_a_wrong_snippet_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "wrong.md"
    for text, words in (
        ("```python\n1 / 0\n```", "ZeroDivisionError"),
        ("```bash\nexit 3\n```", "ended with 3"),
        ("```bash\npip install 'warmstart[nothing]'\n```", "no extra nothing"),
        ("```python\nprint('1 of 3')\n```\n\n```text\n1 of 2\n```", "claims"),
        ("```console\n$ echo a; echo b\na\nc\n```", "claims"),
        ("```python\nraise ValueError('no')\n```\n\n```text\nyes\n```", "claims"),
        ("```\nsomething\n```", "no language"),
    ):
        page.write_text(f"# Page\n\n{text}\n")
        (wrong,) = snippets.Runner(page).run()
        assert words in wrong
    page.write_text("```console\n$ echo a; echo b  c; echo [1.23 s]\na\n...\nb ...\n[4.56 s]\n```\n")
    assert list(snippets.Runner(page).run()) == []
