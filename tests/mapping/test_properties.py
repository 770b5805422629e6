"""What holds of every plan, whatever the names."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

import named
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from named import Header
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import warmstart
from warmstart import Pretrained
from warmstart.mapping.model.names import WRAPPER_SEGMENTS, without_wrappers
from warmstart.mapping.planning.renames import Renamer

Shapes = dict[str, tuple[int, ...]]
hundreds = settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def net(shapes: Mapping[str, tuple[int, ...]], ties: Iterable[tuple[str, str]] = ()) -> nn.Module:
    """A module tree with one parameter per name; of a tie, the second name is the first one's tensor."""
    root = named.net(shapes)
    for one, second in ties:
        path, _, leaf = second.rpartition(".")
        setattr(root.get_submodule(path), leaf, root.get_parameter(one))
    return root


# Modules are a, b, enc, 0, 1, module; leaves w, v, bias: no name is a path of another.
MODULE = st.sampled_from(["a", "b", "enc", "0", "1"])
PATH = st.lists(MODULE, min_size=0, max_size=3)
NAME = st.tuples(PATH, st.sampled_from(["w", "v", "bias"])).map(lambda t: ".".join([*t[0], t[1]]))
SHAPE = st.sampled_from([(), (2,), (3,), (2, 3)])
ENTRIES = st.dictionaries(NAME, SHAPE, min_size=1, max_size=8)
KEYS = st.dictionaries(
    st.tuples(st.sampled_from(["", "module.", "_orig_mod.", "x.", "enc."]), NAME).map("".join),
    SHAPE,
    min_size=1,
    max_size=8,
)
PATTERNS = st.lists(st.sampled_from(["?a", "?*.w", "?enc", "?*", "?b.*", "?0"]), max_size=2)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "select": PATTERNS,
        "strip_prefix": st.sampled_from([None, "", "?x", "?enc", "a"]),
        "into": st.sampled_from(["", "enc", "a"]),
        "include": PATTERNS,
        "exclude": PATTERNS,
        "rename": st.sampled_from(
            [{}, {"?a": "b"}, {"?a": "b", "?b": "a"}, [{"?x": "enc"}, {"?enc": "a"}], {"?^": "enc."}]
        ),
        "allow_missing": PATTERNS,
        "allow_unexpected": PATTERNS,
        "allow_mismatched": PATTERNS,
        "freeze": st.booleans(),
    },
)


def buckets(plan) -> tuple[Counter, Counter]:
    """How often each entry and each (part, key) is in a bucket."""
    entries = Counter([a.target for a in plan.assignments])
    entries.update([*plan.missing, *plan.mismatched, *plan.excluded])
    several = len(plan.parts) > 1
    keys = Counter((a.part, key) for a in plan.assignments for key in a.sources)
    keys.update(key if several else (0, key) for key in (*plan.unexpected, *plan.ignored))
    return entries, keys


@hundreds
@given(ENTRIES, KEYS, FIELDS)
def test_the_buckets_partition_both_sides(entries, keys, fields):
    plan = warmstart.plan(net(entries), Header(keys), **fields)
    in_entries, in_keys = buckets(plan)
    in_keys.update((0, key) for mismatch in plan.mismatched.values() for key in mismatch.keys)
    assert in_entries == Counter(list(entries))  # every entry once
    assert in_keys == Counter((0, key) for key in keys)  # every key once
    assert 0 <= plan.coverage <= 1
    assert plan.mapping.keys() == {a.target for a in plan.assignments}
    assert set(plan.freeze) == (set(plan.mapping) if fields.get("freeze") else set())


@hundreds
@given(ENTRIES, KEYS, KEYS, FIELDS, FIELDS)
def test_the_buckets_of_two_sources_partition_both_sides(entries, keys, others, fields, other_fields):
    parts = [Pretrained(Header(keys), **fields), Pretrained(Header(others), **other_fields)]
    plan = warmstart.plan(net(entries), parts)
    in_entries, in_keys = buckets(plan)
    assert in_entries == Counter(list(entries))
    mismatched = Counter(key for mismatch in plan.mismatched.values() for key in mismatch.keys)
    left = Counter([(0, k) for k in keys] + [(1, k) for k in others])
    left.subtract(in_keys)
    assert min(left.values()) >= 0  # no key twice
    assert +Counter(key for _, key in left.elements()) == mismatched  # and the rest are the mismatched ones


@hundreds
@given(ENTRIES, KEYS, FIELDS)
def test_a_plan_is_deterministic_and_independent_of_the_order_of_keys(entries, keys, fields):
    plan = warmstart.plan(net(entries), Header(keys), **fields)
    for order in (keys.items(), reversed(keys.items()), sorted(keys.items())):
        twin = warmstart.plan(net(entries), Header(dict(order)), **fields)
        assert twin.to_dict() == plan.to_dict()
        assert twin.digest() == plan.digest()
        assert twin.explain() == plan.explain()


@hundreds
@given(ENTRIES, KEYS, FIELDS)
def test_a_plan_is_injective_and_shapes_fit(entries, keys, fields):
    plan = warmstart.plan(net(entries), Header(keys), **fields)
    used = [key for a in plan.assignments for key in a.sources]
    assert len(used) == len(set(used))
    for a in plan.assignments:
        assert keys[a.sources[0]] == entries[a.target] == a.shape
    for name, mismatch in plan.mismatched.items():
        assert keys[mismatch.keys[0]] == mismatch.checkpoint_shape != mismatch.model_shape == entries[name]


@hundreds
@given(ENTRIES, st.data())
def test_ties_are_given_once_and_never_missing_beside_their_value(entries, data):
    by_shape = [(a, b) for a, b in itertools.combinations(entries, 2) if entries[a] == entries[b] and entries[a]]
    ties = data.draw(st.lists(st.sampled_from(by_shape), max_size=1)) if by_shape else []
    keys = data.draw(st.sets(st.sampled_from(sorted(entries)), min_size=1))
    model = net(entries, ties)
    plan = warmstart.plan(model, Header({key: entries[key] for key in keys}), allow_missing="*", strip_prefix="")
    in_entries, in_keys = buckets(plan)
    assert plan.errors == ()
    assert (in_entries, in_keys) == (Counter(list(entries)), Counter((0, key) for key in keys))
    for one, two in ties:
        assert (one in plan.mapping) == (two in plan.mapping) == bool({one, two} & keys)
        assert (one in plan.missing) == (two in plan.missing) == (not {one, two} & keys)
    tensors = {id(p): p.numel() for p in model.parameters()}
    loaded = {id(model.get_parameter(name)) for name in plan.mapping}
    assert plan.coverage == sum(n for i, n in tensors.items() if i in loaded) / sum(tensors.values())


@hundreds
@given(ENTRIES, KEYS, FIELDS)
def test_planning_a_renamed_checkpoint_without_the_rules_gives_the_same_mapping(entries, keys, fields):
    fields = {name: value for name, value in fields.items() if name in ("rename", "strip_prefix", "into", "exclude")}
    plan = warmstart.plan(net(entries), Header(keys), **fields)
    if not plan.mapping or any(problem.kind in ("collision", "into", "unused") for problem in plan.errors):
        return
    name_of = {a.sources[0]: a.target for a in plan.assignments}
    # The file as the rules would have it: every key that was used has the name of its entry, the others are left out.
    clean = {name_of[key]: shape for key, shape in keys.items() if key in name_of}
    again = warmstart.plan(net(entries), Header(clean), exclude=fields.get("exclude", ()))
    assert again.mapping == {target: (target,) for target in plan.mapping}
    assert again.prefix is None
    under = warmstart.plan(net(entries), Header(clean), into=fields.get("into", ""))
    assert under.mapping.keys() >= plan.mapping.keys()


@hundreds
@given(ENTRIES, st.data())
def test_a_whole_checkpoint_under_any_prefix_loads_by_inference(entries, data):
    prefix = data.draw(
        st.lists(st.sampled_from(["p", "bert", "q9", "model", "state"]), min_size=1, max_size=3).map(".".join)
    )
    keys = {f"{prefix}.{name}": shape for name, shape in entries.items()}
    plan = warmstart.plan(net(entries), Header(keys))
    assert plan.errors == ()
    assert plan.mapping == {name: (f"{prefix}.{name}",) for name in entries}
    assert plan.coverage == 1
    deeper = warmstart.plan(net({f"{prefix}.{name}": shape for name, shape in entries.items()}), Header(entries))
    assert deeper.errors == ()
    assert deeper.mapping == {f"{prefix}.{name}": (name,) for name in entries}


KEY = st.lists(st.sampled_from(["a", "b", "ab", "q", "layers", "0", "11", "weight"]), min_size=1, max_size=5).map(
    ".".join
)
RULES = st.dictionaries(
    st.sampled_from(["a", "b", "ab|a", r"layers\.(\d+)", "^", r"\.weight$", r"(q)\.(\w+)", r"^a\.", r"\d+"]),
    st.sampled_from(["x", "y.z", "m.", ".w", ""]),
    max_size=3,
)


@hundreds
@given(KEY, RULES, st.data())
def test_renames_commute_with_wrappers(key, rules, data):
    try:
        renamed = Renamer([rules])(key)
    except warmstart.MappingError:  # nothing would be left
        return
    segments = key.split(".")
    places = data.draw(
        st.lists(st.tuples(st.integers(0, len(segments) - 1), st.sampled_from(sorted(WRAPPER_SEGMENTS))), max_size=4)
    )
    for place, wrapper in places:
        segments.insert(place, wrapper)
    wrapped = ".".join(segments)
    assert Renamer([rules])(without_wrappers(wrapped, WRAPPER_SEGMENTS)) == renamed
    optional = {f"?{rule}": text for rule, text in rules.items()}
    plan = warmstart.plan(net({renamed: (2,)}), Header({wrapped: (2,)}), rename=optional, strip_prefix="")
    assert plan.errors == ()
    assert plan.mapping == {renamed: (wrapped,)}


@hundreds
@given(KEY, RULES)
def test_a_renamed_key_has_whole_segments_and_changes_only_where_a_rule_hit(key, rules):
    renamer = Renamer([rules])
    try:
        renamed = renamer(key)
    except warmstart.MappingError:
        return
    assert renamed
    assert all(renamed.split("."))
    if not any(rule.hits for stage in renamer.stages for rule in stage):
        assert renamed == key


# ---- wrappers in every order ----

WRAPPERS = {
    "module": nn.DataParallel,
    "_orig_mod": lambda module: torch.compile(module, backend="eager"),
    "_checkpoint_wrapped_module": checkpoint_wrapper,
    "_fsdp_wrapped_module": None,  # needs a process group: on the checkpoint's side only
}
NAMES: Shapes = {"encoder.0.weight": (3, 2), "encoder.0.bias": (3,), "encoder.1.weight": (3, 3), "head.weight": (1, 3)}


@pytest.mark.parametrize("order", list(itertools.permutations(WRAPPERS)), ids=" ".join)
def test_field_note_2_keys_with_the_four_wrappers_in_any_order_and_place_fit_a_plain_model(order):
    w, x, y, z = order
    keys = {f"{w}.{x}.encoder.{y}.0.{z}.weight": (3, 2), f"{w}.encoder.{x}.{y}.{z}.0.bias": (3,),
            f"{z}.{y}.{x}.{w}.encoder.1.weight": (3, 3), f"head.{w}.{x}.{y}.{z}.weight": (1, 3)}  # fmt: skip
    plan = warmstart.plan(net(NAMES), Header(keys))
    assert plan.errors == ()
    assert plan.mapping == {name: (key,) for name, key in zip(NAMES, keys, strict=True)}
    assert plan.prefix is None


@pytest.mark.parametrize("order", list(itertools.permutations(w for w, wrap in WRAPPERS.items() if wrap)), ids=" ".join)
@pytest.mark.parametrize("place", ["top", "encoder", "0", "all"])
@pytest.mark.parametrize("averaged", [False, True])
def test_field_note_2_models_with_real_wrappers_in_any_order_and_place_take_a_plain_file(order, place, averaged):
    def wrapped(module: nn.Module, name: str) -> nn.Module:
        if place in (name, "all"):
            for segment in order:
                module = WRAPPERS[segment](module)
        return module

    encoder = nn.ModuleDict({"0": wrapped(nn.Linear(2, 3), "0"), "1": nn.Linear(3, 3, bias=False)})
    model = wrapped(nn.ModuleDict({"encoder": wrapped(encoder, "encoder"), "head": nn.Linear(3, 1, bias=False)}), "top")
    model = AveragedModel(model) if averaged else model
    plan = warmstart.plan(model, Header(NAMES))
    assert plan.errors == ()
    assert list(plan.mapping.values()) == [(name,) for name in NAMES]
    spelled = ".".join(reversed(order))
    top = "module." * averaged + f"{spelled}." * (place in ("top", "all"))
    first = (
        top
        + "encoder."
        + f"{spelled}." * (place in ("encoder", "all"))
        + "0."
        + f"{spelled}." * (place in ("0", "all"))
    )
    assert plan.mapping[f"{first}weight"] == ("encoder.0.weight",)
    # And the other way: what this model would save fits the plain one, and itself.
    own = Header({name: tuple(entry.shape) for name, entry in plan.targets.entries.items()})
    assert warmstart.plan(model, own).mapping == {name: (name,) for name in own.keys()}
    assert warmstart.plan(net(NAMES), own).mapping == {
        name: (key,) for name, key in zip(NAMES, own.keys(), strict=True)
    }


@pytest.mark.parametrize("child", ["module", "submodule", "base_module", "_orig_mod", "modules_"])
@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m), backend="eager")]
)
def test_field_note_2_a_real_child_with_a_wrapper_s_name_keeps_it(child, wrap):
    shapes: Shapes = {f"{child}.fc.weight": (2, 2), "head.weight": (2, 2), f"deep.{child}.weight": (3,)}
    model = wrap(net(shapes))
    plain = warmstart.plan(model, Header(shapes))
    assert plain.errors == ()
    assert list(plain.mapping.values()) == [(name,) for name in shapes]
    for under in ("module.", "_orig_mod.module.", "_forward_module."):
        plan = warmstart.plan(model, Header({f"{under}{name}": shape for name, shape in shapes.items()}))
        assert plan.errors == ()
        assert list(plan.mapping.values()) == [(f"{under}{name}",) for name in shapes]


def test_field_note_2_where_a_wrapper_s_name_and_a_real_child_give_two_readings_it_is_an_error_until_said():
    shapes: Shapes = {"module.fc.weight": (2, 2), "fc.weight": (2, 2)}
    saved = {f"module.{name}": shape for name, shape in shapes.items()}  # `module.fc.weight` is one or the other
    plan = warmstart.plan(net(shapes), Header(saved))
    assert [problem.kind for problem in plan.errors] == ["missing", "unexpected"]
    plan = warmstart.plan(net(shapes), Header(saved), strip_prefix="module")
    assert plan.errors == ()
    assert plan.mapping == {name: (f"module.{name}",) for name in shapes}
