"""On a terminal in colour, elsewhere the plain text; no name is cut either way."""

from __future__ import annotations

import io
import os
import re

import pytest
from torch import nn

import warmstart
from warmstart.rendering import console
from warmstart.rendering.text import text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def plain(written: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", written)


def test_off_a_terminal_it_is_the_plain_text(capsys):
    report = warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2))
    report.show()
    assert capsys.readouterr().out == f"{report}\n"


def test_a_terminal_has_the_same_words_in_colour_and_a_bar(terminal, mixed_plan):
    report = mixed_plan.apply()
    console.show(report, terminal)
    written = terminal.getvalue()
    lines = plain(written).splitlines()
    assert lines[0] == report.verdict()
    assert lines[1].strip() == "━" * 60
    assert lines[2:] == text(report).splitlines()[1:]
    # the elements, by status: 92 loaded, 24 adapted, 4 filled, 10 of their own and 20 out of scope, of 150
    segments = re.findall(r"\x1b\[(\d+)m(━+)", written)
    assert [(colour, len(bar)) for colour, bar in segments] == [("34", 36), ("32", 10), ("35", 2), ("33", 4), ("2", 8)]


def test_no_name_is_cut_whatever_the_width(terminal):
    name = "x" * 150
    model = nn.ModuleDict({name: nn.Linear(2, 2)})
    console.show(warmstart.load(model, dict(model.state_dict())), terminal)
    assert f"{name}.{{bias,weight}}" in plain(terminal.getvalue()) or f"{name}.bias" in plain(terminal.getvalue())


def test_ten_thousand_keys_are_at_most_forty_lines_and_hostile_ones_write_no_escapes(terminal, hostile_report):
    console.show(hostile_report, terminal)
    lines = plain(terminal.getvalue()).splitlines()
    notes = sum(line.startswith("  note: ") for line in lines)
    assert len(lines) - notes <= 40
    assert "\x1b" not in plain(terminal.getvalue())
    assert "\\x1b[2J" in plain(terminal.getvalue())


def test_many_groups_end_in_one_line_that_counts_the_rest(terminal):
    model = nn.ModuleList(nn.Linear(i + 1, 1, bias=False) for i in range(100))
    console.show(warmstart.load(model, dict(model.state_dict())), terminal)
    lines = plain(terminal.getvalue()).splitlines()
    assert len(lines) == 40
    assert lines[-1] == "  ... and 63 more tensors in 63 groups"


def test_without_rich_a_terminal_has_the_plain_text(terminal, monkeypatch):
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    report = warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2))
    console.show(report, terminal)
    assert terminal.getvalue() == f"{report}\n"


def test_a_real_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as file:
        assert console.coloured(file)
        console.show(warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2)), file)
    assert b"\x1b[1;32mwarmstart: 2/2 tensors" in os.read(ours, 10_000)
    os.close(ours)
