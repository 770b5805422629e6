"""What holds of every plan with all its fields: where everything ends, what a fault leaves, and the way back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import warmstart
from warmstart import (
    Concat,
    Conversion,
    MapRows,
    Permute,
    Pretrained,
    Reshape,
    RopePermute,
    SliceOrPad,
    Split,
    Stack,
    Transpose,
    Unstack,
)
from warmstart.checkpoints.base import Checkpoint, TensorInfo
from warmstart.checkpoints.files import FileStamp
from warmstart.mapping.model.names import WRAPPER_SEGMENTS
from warmstart.tensors import same_bits

some = settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
few = settings(some, max_examples=60)


class Reader(Checkpoint):
    """Tensors behind a reader that notes what is asked of it, and fails at one call of `info` or of `read` if told to."""

    def __init__(self, tensors: Mapping[str, Tensor], *, in_file: bool = True) -> None:
        self.tensors = dict(tensors)
        self.asked = {"info": 0, "read": 0}
        self.fail_at: tuple[str, int] | None = None
        super().__init__(
            location="reader",
            format="none",
            infos={key: TensorInfo(tuple(t.shape), t.dtype) for key, t in tensors.items()},
            files=[FileStamp.of(Path(__file__))] if in_file else [],
        )

    def info(self, key):
        self._count("info")
        return super().info(key)

    def _read(self, key, index):
        self._count("read")
        return self.tensors[key]

    def _count(self, what: str) -> None:
        self.asked[what] += 1
        if self.fail_at == (what, self.asked[what]):
            raise OSError(f"{what} {self.asked[what]} failed")


def net(entries: Mapping[str, Tensor], ties: Sequence[tuple[str, str]] = (), buffers: Sequence[str] = ()) -> nn.Module:
    """A module tree with one entry per name that holds a copy of its tensor; of a tie, the second name is the first's."""
    root = nn.Module()
    made: dict[str, Tensor] = {}
    first = {second: one for one, second in ties}
    for name, value in entries.items():
        *path, leaf = name.split(".")
        module = root
        for segment in path:
            if segment not in module._modules:
                module.add_module(segment, nn.Module())
            module = module._modules[segment]
        if name in buffers:
            module.register_buffer(leaf, value.clone())
            continue
        own = nn.Parameter(value.clone(), requires_grad=value.is_floating_point())
        made[name] = made[first[name]] if name in first else own
        module.register_parameter(leaf, made[name])
    return root


# ---- any keys, any rules: most of these plans have errors ----

# Modules are a, b, enc, 0, 1; leaves w, v, bias: no name is a path of another.
MODULE = st.sampled_from(["a", "b", "enc", "0", "1"])
NAME = st.tuples(st.lists(MODULE, max_size=3), st.sampled_from(["w", "v", "bias"])).map(
    lambda t: ".".join([*t[0], t[1]])
)
SHAPE = st.sampled_from([(), (2,), (4,), (2, 3), (3, 2), (4, 3)])
DTYPE = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.int64])
TENSOR = st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), SHAPE, DTYPE)
KEYS = st.dictionaries(
    st.tuples(st.sampled_from(["", "", "", "module.", "x.", "enc."]), NAME).map("".join), TENSOR, min_size=1, max_size=8
)
PATTERNS = st.lists(st.sampled_from(["?a", "?*.w", "?enc", "?*", "?b.*", "?0", "never"]), max_size=2)
CONVERSIONS = st.sampled_from(
    [
        Conversion("?{p...}.w", "{p...}.v", [Transpose(0, 1)]),
        Conversion("?{p...}.w", ["{p...}.v", "{p...}.w"]),
        Conversion("?{p...}.w", ["{p...}.w", "{p...}.v"], [Split(0)]),
        Conversion("?w", "w", [Reshape([-1])]),
        Conversion(["?{p...}.w", "{p...}.v"], "{p...}.w", [Concat(0)]),
        Conversion(["?a.{leaf}", "b.{leaf}"], "enc.{leaf}", [Concat(0)]),
        Conversion("?{i}.{leaf}", "enc.{leaf}", [Stack("i", 0)]),
        Conversion("?enc.{leaf}", "{i}.{leaf}", [Unstack("i", 0)]),
        Conversion("?{p...}.{i}.w", "{p...}.{2*i+1}.w"),
        Conversion("?a.bias", ["a.bias", "b.bias", "enc.bias"]),
        Conversion("{p...}.never", "{p...}.w"),
    ]
)
# One field a line: every property below is then asked of plans with it.
RULES: dict[str, st.SearchStrategy[Any]] = {
    "select": PATTERNS,
    "strip_prefix": st.sampled_from([None, "", "?x", "?enc", "a"]),
    "into": st.sampled_from(["", "", "enc", "a", "never"]),
    "include": PATTERNS,
    "exclude": PATTERNS,
    "match": st.sampled_from(["prefix", "suffix"]),
    "rename": st.sampled_from([{}, {"?a": "b"}, {"?a": "b", "?b": "a"}, [{"?x": "enc"}, {"enc": "a"}], {"?^": "enc."}]),
    "convert": st.lists(CONVERSIONS, min_size=1, max_size=2),
    "adapt": st.dictionaries(
        st.sampled_from(["?*.w", "?a", "?*bias", "never"]),
        st.sampled_from([SliceOrPad(), SliceOrPad(0.0), MapRows(None, [1, 0]), MapRows(None, [None, 0, 1, 1])]),
        min_size=1,
        max_size=2,
    ),
    "fill": st.dictionaries(
        st.sampled_from(["?*.v", "?b", "?*bias", "never"]), st.sampled_from([0.0, 0.5]), min_size=1, max_size=2
    ),
    "allow_missing": PATTERNS,
    "allow_unexpected": PATTERNS,
    "allow_mismatched": PATTERNS,
    "min_coverage": st.sampled_from([None, 0.5]),
    "dtype": st.sampled_from(["model", "checkpoint"]),
    "allow_narrowing": st.booleans(),
    "freeze": st.one_of(st.booleans(), PATTERNS),
}
FIELDS = st.fixed_dictionaries({}, optional=RULES)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    entries = draw(st.dictionaries(NAME, TENSOR, min_size=1, max_size=8))
    buffers = draw(st.lists(st.sampled_from(sorted(entries)), max_size=2))
    pairs = list(itertools.combinations([name for name in entries if name not in buffers], 2))
    ties = draw(st.lists(st.sampled_from(pairs), max_size=1)) if pairs else []
    return net(entries, ties, buffers)


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes, bool]]:
    """Every entry's dtype and bits, and whether it trains."""
    out = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        out[name] = (tensor.dtype, flat.view(torch.uint8).numpy().tobytes(), tensor.requires_grad)
    return out


def assert_partition(plan: warmstart.Plan, model: nn.Module) -> None:
    """Every entry is in one bucket, and so is every key of every source."""
    in_entries = Counter([a.target for a in plan.assignments])
    in_entries.update([*plan.missing, *plan.mismatched, *plan.excluded])
    assert in_entries == Counter(list(model.state_dict()))
    several = len(plan.parts) > 1
    left = Counter(item if several else (0, item) for item in (*plan.unexpected, *plan.ignored))
    assert not left or max(left.values()) == 1
    used = {(a.part, key) for a in plan.assignments for key in a.sources}
    assert used.isdisjoint(left)
    keys = {(number, key) for number, part in enumerate(plan.parts) for key in part.checkpoint.keys()}
    of_another_shape = {key for mismatch in plan.mismatched.values() for key in mismatch.keys}
    rest = keys - used - left.keys()
    assert {key for _, key in rest} <= of_another_shape
    assert keys >= used | left.keys()


def assert_injective(plan: warmstart.Plan) -> None:
    """No key, and no output of a conversion, gives two entries their value; what is given fits."""
    given = [(a.part, id(a.conversion) if a.conversion else a.sources, a.output) for a in plan.assignments if a.sources]
    assert len(set(given)) == len(given)
    for a in plan.assignments:
        assert a.adapter is not None or a.alias_of is not None or a.source_shape == a.shape
        assert bool(a.sources) + (a.alias_of is not None) + (a.fill is not None) == 1
        if a.conversion is None and a.sources:
            assert plan.parts[a.part].checkpoint.info(a.sources[0]).shape == a.source_shape


@some
@given(models(), KEYS, FIELDS)
def test_everything_is_accounted_for_with_any_rules(model, keys, fields):
    plan = warmstart.plan(model, Reader(keys), **fields)
    assert_partition(plan, model)
    assert_injective(plan)
    assert 0 <= plan.coverage <= 1
    assert set(plan.mapping) == {a.target for a in plan.assignments}
    assert plan.explain() if plan.errors else not plan.explain()


@some
@given(models(), KEYS, KEYS, FIELDS, FIELDS)
def test_everything_is_accounted_for_with_two_sources(model, keys, others, fields, other_fields):
    plan = warmstart.plan(model, [Pretrained(Reader(keys), **fields), Pretrained(Reader(others), **other_fields)])
    assert_partition(plan, model)
    assert_injective(plan)


@some
@given(models(), KEYS, FIELDS, st.randoms(use_true_random=False))
def test_a_plan_with_any_rules_reads_nothing_and_does_not_depend_on_the_order_of_anything(model, keys, fields, random):
    def shuffled(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return dict(random.sample(list(mapping.items()), k=len(mapping)))

    reader = Reader(keys)
    plan = warmstart.plan(model, reader, **fields)
    twin = warmstart.plan(model, Reader(shuffled(keys)), **fields)
    assert twin.to_dict() == plan.to_dict()
    if not plan.errors:  # one of them may be that two patterns disagree
        patterns = {name: shuffled(fields[name]) for name in ("adapt", "fill") if name in fields}
        assert warmstart.plan(model, reader, **fields | patterns).digest() == plan.digest()
    assert reader.asked["read"] == 0


@some
@given(models(), KEYS, FIELDS, st.data())
def test_all_rules_commute_with_wrappers(model, keys, fields, data):
    """With wrapper segments anywhere in its keys, a checkpoint goes where it goes without them."""
    # Patterns of keys match them as they are spelled, too.
    fields = {name: value for name, value in fields.items() if name not in ("select", "allow_unexpected")}
    spelled: dict[str, str] = {}
    clean = {key: tensor for key, tensor in keys.items() if not set(key.split(".")) & WRAPPER_SEGMENTS}
    for key in clean:
        segments = key.split(".")
        for place in data.draw(st.lists(st.integers(0, len(segments) - 1), max_size=2)):
            segments.insert(place, data.draw(st.sampled_from(sorted(WRAPPER_SEGMENTS))))
        spelled[key] = ".".join(segments)
    if not clean:
        return
    plain = warmstart.plan(model, Reader(clean), **fields)
    if any(problem.kind == "collision" for problem in plain.errors):
        return  # which of two keys is the first depends on how they are spelled
    wrapped = warmstart.plan(model, Reader({spelled[key]: tensor for key, tensor in clean.items()}), **fields)
    assert wrapped.mapping == {name: tuple(spelled[key] for key in keys) for name, keys in plain.mapping.items()}
    assert wrapped.missing == plain.missing
    assert wrapped.excluded == plain.excluded
    assert set(wrapped.unexpected) == {spelled[key] for key in plain.unexpected}
    assert set(wrapped.ignored) == {spelled[key] for key in plain.ignored}
    assert wrapped.mismatched.keys() == plain.mismatched.keys()
    assert [problem.kind for problem in wrapped.errors] == [problem.kind for problem in plain.errors]


@some
@given(models(), KEYS, FIELDS, st.data())
def test_a_plan_that_fails_leaves_the_model_untouched(model, keys, fields, data):
    """Whatever fails while planning: the reader, at any question it is asked, or the rules."""
    before = bits(model)
    reader = Reader(keys)
    reader.fail_at = ("info", data.draw(st.integers(1, 3 * len(keys))))
    try:
        plan = warmstart.plan(model, reader, **fields)
    except OSError:
        assert reader.fail_at == ("info", reader.asked["info"])
    else:
        if plan.errors:
            with pytest.raises(warmstart.MappingError):
                plan.apply()
    assert reader.asked["read"] == 0
    assert bits(model) == before


# ---- checkpoints that were made from the model's values by steps that can be undone ----


@dataclass
class Made:
    """What a model should hold in the end, and the keys and rules that give it that.

    Attributes:
        entries: Entry to its value, in the model's dtype.
        keys: Key to its tensor in the file.
        ties: Pairs of entries that are one tensor.
    """

    entries: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    convert: list[Conversion] = field(default_factory=list)
    adapt: dict[str, Any] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)
    ties: list[tuple[str, str]] = field(default_factory=list)

    def model(self) -> nn.Module:
        """A model that holds other values so far, but where an entry keeps its own."""
        return net({name: torch.full_like(value, OWN) for name, value in self.entries.items()}, self.ties)

    def fields(self) -> dict[str, Any]:
        return {"convert": self.convert, "adapt": self.adapt, "fill": self.fill}


OWN = -7.0
DIM = st.integers(1, 4)


def values(*shape: int) -> Tensor:
    """Values that bfloat16 holds, each another one, among them a negative zero and a NaN."""
    count = torch.Size(shape).numel()
    flat = torch.arange(1.0, count + 1) / 16
    flat[count // 2 :: 17] = -0.0
    flat[count // 3 :: 19] = float("nan")
    return flat.reshape(shape)


def plain(draw: st.DrawFn, at: str, made: Made) -> None:
    value = values(draw(DIM), draw(DIM))
    made.keys[f"{at}.weight"] = value
    made.entries[f"{at}.weight"] = value


def widened(draw: st.DrawFn, at: str, made: Made) -> None:
    narrow = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    wide = draw(st.sampled_from([torch.float32, torch.float64]))
    value = values(draw(DIM), 2).nan_to_num().to(narrow)  # which NaN a cast makes differs from kernel to kernel
    made.keys[f"{at}.weight"] = value
    made.entries[f"{at}.weight"] = value.to(wide)


def tied(draw: st.DrawFn, at: str, made: Made) -> None:
    value = values(draw(DIM), 3)
    made.entries[f"{at}.embed"] = made.entries[f"{at}.head"] = value
    made.ties.append((f"{at}.embed", f"{at}.head"))
    for name in draw(st.lists(st.sampled_from(["embed", "head"]), min_size=1, max_size=2, unique=True)):
        made.keys[f"{at}.{name}"] = value


def transposed(draw: st.DrawFn, at: str, made: Made) -> None:
    value = values(draw(DIM), draw(DIM), draw(DIM))
    a, b = draw(st.tuples(st.integers(-3, 2), st.integers(-3, 2)))
    made.keys[f"{at}.kernel"] = value
    made.entries[f"{at}.weight"] = value.transpose(a, b)
    made.convert.append(Conversion(f"{at}.kernel", f"{at}.weight", [Transpose(a, b)]))


def permuted(draw: st.DrawFn, at: str, made: Made) -> None:
    value, dims = values(draw(DIM), draw(DIM), draw(DIM)), draw(st.permutations([0, 1, 2]))
    made.keys[f"{at}.kernel"] = value
    made.entries[f"{at}.weight"] = value.permute(dims).reshape(-1)
    made.convert.append(Conversion(f"{at}.kernel", f"{at}.weight", [Permute(dims), Reshape([-1])]))


def split(draw: st.DrawFn, at: str, made: Made) -> None:
    sizes = draw(st.lists(DIM, min_size=2, max_size=3))
    dim = draw(st.sampled_from([0, 1, -1]))
    value = values(sum(sizes), 2) if dim == 0 else values(2, sum(sizes))
    names = [f"{at}.{name}" for name in "qkv"[: len(sizes)]]
    made.keys[f"{at}.fused"] = value
    made.entries |= dict(zip(names, value.split(sizes, dim), strict=True))
    said = draw(st.sampled_from([None, sizes]))
    made.convert.append(Conversion(f"{at}.fused", names, [Split(dim, said)]))


def joined(draw: st.DrawFn, at: str, made: Made) -> None:
    dim, rows = draw(st.integers(0, 1)), draw(st.lists(DIM, min_size=2, max_size=3))
    parts = [values(n, 2) + i if dim == 0 else values(2, n) + i for i, n in enumerate(rows)]
    names = [f"{at}.{name}" for name in "qkv"[: len(parts)]]
    made.keys |= dict(zip(names, parts, strict=True))
    made.entries[f"{at}.fused"] = torch.cat(parts, dim)
    made.convert.append(Conversion(names, f"{at}.fused", [Concat(dim)]))


def stacked(draw: st.DrawFn, at: str, made: Made) -> None:
    """Experts of a mixture, and the two halves of their gate."""
    dim, count = draw(st.integers(0, 2)), draw(st.sampled_from([1, 2, 11]))
    gates, ups = ([values(2, 3) + e + half for e in range(count)] for half in (0.0, 0.5))
    for e in range(count):
        made.keys |= {f"{at}.experts.{e}.w1": gates[e], f"{at}.experts.{e}.w3": ups[e]}
    made.entries[f"{at}.experts.gate_up"] = torch.cat([torch.stack(gates, dim), torch.stack(ups, dim)], 1)
    sources = [f"{at}.experts.{{e}}.{name}" for name in ("w1", "w3")]
    made.convert.append(Conversion(sources, f"{at}.experts.gate_up", [Stack("e", dim), Concat(1)]))


def unstacked(draw: st.DrawFn, at: str, made: Made) -> None:
    value, dim = values(draw(DIM), draw(DIM), 12), draw(st.integers(-3, 2))
    made.keys[f"{at}.experts"] = value
    made.entries |= {f"{at}.experts.{e}.w": part for e, part in enumerate(value.unbind(dim))}
    made.convert.append(Conversion(f"{at}.experts", f"{at}.experts.{{e}}.w", [Unstack("e", dim)]))


def turned(draw: st.DrawFn, at: str, made: Made) -> None:
    heads, half = draw(DIM), draw(DIM)
    value = values(heads * 2 * half, 3)
    made.keys[f"{at}.wq"] = value
    made.entries[f"{at}.q"] = value.view(heads, half, 2, 3).transpose(1, 2).reshape(-1, 3)
    made.convert.append(Conversion(f"{at}.wq", f"{at}.q", [RopePermute(heads)]))


def copied(draw: st.DrawFn, at: str, made: Made) -> None:
    value, names = values(draw(DIM), 2), [f"{at}.copy{i}" for i in range(draw(st.integers(2, 3)))]
    made.keys[f"{at}.weight"] = value
    made.entries |= dict.fromkeys(names, value)
    made.convert.append(Conversion(f"{at}.weight", names))


def renumbered(draw: st.DrawFn, at: str, made: Made) -> None:
    for i in range(draw(DIM)):
        made.keys[f"{at}.old.{i}.w"] = made.entries[f"{at}.new.{2 * i + 1}.w"] = values(2, 2) + i
    made.convert.append(Conversion(f"{at}.old.{{i}}.w", f"{at}.new.{{2*i+1}}.w"))


def padded(draw: st.DrawFn, at: str, made: Made) -> None:
    value, fill = values(draw(DIM), draw(DIM)), draw(st.sampled_from(["keep", 0.25]))
    whole = torch.full((value.shape[0] + draw(DIM), value.shape[1] + 1), OWN if fill == "keep" else fill)
    whole[: value.shape[0], : value.shape[1]] = value
    made.keys[f"{at}.weight"] = value
    made.entries[f"{at}.weight"] = whole
    made.adapt[f"{at}.weight"] = SliceOrPad(fill)


def mapped(draw: st.DrawFn, at: str, made: Made) -> None:
    """Rows in another order, some of them twice, and new ones."""
    rows = draw(DIM)
    old = [*draw(st.permutations(range(rows))), *draw(st.lists(st.sampled_from([*range(rows), None]), max_size=3))]
    value = values(rows, 2)
    made.keys[f"{at}.weight"] = value
    made.entries[f"{at}.weight"] = torch.stack([torch.full((2,), 0.5) if row is None else value[row] for row in old])
    made.adapt[f"{at}.weight"] = MapRows(None, old, new_rows=0.5)


def constant(draw: st.DrawFn, at: str, made: Made) -> None:
    made.entries[f"{at}.gain"] = torch.full((draw(DIM),), 0.5)
    made.fill[f"{at}.gain"] = 0.5


# One step a line: every property below is then asked of plans with it.
STEPS: tuple[Callable[[st.DrawFn, str, Made], None], ...] = (
    plain,
    widened,
    tied,
    transposed,
    permuted,
    split,
    joined,
    stacked,
    unstacked,
    turned,
    copied,
    renumbered,
    padded,
    mapped,
    constant,
)


@st.composite
def checkpoints(draw: st.DrawFn) -> Made:
    made = Made()
    plain(draw, "first", made)
    for number, step in enumerate(draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))):
        step(draw, f"layers.{number}", made)
    return made


@dataclass(frozen=True)
class Disguise:
    """Other names for the keys: segments renamed, a prefix, and wrappers at some depths."""

    prefix: str
    renames: dict[str, str]
    wrappers: list[tuple[int, str]]

    def __call__(self, key: str) -> str:
        segments = [self.renames.get(segment, segment) for segment in f"{self.prefix}{key}".split(".")]
        for depth, wrapper in self.wrappers:
            segments.insert(min(depth, len(segments) - 1), wrapper)
        return ".".join(segments)

    def fields(self) -> dict[str, Any]:
        """The rules that give the keys back."""
        back = {f"?{new}": old for old, new in self.renames.items()}
        return {"rename": back, "strip_prefix": self.prefix.removesuffix(".")}


DISGUISES = st.builds(
    Disguise,
    st.sampled_from(["", "net.", "ema.net."]),
    st.sampled_from([{}, {"layers": "blocks"}, {"weight": "w9", "q": "k", "k": "q"}]),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(sorted(WRAPPER_SEGMENTS))), max_size=3),
)


def assert_holds(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not same_bits(state[name], expected[name])] == []


@some
@given(checkpoints(), DISGUISES, st.booleans())
def test_what_was_applied_is_what_was_made_and_reverses_to_the_checkpoint(made, disguise, in_file):
    keys = {disguise(key): value for key, value in made.keys.items()}
    model = made.model()
    fields = made.fields() | disguise.fields()
    plan = warmstart.plan(model, Reader(keys, in_file=in_file), **fields)
    assert plan.errors == ()
    assert_partition(plan, model)
    assert_injective(plan)
    assert set(plan.mapping) == set(made.entries)
    plan.apply()
    assert_holds(model, made.entries)
    back = plan.reverse()
    assert list(back.keys()) == list(keys)
    for key, value in keys.items():
        assert same_bits(back.read(key), value), key
        assert (back.info(key).shape, back.info(key).dtype) == (tuple(value.shape), value.dtype)
    # And the reversed checkpoint goes the same way again.
    again = made.model()
    assert warmstart.load(again, back, **fields).mapping == plan.mapping
    assert_holds(again, made.entries)


@some
@given(checkpoints(), st.data())
def test_a_source_that_lies_in_the_model_s_own_memory_is_read_before_it_is_overwritten(made, data):
    model, keys = made.model(), dict(made.keys)
    taken = {name for name, adapter in made.adapt.items() if adapter == SliceOrPad("keep")}
    taken.update(second for _, second in made.ties)
    free = {name: tensor for name, tensor in model.state_dict().items() if name not in taken}
    for key, value in made.keys.items():
        places = [name for name, t in free.items() if (t.shape, t.dtype) == (value.shape, value.dtype)]
        if places:
            keys[key] = free.pop(data.draw(st.sampled_from(places))).copy_(value)
    warmstart.load(model, keys, **made.fields())
    assert_holds(model, made.entries)


@few
@given(checkpoints())
def test_a_checkpoint_in_the_model_s_own_layout_needs_no_rules(made):
    loaded, model = made.model(), made.model()
    warmstart.load(loaded, Reader(made.keys), **made.fields())
    plan = warmstart.plan(model, loaded.state_dict())
    assert plan.errors == ()
    assert plan.mapping == {name: (name,) for name in made.entries}
    plan.apply()
    assert_holds(model, made.entries)


@few
@given(checkpoints(), st.booleans(), st.sampled_from(["full", "sample", "off"]), st.data())
def test_a_fault_of_the_reader_says_what_was_written_and_the_rest_is_untouched(made, in_file, verify, data):
    counted, reader = (Reader(made.keys, in_file=in_file) for _ in range(2))
    warmstart.load(made.model(), counted, verify=verify, **made.fields())
    model = made.model()
    before = bits(model)
    plan = warmstart.plan(model, reader, **made.fields())
    reader.fail_at = ("read", data.draw(st.integers(1, counted.asked["read"])))
    with pytest.raises(warmstart.CheckpointError, match=r"read \d+ failed") as caught:
        plan.apply(verify=verify)
    together = {name: {name, *itertools.chain(*(tie for tie in made.ties if name in tie))} for name in made.entries}
    written = set().union(*(together[name] for name in caught.value.written))
    expected = bits(net(made.entries, made.ties))
    assert bits(model) == {name: (expected if name in written else before)[name] for name in before}


@few
@given(checkpoints(), checkpoints())
def test_what_two_sources_both_give_is_an_error_and_accounted_for(made, other):
    model = net({name: torch.full_like(value, OWN) for name, value in (other.entries | made.entries).items()})
    sources = [Pretrained(Reader(each.keys), strip_prefix="", **each.fields()) for each in (made, other)]
    plan = warmstart.plan(model, sources)
    assert_partition(plan, model)
    assert_injective(plan)
    assert "overlap" in {problem.kind for problem in plan.errors}
