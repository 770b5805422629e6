"""What an error says: everything at once, grouped, with both shapes, and with a line that works when it is typed."""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import named
import pytest
import torch
from named import Shapes
from torch import nn

import warmstart
from warmstart import MappingError, Pretrained, WarmStartError
from warmstart.errors import CheckpointError, FrozenChangedError, TimingError, VerificationError

LINE = re.compile(r'\w+=\[(?:"(?:[^"\\]|\\.)*"(?:, )?)*\]')


Header = functools.partial(named.Header, location="bert.pt")


class Net(nn.Module):
    """A module tree with one parameter per name."""

    def __init__(self, names: Shapes | Iterable[str], dtype: torch.dtype = torch.float32):
        super().__init__()
        named.grow(self, names, dtype)


def lines_to_type(text: str) -> dict[str, Any]:
    """What a person would copy out of the message, evaluated."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.lstrip().startswith("->"):
            for match in LINE.findall(line):
                found |= eval(f"dict({match})")
    return found


# ---- the words ----


def test_everything_that_is_wrong_is_said_at_once_grouped_and_with_shapes():
    entries = {f"encoder.{i}.{m}.weight": (4, 4) for i in range(12) for m in ("query", "key", "value")}
    entries |= {"head.weight": (2, 4), "head.bias": (2,), "pooler.w": (4, 4), "pooler.b": (4,)}
    keys = {
        name: shape for name, shape in entries.items() if not name.startswith("encoder.7.") and "pooler" not in name
    }
    keys |= {
        "head.weight": (9, 4),
        "head.bias": (9,),
        "cls.predictions.0.w": (4,),
        "cls.predictions.1.w": (4,),
        "step": (),
    }
    plan = warmstart.plan(Net(entries), Header(keys), allow_missing="poolr", rename={"gamma": "weight"})
    with pytest.raises(MappingError) as error:
        plan.apply()
    assert (
        str(error.value).replace("; leave it out, or start it with '?' if it may match nothing", " ...")
        == """\
bert.pt does not fit Net: 5 errors, nothing was written

unused: rename rule 'gamma' matches no checkpoint key in whole segments ...

unused: allow_missing='poolr' matches no model entry (did you mean 'pooler' or 'pooler.w' or 'pooler.b'?) ...

missing: 5 model entries without a key in the checkpoint
    encoder.7.{key,query,value}.weight  (4, 4)  x3
    pooler.w  (4, 4)
    pooler.b  (4,)
  -> to let them keep their own initialisation: allow_missing=["encoder.7", "pooler"]

mismatched: 2 entries of another shape
    head.bias  checkpoint (9,), model (2,)
    head.weight  checkpoint (9, 4), model (2, 4)
  -> to let them keep their own initialisation: allow_mismatched=["head"]

unexpected: 3 keys of bert.pt fit nothing in the model
    cls.predictions.{0,1}.w  (4,)  x2
    step  ()
  -> to leave them unused: allow_unexpected=["cls", "step"]"""
    )


def test_nothing_matched_shows_both_sides_and_no_list_of_all_names():
    plan = warmstart.plan(Net(["conv.w", "conv.b"]), Header({"layer.kernel": (3,), "layer.offset": (4,)}))
    assert (
        plan.explain()
        == """\
bert.pt does not fit Net: 1 error, nothing was written

nothing matched: none of the 2 keys fits any of the 2 model entries in scope
  the checkpoint has keys such as
    layer.kernel  (3,)
    layer.offset  (4,)
  the model has entries such as
    conv.w  (2,)
    conv.b  (2,)
  -> rename={regex: replacement} maps the first onto the second, if it is the right file at all;
     print(warmstart.suggest(model, source)), or `warmstart suggest SOURCE --model ...`, infers such rules"""
    )


@pytest.mark.parametrize(("foreign", "offered"), [(("x.c", "x.d"), True), (("x.c",), False), ((), False)])
def test_where_most_of_both_sides_is_left_the_way_to_infer_rules_is_offered(foreign, offered):
    """One name in three fits: another codebase's file. Half of them fit, or one side is a part of the other: not so."""
    entries = ["norm", "layers.a", "layers.b"]
    keys = ["norm", *foreign, *entries[1 : 3 - len(foreign)]]
    text = warmstart.plan(Net(entries), Header(keys)).explain()
    assert ("by other names, rename= maps them;" in text) == offered
    assert ("`warmstart suggest SOURCE --model ...`" in text) == offered
    part = warmstart.plan(Net(["norm"]), Header(["norm", "x.a", "x.b", "x.c"])).explain()
    assert "suggest" not in part


def test_fv_7_missing_names_are_grouped():
    entries = ["a.weight", "a.bias", "b.c.weight", "d", "e"]
    message = warmstart.plan(Net(entries), Header(["e"])).errors[0].message
    assert {line.split("  ")[2] for line in message.splitlines()[1:-1]} == {"a.{bias,weight}", "b.c.weight", "d"}


def test_bv_4_each_side_is_told_from_the_other():
    text = warmstart.plan(Net(["a", "mine"]), Header(["a", "theirs"])).explain()
    assert "missing: 1 model entry without a key in the checkpoint\n    mine  (2,)\n" in text
    assert "unexpected: 1 key of bert.pt fits nothing in the model\n    theirs  (2,)\n" in text


def test_every_source_is_named():
    plan = warmstart.plan(Net(["a", "b"]), [Header(["a"]), {"b": torch.zeros(2), "c": torch.zeros(2)}])
    assert plan.explain().startswith("bert.pt, a state dict in memory does not fit Net: 1 error, nothing was written")
    assert "1 key of a state dict in memory fits nothing in the model" in plan.explain()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"into": "encoderr"}, "into='encoderr' is no module of the model (did you mean 'encoder'"),
        ({"into": "encoder.att"}, "did you mean 'encoder.attn'"),
        ({"exclude": "encoder.atn"}, "exclude='encoder.atn' matches no model entry (did you mean 'encoder.attn'"),
        ({"freeze": "hed.*"}, "freeze='hed.*' matches no model entry (did you mean 'head'"),
        ({"select": "module.encoderr"}, "select='module.encoderr' matches no checkpoint key"),
        ({"allow_unexpected": "haed"}, "allow_unexpected='haed' matches no checkpoint key (did you mean 'head'"),
        ({"strip_prefix": "encdoer"}, "is the leading path of no checkpoint key (did you mean 'encoder'"),
        ({"rename": {r"^encdoer\.": ""}}, "matches no checkpoint key in whole segments (did you mean 'encoder'"),
    ],
)  # fmt: skip
def test_a_typo_is_answered_with_what_was_meant(fields, message):
    names = ["encoder.attn.w", "head.w"]
    text = warmstart.plan(Net(names), Header(names), **fields).explain()
    assert message in text


def test_hostile_names_do_not_reach_the_terminal():
    keys = ["a", "\x1b[2J\x1b]0;owned\x07", "line\nbreak.w", "bidi\u202e.w", "x" * 100_000, "nul\0"]
    text = warmstart.plan(Net(["a", "b"]), Header(keys)).explain()
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert len(text) < 4000


# ---- what is typed works ----


@pytest.mark.parametrize(
    ("entries", "keys", "fields"),
    [
        (["a", "head.w", "head.b"], ["a"], {}),
        (["a"], ["a", "old.x", "old.y"], {}),
        ({"a": (2,), "head.w": (3,)}, {"a": (2,), "head.w": (4,)}, {}),
        ({"a": (2,), "head.w": (3,), "new.w": (3,)}, {"a": (2,), "head.w": (4,), "old": (2,)}, {}),
        (["enc.a", "enc.b", "out.a"], ["a", "zz"], {"into": "enc"}),
        ([f"l.{i}.{n}" for i in range(20) for n in ("w", "lora.a", "lora.b")], [f"l.{i}.w" for i in range(20)], {}),
        (
            [f"l.{i}.{n}" for i in range(5) for n in ("w", "v")],
            [f"l.{i}.{n}" for i in range(4) for n in ("w", "u")],
            {},
        ),
        (["a", "a2", "b", "b2.c", "b2.d"], ["a", "b2.c"], {}),
        (["a"], ["module.a", "module.old.w", "_orig_mod.old.v"], {}),
        (["a"], ["a", "x[0].w", "?y", "z*", 'quo"te', "back\\slash", "tab\t", "uni\u202ecode", "é"], {}),
        (["a"], ["a", "x" * 5000, "\ud800"], {}),
        (["a"], ["a", "a.b", "a.c"], {}),
    ],
)
def test_the_suggested_patterns_make_it_work_when_typed(entries, keys, fields):
    model = Net(entries)
    plan = warmstart.plan(model, Header(keys), **fields)
    assert plan.errors
    typed = lines_to_type(plan.explain())
    assert set(typed) == {f"allow_{problem.kind}" for problem in plan.errors}
    again = warmstart.plan(model, Header(keys), **fields, **typed)
    assert again.errors == ()
    assert again.mapping == plan.mapping
    assert (again.missing, again.unexpected, again.mismatched) == (plan.missing, plan.unexpected, plan.mismatched)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m), backend="eager")]
)
def test_the_suggested_line_loads_into_wrapped_models_too(wrap, fingerprint):
    model = wrap(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5)))
    source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 9))
    before = fingerprint(model)
    with pytest.raises(MappingError) as error:
        warmstart.load(model, source.state_dict())
    assert fingerprint(model) == before
    typed = lines_to_type(str(error.value))
    assert typed == {"allow_missing": ["2"], "allow_mismatched": ["1"]}
    report = warmstart.load(model, source.state_dict(), **typed)
    assert any(torch.equal(tensor, source[0].weight) for tensor in model.parameters())
    assert len(report.mapping) == 2


def test_the_line_for_dtypes_works_when_typed():
    model = Net(["a.x", "a.y", "b"])
    source = {"a.x": torch.zeros(2, dtype=torch.int64), "a.y": torch.zeros(2, dtype=torch.int64), "b": torch.ones(2)}
    plan = warmstart.plan(model, source)
    assert plan.explain().splitlines()[2:] == [
        "dtype: int64 in the checkpoint cannot become float32 without another meaning:",
        "    a.{x,y}    x2",
        '  -> leave them out, exclude=["a"], or cast the source to float32 first',
    ]
    assert warmstart.plan(model, source, **lines_to_type(plan.explain())).errors == ()


def test_the_line_for_narrowing_works_when_typed():
    plan = warmstart.plan(Net(["a"], torch.bfloat16), Header(["a"]), allow_narrowing=False)
    assert plan.explain().endswith("  -> allow_narrowing=True, or build the model in the checkpoint's dtype")
    assert warmstart.plan(Net(["a"], torch.bfloat16), Header(["a"]), allow_narrowing=True).errors == ()


@pytest.mark.parametrize(
    ("entries", "keys", "fields"),
    [
        (["s.w", "t.w"], ["x.w"], {}),
        (["s.w", "t.w"], ["w"], {}),
        (["m.s.w", "m.t.w"], ["x.w"], {"into": "m"}),
        (["w", "v"], ["x.w", "x.v", "y.w", "y.v"], {"allow_unexpected": "y"}),
    ],
)
def test_the_line_for_an_ambiguous_prefix_works_when_typed(entries, keys, fields):
    plan = warmstart.plan(Net(entries), Header(keys), **fields)
    assert [problem.kind for problem in plan.errors] == ["ambiguous"]
    line = plan.explain().rpartition("for the first of them: ")[2]
    assert warmstart.plan(Net(entries), Header(keys), **(fields | eval(f"dict({line})"))).errors == ()


def test_the_line_for_two_sources_works_when_typed():
    model, sources = (
        Net([f"a.{i}" for i in range(5)] + ["b"]),
        [Header([f"a.{i}" for i in range(5)]), Header(["a.3", "a.4", "b"])],
    )
    plan = warmstart.plan(model, sources)
    assert plan.explain().splitlines()[2:] == [
        "overlap: 2 entries are given by two sources, bert.pt and bert.pt",
        "    a.{3,4}  (2,)  x2",
        '  -> leave them to one of the two: Pretrained(..., exclude=["a.3", "a.4"]), or give each its own into=',
    ]
    typed = lines_to_type(plan.explain())
    for chosen in (0, 1):
        parts = [Pretrained(source, **(typed if i == chosen else {})) for i, source in enumerate(sources)]
        assert warmstart.plan(model, parts).errors == ()


def test_the_hint_of_a_better_prefix_works_when_followed():
    keys = ["foo.a", "foo.b"]
    plan = warmstart.plan(Net(["a", "b"]), Header(keys), strip_prefix="")
    assert "leave strip_prefix= out: strip 'foo' is inferred then, and 2 of 2 keys match" in plan.explain()
    assert warmstart.plan(Net(["a", "b"]), Header(keys)).errors == ()


# ---- many keys ----


def many(count: int, prefix: str = "") -> list[str]:
    modules = ("attn", "mlp", "query", "key", "value")
    return [f"{prefix}layers.{i}.{m}.{p}" for i in range(count // 10) for m in modules for p in ("weight", "bias")]


TEN_THOUSAND = 10_000
NAMES = many(TEN_THOUSAND)


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        pytest.param(NAMES[::3] + [f"{key}x" for key in NAMES[1::3]], {}, id="holes-everywhere"),
        pytest.param([f"{key}x" for key in NAMES[:-2]] + NAMES[-2:], {}, id="missing-and-unexpected"),
        pytest.param({key: (2 + i % 3,) for i, key in enumerate(NAMES)}, {}, id="mismatched"),
        pytest.param(NAMES, {"rename": {r"layers\.\d+": "layers.0"}}, id="collisions"),
        pytest.param([f"a{i}.b{i}" for i in range(TEN_THOUSAND)] + NAMES[:1], {}, id="no-two-names-alike"),
        pytest.param([f"x.{key}" for key in NAMES] + [f"y.{key}" for key in NAMES], {}, id="ambiguous"),
        pytest.param([f"q.{key}.v" for key in NAMES], {"strip_prefix": ""}, id="nothing-matched"),
        pytest.param(NAMES, {"allow_missing": [f"typo{i}" for i in range(200)]}, id="typos"),
        pytest.param(NAMES, {"rename": {f"typo{i}": "a" for i in range(200)}}, id="rules-of-another-file"),
    ],
)
def test_an_error_of_ten_thousand_keys_is_a_page(keys, fields):
    started = time.perf_counter()
    plan = warmstart.plan(Net(NAMES), Header(keys), **fields)
    text = plan.explain()
    print(f"{time.perf_counter() - started:.2f} s, {len(text.splitlines())} lines")
    assert plan.errors
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 700
    assert len(text) < 10_000


def test_ten_thousand_names_given_twice_are_one_error():
    plan = warmstart.plan(Net(NAMES), [Header(NAMES), Header(NAMES)])
    assert [problem.kind for problem in plan.errors] == ["overlap"]
    assert len(plan.errors[0].names) == len(plan.unexpected) == TEN_THOUSAND
    assert len(plan.explain().splitlines()) <= 10


def test_what_is_not_shown_is_counted_and_kept_in_the_plan():
    plan = warmstart.plan(Net(["a"]), Header([f"x{i}" for i in range(30)]), rename={r"x\d+": "a"})
    assert len(plan.errors) == 29
    assert len(plan.unexpected) == 29
    assert plan.explain().endswith("collision: ... and 25 more; plan.errors has them all")


def calls(function: Callable[[], object]) -> int:
    """How many Python and C functions are called: the cost without the clock."""
    count = 0

    def counted(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("kind", "counts"), [("fits", (10_000, 40_000)), ("does-not", (2_500, 10_000))])
def test_planning_is_linear_in_the_number_of_keys(kind, counts):
    cost, seconds = [], []
    for count in counts:
        names = many(count)
        keys = many(count, "foo.") if kind == "fits" else names[::2] + [f"{key}x" for key in names[1::2]]
        model, source = Net(names), Header(keys)
        cost.append(calls(lambda model=model, source=source: warmstart.plan(model, source).explain()))
        started = time.perf_counter()
        plan = warmstart.plan(model, source)
        seconds.append(time.perf_counter() - started)
        assert (plan.errors == ()) == (kind == "fits")
        assert plan.coverage == (1 if kind == "fits" else 0.5)
    print(f"{kind}: {cost} calls, {seconds[0]:.2f} and {seconds[1]:.2f} s for {counts} keys")
    assert cost[1] < 4.5 * cost[0]


# ---- the types ----


def test_every_error_is_a_warm_start_error_with_the_objects_to_act_on_it():
    assert issubclass(WarmStartError, ValueError)
    for error in (
        CheckpointError("x"),
        MappingError("x"),
        VerificationError("x"),
        FrozenChangedError("x"),
        TimingError("x"),
    ):
        assert isinstance(error, WarmStartError)
        assert str(error) == "x"
    assert CheckpointError("x", written=("a",)).written == ("a",)
    assert CheckpointError("x").written == VerificationError("x").tensors == FrozenChangedError("x").tensors == ()
    assert MappingError("x").plan is None
    plan = warmstart.plan(Net(["a"]), Header(["b"]))
    assert MappingError("x", plan=plan).plan is plan


def test_each_problem_names_what_it_is_about():
    plan = warmstart.plan(
        Net({"a": (2,), "b": (3,), "c": (1,)}), Header({"a": (2,), "b": (4,), "d": (1,)}), freeze="?q"
    )
    assert [(p.kind, p.names) for p in plan.errors] == [
        ("missing", ("c",)),
        ("mismatched", ("b",)),
        ("unexpected", ("d",)),
    ]
    assert [str(p) for p in plan.errors] == [p.message for p in plan.errors]
