"""Runs the snippets of one page, in order, in the current folder: `python snippets.py PAGE.md`.

What a fence says decides what becomes of it:

- `python`: executed; all of a page share their names. With `title="x.py"`: written to that file instead.
- `bash`: executed by bash. `make` targets and extras of `pip install` are looked up, not made and installed.
- `console`: the lines after `$` are executed; the others are what the page claims they print.
- `yaml`: has to parse. With `title="x.yaml"`: written to that file too.
- `text`: what the page claims that the block before it prints, or the error that it ends in. A line `...` stands for any
  lines, `...` within a line for anything, and seconds in brackets for any seconds.

What a page takes for granted (`model`, `bert.safetensors`) is made by `worlds/<page>.py`, which runs before. A snippet that
cannot run has `*Not run by the tests: reason.*` above it, for readers to see.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORLDS = Path(__file__).parent / "worlds"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_UNRUN = re.compile(r"\*Not run by the tests: ([^*]+)\.\*\s*$")
_SECONDS = re.compile(r"\[\d+\.\d\d s\]")


@dataclass(frozen=True, slots=True)
class Snippet:
    """A fenced block: its language, its file if it has one, its text, its line, and why it does not run."""

    language: str
    title: str | None
    text: str
    line: int
    unrun: str | None


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, rest = match[2].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        unrun = _UNRUN.search(text[: match.start()])
        body = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Snippet(language, title and title[1], body, line, unrun and " ".join(unrun[1].split())))
    return found


def world(page: Path) -> Path:
    return WORLDS / f"{page.stem.lower().replace('-', '_')}.py"


class _WrongError(Exception):
    pass


class Runner:
    def __init__(self, page: Path) -> None:
        self.page = page
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.said = ""
        self.raised: BaseException | None = None  # by the block before, until a text block claims it

    def run(self) -> Iterator[str]:
        """What is wrong, block by block."""
        sys.path.insert(0, os.getcwd())
        if world(self.page).exists():
            self._python(world(self.page).read_text(encoding="utf-8"), str(world(self.page)))
            if self.raised is not None:
                yield f"{world(self.page)}: {self._trace()}"
                return
        for snippet in snippets(self.page):
            if self.raised is not None and snippet.language != "text":
                yield self._trace()
                return
            if snippet.unrun is not None:
                continue
            try:
                self._one(snippet)
            except _WrongError as error:
                yield f"{self.page.name}:{snippet.line}: {error}"
        if self.raised is not None:
            yield self._trace()

    def _one(self, snippet: Snippet) -> None:
        text, where = snippet.text, f"{self.page.name}:{snippet.line}"
        if snippet.title is not None:
            Path(snippet.title).write_text(text, encoding="utf-8")
            if snippet.language == "yaml":
                self._yaml(text)
        elif snippet.language == "python":
            self._python("\n" * snippet.line + text, where)
        elif snippet.language == "bash":
            self.said = self._bash(text)
        elif snippet.language == "console":
            for command, claimed in _commands(text):
                self._claim(claimed, self._bash(command, fails=True))
        elif snippet.language == "yaml":
            self._yaml(text)
        elif snippet.language == "text":
            raised, self.raised = self.raised, None
            self._claim(text, self.said + (f"\n{raised}" if raised is not None else ""))
        else:
            raise _WrongError(f"a block of {snippet.language or 'no language'}: python, bash, console, yaml or text")

    def _python(self, text: str, where: str) -> None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                exec(compile(text, where, "exec"), self.names)
        except (Exception, SystemExit) as error:
            self.raised = error
        self.said = printed.getvalue()

    def _bash(self, text: str, fails: bool = False) -> str:
        script = []
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["pip", "install"]:
                _known_extras(words)
            elif words[:1] == ["make"]:
                subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True)
            else:
                script.append(line)
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -e", *script])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"},
        )  # fmt: skip
        if done.returncode and not fails:
            raise _WrongError(f"ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return done.stdout

    def _yaml(self, text: str) -> None:
        import yaml

        if not isinstance(yaml.safe_load(text), dict | list):
            raise _WrongError("is no mapping and no list")

    def _claim(self, claimed: str, said: str) -> None:
        # Spaces that align columns are not what is claimed.
        lines = [_SECONDS.sub("[... s]", " ".join(line.split())) for line in claimed.strip("\n").splitlines()]
        parts = [r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in lines]
        plain = "".join(" ".join(line.split()) + "\n" for line in said.splitlines())
        if not re.search("^" + "".join(parts), plain, re.MULTILINE):
            raise _WrongError(f"claims\n{claimed}\nand this was said\n{said[-6000:]}")

    def _trace(self) -> str:
        error, self.raised = self.raised, None
        assert error is not None
        return "".join(traceback.format_exception(error)[-4:]) + f"\nafter it had said\n{self.said[-2000:]}"


def _commands(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, claimed = part.partition("\n")
        yield command, claimed


def _known_extras(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        if unknown := set(extra.split(",")) - set(project["optional-dependencies"]):
            raise _WrongError(f"there is no extra {', '.join(unknown)}")


if __name__ == "__main__":
    stdout = sys.stdout
    wrong = list(Runner(Path(sys.argv[1])).run())
    print(json.dumps(wrong), file=stdout, flush=True)
