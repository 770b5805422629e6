"""Each command as a new user types it: one clear message, the right exit code, never a traceback."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import warmstart
from warmstart.cli.options import FIELDS, as_options
from warmstart.cli.parsing import COMMANDS

PLAN = ("plan", "source.safetensors", "--model", "source.safetensors")


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ((), 2, "name a command: inspect, plan, diff, convert, check, lineage"),
    (("plann",), 2, "'plann' is no command; did you mean plan?"),
    (("inspect",), 2, "SOURCE is missing; see warmstart inspect --help"),
    (("inspect", "nothere.pt"), 3, "nothere.pt: there is no such file"),
    (("inspect", "sorce.safetensors"), 3, "did you mean 'source.safetensors'?"),
    (("inspect", "empty"), 3, "the file is empty"),
    (("inspect", "text"), 3, "a text file that starts with 'hello'"),
    (("lineage", "nothere.pt"), 3, "there is no such file"),
    (("plan", "source.safetensors"), 2, "--model is missing"),
    (("plan", "source.safetensors", "--model", "nothere.pt"), 3, "there is no such file"),
    ((*PLAN, "--intoo", "x"), 2, "'--intoo' is no option of plan; did you mean --into?"),
    ((*PLAN, "--renam", "{a: b}"), 2, "'--renam' is no option of plan; did you mean --rename?"),
    ((*PLAN, "--allow_mis", "x"), 2, "'--allow_mis' is no option of plan; did you mean --allow_missing or --allow_mismatched?"),
    ((*PLAN, "--match", "sufix"), 2, "--match: 'sufix' should be 'prefix', 'suffix'"),
    ((*PLAN, "--min_coverage", "much"), 2, "--min_coverage: 'much' should be a number or null"),
    ((*PLAN, "--min_coverage", "7"), 2, "a share between 0 and 1"),
    ((*PLAN, "--rename", "[1"), 2, "--rename: '[1' should be a mapping ({name: value}) or a list ([...])"),
    ((*PLAN, "--adapt", "{head: {resize: 1}}"), 2, "'resize' is none of"),
    ((*PLAN, "--adapt", "3"), 2, "--adapt: '3' should be a mapping"),
    ((*PLAN, "--convert", "{sources: a, targets: b}"), 2, "should be a list"),
    ((*PLAN, "--config", "source.safetensors"), 2, "codec can't decode"),
    ((*PLAN, "--convert", "[{sources: a}]"), 2, "sources and targets are both needed"),
    ((*PLAN, "--config", "typo.yaml"), 2, "the file of --config: 'intoo' is no option of plan; did you mean into?"),
    ((*PLAN, "--config", "broken.yaml"), 2, "broken.yaml: is no YAML: while parsing a flow node"),
    ((*PLAN, "--config", "empty"), 2, "empty: is empty; write options into it, such as into: encoder"),
    ((*PLAN, "--config", "list.yaml"), 2, "list.yaml: holds a list where options should be, such as into: encoder"),
    ((*PLAN, "--config", "nothere.yaml"), 2, "--config: File does not exist"),
    ((*PLAN, "--config"), 2, "expected one argument"),
    (("inspect", "source.safetensors", "--sha256", "00" * 32), 3, "its SHA-256 is"),
    ((*PLAN, "--lock", "nowhere/l.yaml"), 3, "there is no folder nowhere to write into"),
    ((*PLAN, "--lock", "source.safetensors/l.yaml"), 3, "there is no folder source.safetensors"),
    (("diff", "source.safetensors"), 2, "B is missing"),
    (("diff", "source.safetensors", "nothere.pt"), 3, "there is no such file"),
    (("check", "source.safetensors"), 2, "SOURCE is missing"),
    (("check",), 2, "MODEL-CHECKPOINT and SOURCE are missing"),
    (("convert", "source.safetensors"), 2, "OUT is missing"),
    (("convert", "source.safetensors", "out"), 2, "say what to write"),
    (("convert", "source.safetensors", "out.safetensors", "--dtype", "int8"), 2, "a floating dtype of torch"),
    (("convert", "source.safetensors", "out", "--format", "sharded", "--max_shard_size", "big"), 2, "write it as 5GB"),
    (("convert", "source.safetensors", "nowhere/out.safetensors"), 3, "there is no folder nowhere to write into"),
    (("convert", "source.safetensors", "text/out.safetensors"), 3, "there is no folder text to write into"),
    (("convert", "source.safetensors", "out.safetensors", "--into", "x"), 2, "'--into' is no option of convert"),
])  # fmt: skip
def test_what_goes_wrong_is_said_once_and_clearly(run, source, tmp_path, arguments, code, words):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "typo.yaml").write_text("intoo: encoder\n")
    (tmp_path / "list.yaml").write_text("- encoder\n")
    (tmp_path / "broken.yaml").write_text("into: [\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    ran = run(*arguments)
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("warmstart: ")
    assert words in ran.err
    if arguments and arguments[0] in COMMANDS:
        in_json = run(*arguments, "--json")
        assert in_json.code == code
        assert in_json.data["error"]["message"] == ran.err.removeprefix("warmstart: ").removesuffix("\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_names_the_options_and_the_exit_codes(run, command):
    ran = run(*([command] if command else []), "--help")
    assert ran.code == 0
    assert "exit codes: 0" in ran.out
    assert all(name in ran.out for name in COMMANDS) if command is None else "--json" in ran.out


def test_json_before_the_command_is_told_its_place(run):
    ran = run("--json", "inspect", "source.safetensors")
    assert ran.code == 2
    assert ran.err == "warmstart: --json comes after the command: warmstart inspect SOURCE --json\n"


def test_the_version(run):
    assert run("--version").out == f"warmstart {warmstart.__version__}\n"


def test_every_field_of_pretrained_is_an_option_of_plan(run):
    text = run("plan", "--help").out
    assert all(f"--{name}" in text for name in FIELDS)


def test_escapes_in_names_do_not_reach_the_terminal(run, tmp_path):
    evil = "a\x1b[2Jb\nc\x9b31m\u202e"
    save_file({evil: torch.ones(2), "x": torch.ones(1)}, tmp_path / "evil.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for arguments in (
        ("inspect", "evil.safetensors"),
        ("diff", "evil.safetensors", "plain.safetensors"),
        ("plan", "evil.safetensors", "--model", "plain.safetensors"),
        ("convert", "evil.safetensors", "out.safetensors", "--select", evil, "--rename", '{"nothing": "x"}'),
        ("inspect", tmp_path / f"{evil}.pt"),
        ("inspect", "evil.safetensors", "--json"),
    ):
        ran = run(*arguments)
        text = ran.out + ran.err
        assert not {"\x1b", "\x9b", "\u202e"} & set(text), arguments
    assert any(
        tensor["key"] == evil for tensor in json.loads(run("inspect", "evil.safetensors", "--json").out)["tensors"]
    )


def test_completion_is_a_script_with_all_commands(run):
    pytest.importorskip("shtab")
    ran = run("--print_completion", "shtab-bash")
    assert ran.code == 0
    assert "--allow_missing" in ran.out
    assert all(name in ran.out for name in COMMANDS)


WORDS = st.one_of(
    st.text(max_size=12),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["sources", "targets", "ops", "concat", "split", "dim", "a.{i}", "*"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=6,
    ).map(json.dumps),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FIELDS), value=WORDS)
def test_whatever_a_field_is_given_there_is_an_answer_or_one_message(run, source, name, value):
    assume(name != "trust_pickle")
    ran = run(*PLAN, f"--{name}={value}")
    assert ran.code in (0, 1, 2, 3)
    assert bool(ran.out) != bool(ran.err)


@pytest.mark.parametrize(("arguments", "option"), [
    (("plan", "source.safetensors", "--model", "two.pt"), "--model_checkpoint_key"),
    (("suggest", "source.safetensors", "--model", "two.pt"), "--model_checkpoint_key"),
    (("check", "two.pt", "source.safetensors"), "--model_checkpoint_key"),
    (("diff", "source.safetensors", "two.pt"), "--other_checkpoint_key"),
])  # fmt: skip
def test_trees_of_the_second_checkpoint_are_told_with_the_option_that_takes_them(run, source, state, arguments, option):
    torch.save({"model": state, "ema": state}, source.parent / "two.pt")
    ran = run(*arguments)
    assert ran.code == 3
    assert f'  {option} "model"  (18 tensors' in ran.err
    assert f'  {option} "ema"  (18 tensors' in ran.err
    assert "\n  checkpoint_key=" not in ran.err


def test_what_the_core_advises_is_said_as_it_is_typed_here(run, source, state):
    torch.save({"model": state, "ema": state}, source.parent / "two.pt")
    assert "\n  --checkpoint_key model  (18 tensors" in run("plan", "two.pt", "--model", source).err
    name = next(iter(state))
    save_file({k: v for k, v in state.items() if k != name}, source.parent / "less.safetensors")
    advised = re.search(r"--allow_missing (.*)", run("plan", "less.safetensors", "--model", source).out)
    assert run("plan", "less.safetensors", "--model", source, "--allow_missing", *shlex.split(advised[1])).code == 0


@pytest.mark.parametrize(("said", "typed"), [
    ('  -> allow_missing=["a.b", "it\'s"]', """  -> --allow_missing '["a.b", "it'"'"'s"]'"""),
    ("trust_pickle=True", "--trust_pickle true"),
    ("freeze='encoder'", "--freeze encoder"),
    ('rename={"^": "x."}', """--rename '{"^": "x."}'"""),
    ('warmstart.load(model, into="a")', 'warmstart.load(model, into="a")'),
    ("revision=...", "revision=..."),
])  # fmt: skip
def test_fields_are_options(said, typed):
    assert as_options(said) == typed


def test_one_pattern_needs_no_list_anywhere(run, source):
    for option in ("--select", "--include", "--accept"):
        ran = run("suggest", source, "--model", source, option, "encoder")
        assert "should be a list" not in ran.err, option
