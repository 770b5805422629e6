"""The page is one file that needs no network, says everything, and runs nothing but its own script."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import warmstart
from warmstart.mapping.grouping import printable
from warmstart.rendering.page import page


class Reader(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])

    @property
    def said(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def test_the_page_says_the_verdict_the_rules_the_notes_and_the_lineage(mixed_plan, tmp_path):
    report = mixed_plan.apply()
    path = report.to_html(tmp_path / "deep" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    read = Reader(path.read_text(encoding="utf-8"))
    assert report.verdict().removeprefix("warmstart: ") in read.said
    assert "loaded and verified" in read.said
    assert r"blocks\.(\d+) to encoder.layer.\1" in read.said
    assert all(note in read.said for note in report.notes)
    assert report.lineage["plan_sha256"] in read.said


def test_the_data_is_every_entry_and_every_unused_key(mixed_plan):
    data = Reader(page(mixed_plan)).data
    entries = data["entries"]
    assert entries["name"] == list(mixed_plan.targets.entries)
    at = entries["name"].index("position")
    assert data["statuses"][entries["status"][at]] == "adapted"
    assert entries["keys"][at] == ["net.position"]
    assert data["shapes"][entries["shape"][at]] == ["(6, 4)", 24]
    assert data["texts"][entries["how"][at]] == "strip_prefix, SliceOrPad from (3, 4)"
    assert [n for n, frozen in zip(entries["name"], entries["frozen"], strict=True) if frozen] == list(
        mixed_plan.freeze
    )
    assert data["unused"]["name"] == ["net.fc.weight", "net.steps", "temperature"]


def test_nothing_comes_from_anywhere(mixed_plan):
    text = page(mixed_plan)
    read = Reader(text)
    links = [value for _, attrs in read.elements for name, value in attrs.items() if name in ("src", "href", "action")]
    assert set(links) == {"data:,", "#tensors"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_hostile_names_are_text_and_nothing_else(hostile_report, mixed_plan):
    text = page(hostile_report.plan, hostile_report)
    text.encode("utf-8")
    read = Reader(text)
    plain = Reader(page(mixed_plan))
    assert len(read.scripts) == 2
    assert read.scripts[1] == plain.scripts[1]
    assert {tag for tag, _ in read.elements} <= {tag for tag, _ in plain.elements}
    assert not any(name.startswith("on") for _, attrs in read.elements for name in attrs)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert len(read.data["entries"]["name"]) == 10_000
    assert "<script>pwned=1</script>.0.gain" in read.data["entries"]["name"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6, unique=True))
def test_whatever_keys_are_called_the_page_has_them_and_its_own_two_scripts(names):
    state = {name: torch.zeros(1) for name in names} | {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
    plan = warmstart.plan(nn.Linear(1, 1), state, strip_prefix="", allow_unexpected="?*")
    read = Reader(page(plan))
    assert len(read.scripts) == 2
    left = [*plan.unexpected, *plan.ignored]
    assert read.data["unused"]["name"] == [printable(key) for key in left]
    assert read.data["unused"]["error"] == [0] * len(left)


def test_ten_thousand_tensors_are_less_than_three_megabytes():
    layers = nn.ModuleList(
        nn.ModuleDict({"attention_query": nn.Linear(2, 2), "attention_key": nn.Linear(2, 2)}) for _ in range(2500)
    )
    model = nn.ModuleDict({"text_model": nn.ModuleDict({"encoder": nn.ModuleDict({"layers": layers})})})
    state = {f"base.{k}".replace("attention", "self_attn"): v for k, v in model.state_dict().items()}
    plan = warmstart.plan(model, state, rename={"attention_query": "x"})
    text = page(plan)
    assert len(plan.targets.entries) == 10_000
    assert len(text.encode()) < 3_000_000


def test_a_failed_plan_has_its_errors_and_the_lines_to_copy(failed_plan, tmp_path):
    read = Reader(failed_plan.to_html(tmp_path / "plan.html").read_text())
    assert "does not fit" in read.said
    assert f"{len(failed_plan.errors)} errors, nothing was written" in read.said
    assert 'allow_missing=["head.bias"]' in read.said
    assert 'allow_mismatched=["head.weight"]' in read.said
    assert 'allow_unexpected=["net.fc"]' in read.said
    assert "exclude='othr' matches no model entry" in read.said
    assert sum("copy" in (attrs.get("class") or "") for _, attrs in read.elements) == 3


def test_the_line_to_copy_is_the_line_alone():
    plan = warmstart.plan(
        nn.ModuleDict({f"{c}{i}": nn.Linear(i + 1, 1) for i in range(10) for c in "ab"}),
        {f"a{i}.{leaf}": torch.ones(s) for i in range(10) for leaf, s in (("weight", (1, i + 1)), ("bias", (1,)))},
    )
    text = page(plan)
    (code,) = re.findall(r"<code tabindex=\"0\">(.*?)</code>", text)
    assert code.startswith("allow_missing=[")
    assert code.endswith("]")
    assert "<p>and 2 more patterns</p>" in text


def test_thousands_of_errors_are_a_few_and_a_count():
    model = nn.ModuleDict({f"m{i}": nn.Linear(1, 1, bias=False) for i in range(200)})
    state = {f"{p}.m{i}.weight": torch.ones(1, 1) for i in range(200) for p in "xy"}
    plan = warmstart.plan(model, state, rename={"x|y": ""})
    assert len(plan.errors) > 100
    read = Reader(page(plan))
    assert sum(tag == "article" for tag, _ in read.elements) == 25
    assert f"and {len(plan.errors) - 25} more of the same kinds" in read.said


@pytest.mark.parametrize(
    ("verify", "status", "word"),
    [
        ("full", "applied", "loaded and verified"), ("off", "applied", "not verified"), ("full", "failed", "failed"),
        ("full", "superseded-by-resume", "superseded by resume"),
    ],
)  # fmt: skip
def test_the_state_is_the_report_s(verify, status, word):
    report = warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2), verify=verify)
    report.status = status
    state = re.search(r'class="state \w+">(.*?)<', page(report.plan, report))
    assert state is not None
    assert state[1] == word


def test_long_and_deep_lineage_ends_somewhere():
    report = warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2))
    deep: dict[str, object] = {}
    for _ in range(900):
        deep = {"ancestor": deep, "<b>": [1]}
    report.lineage |= {"ancestors": [deep], "long": list(range(1000))}
    text = page(report.plan, report)
    assert len(text) < 200_000
    assert "... and 950 more" in text
    assert "<b>" not in text


def test_several_sources_have_their_rules_each():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    parts = [warmstart.Pretrained(nn.Linear(2, 2), into="a"), warmstart.Pretrained(nn.Linear(2, 2), into="b")]
    read = Reader(page(warmstart.plan(model, parts)))
    assert sum(tag == "h3" for tag, _ in read.elements) == 2
    assert read.data["several"]


def test_secrets_of_a_url_are_not_in_the_page():
    import fsspec

    url = "memory://user:hunter2@bucket/model.pt?token=hunter3"
    with fsspec.open(url, "wb") as file:
        torch.save(nn.Linear(2, 2).state_dict(), file)
    report = warmstart.load(nn.Linear(2, 2), url)
    assert "hunter" not in page(report.plan, report)


def test_without_jinja2_the_line_to_install_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'warmstart\[html\]'"):
        warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2)).to_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    report = warmstart.load(nn.Linear(2, 2), nn.Linear(2, 2))
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space left"):
        report.to_html(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
