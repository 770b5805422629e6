from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from warmstart import MappingError
from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.converting import convert
from warmstart.mapping.conversions.ops.applying import Apply
from warmstart.mapping.conversions.ops.joining import Concat, Split
from warmstart.mapping.conversions.ops.layout import Permute, Reshape, RopePermute, Transpose
from warmstart.mapping.conversions.ops.stacking import Stack, Unstack
from warmstart.mapping.keys import Key

W = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Transpose(0, 2), W.transpose(0, 2)),
        (Transpose(-1, 1), W.transpose(-1, 1)),
        (Permute([2, 0, 1]), W.permute(2, 0, 1)),
        (Permute([-1, 0, -2]), W.permute(2, 0, 1)),
        (Reshape([6, 4]), W.reshape(6, 4)),
        (Reshape([2, -1]), W.reshape(2, 12)),
        (Reshape([-1]), W.reshape(-1)),
    ],
)
def test_an_op_on_each_tensor_and_back(run, op, expected):
    result = run({"a": W}, Conversion("a", "b", [op]))
    assert torch.equal(result.made["b"], expected)
    assert set(result.undone) == {"a"}


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_stack_and_concat_join_the_sources_in_their_order(run, dim):
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    stacked = run({"a": a, "b": b}, Conversion("{x}", "c", [Stack("x", dim)]))
    assert torch.equal(stacked.made["c"], torch.stack([a, b], dim))
    joined = run({"a": a, "b": b}, Conversion(["b", "a"], "c", [Concat(dim)]))
    assert torch.equal(joined.made["c"], torch.cat([b, a], dim))
    gathered = run({"a": a, "b": b}, Conversion("{x}", "c", [Concat(dim)]))
    assert torch.equal(gathered.made["c"], torch.cat([a, b], dim))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unstack_numbers_the_parts(run, dim):
    result = run({"a": W}, Conversion("a", "b.{k}", [Unstack("k", dim)]))
    assert set(result.made) == {f"b.{k}" for k in range(W.shape[dim])}
    for k in range(W.shape[dim]):
        assert torch.equal(result.made[f"b.{k}"], W.select(dim, k))


def test_stack_over_two_placeholders_in_turn(run):
    tensors = {f"x.{i}.{j}": torch.tensor([10.0 * i + j]) for i in range(2) for j in range(12)}
    result = run(tensors, Conversion("x.{i}.{j}", "y", [Stack("j", 0), Stack("i", 0)]))
    expected = torch.tensor([[10.0 * i + j for j in range(12)] for i in range(2)])
    assert torch.equal(result.made["y"][..., 0], expected)


def test_split_by_sizes_by_entries_and_in_equal_parts(run):
    w = torch.randn(8, 3)
    targets = ["q", "k", "v"]
    by_sizes = run({"w": w}, Conversion("w", targets, [Split(0, [4, 2, 2])]))
    by_entries = run({"w": w}, Conversion("w", targets, [Split(0)]), entries={"q": (4, 3), "k": (2, 3), "v": (2, 3)})
    all_but_one = run({"w": w}, Conversion("w", targets, [Split(0)]), entries={"k": (2, 3), "v": (2, 3)})
    for result in (by_sizes, by_entries, all_but_one):
        assert torch.equal(result.made["q"], w[:4])
        assert torch.equal(result.made["k"], w[4:6])
        assert torch.equal(result.made["v"], w[6:])
    equal = run({"w": w}, Conversion("w", ["a", "b"], [Split(-2)]))
    assert torch.equal(equal.made["b"], w[4:])


@pytest.mark.parametrize(
    ("ops", "entries", "expected"),
    [
        ([Split(0), Transpose(0, 1)], {"q": (3, 4), "k": (3, 2), "v": (3, 2)}, lambda t: t.T),
        (
            [Split(0), Reshape([-1, 2, 3])],
            {"q": (2, 2, 3), "k": (1, 2, 3), "v": (1, 2, 3)},
            lambda t: t.reshape(-1, 2, 3),
        ),
        (
            [Split(0), RopePermute(1), Permute([1, 0])],
            {"q": (3, 4), "k": (3, 2), "v": (3, 2)},
            lambda t: RopePermute(1).apply(t).T,
        ),
    ],
)
def test_split_takes_its_sizes_through_the_ops_after_it(run, ops, entries, expected):
    w = torch.randn(8, 3)
    result = run({"w": w}, Conversion("w", ["q", "k", "v"], ops), entries=entries)
    for name, part in zip("qkv", w.split([4, 2, 2]), strict=True):
        assert torch.equal(result.made[name], expected(part))


def test_split_then_unstack_takes_its_sizes_from_the_entries(run):
    w = torch.randn(3, 5, 2)
    ops = [Split(1), Unstack("e", 0)]
    entries = {f"{n}.{e}": (rows, 2) for e in range(3) for n, rows in (("a", 1), ("b", 4))}
    result = run({"w": w}, Conversion("w", ["a.{e}", "b.{e}"], ops), entries=entries)
    for e in range(3):
        assert torch.equal(result.made[f"a.{e}"], w[e, :1])
        assert torch.equal(result.made[f"b.{e}"], w[e, 1:])


def test_rope_permute_is_the_formula_of_the_conversion_script(run):
    heads, d, inner = 3, 8, 5
    w, b = torch.randn(heads * d, inner), torch.randn(heads * d)
    script = w.view(heads, d // 2, 2, inner).transpose(1, 2).reshape(heads * d, inner)
    result = run({"x.w": w, "x.b": b}, Conversion("x.{n}", "y.{n}", [RopePermute(heads)]))
    assert torch.equal(result.made["y.w"], script)
    for row in range(heads * d):  # 2j + k goes to k * d/2 + j
        j, k = divmod(row % d, 2)
        assert result.made["y.b"][row - row % d + k * d // 2 + j] == b[row]
    back = Conversion("y", "x", [RopePermute(heads)]).inverse()
    assert torch.equal(run({"x": script}, back).made["y"], w)


def rotary_scores(q: Tensor, k: Tensor, *, interleaved: bool) -> Tensor:
    """Scores (heads, positions, positions) after a rotary embedding, as the two families of models write it."""
    positions, d = q.shape[1], q.shape[2]
    angles = torch.arange(positions)[:, None] * 10_000 ** (-torch.arange(0, d, 2, dtype=q.dtype) / d)

    def turned(x: Tensor) -> Tensor:
        if interleaved:  # Meta: pairs are complex numbers
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        rotated = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)  # Hugging Face: rotate_half
        return x * cos + rotated * sin

    return turned(q) @ turned(k).transpose(-1, -2)


def test_rope_permute_keeps_the_attention_scores_of_the_other_layout(run):
    heads, d, inner, positions = 4, 8, 16, 6
    x = torch.randn(positions, inner, dtype=torch.float64)
    q, k = (torch.randn(heads * d, inner, dtype=torch.float64) for _ in range(2))

    def projected(w: Tensor) -> Tensor:
        return (x @ w.T).view(positions, heads, d).transpose(0, 1)

    made = run({"q.w": q, "k.w": k}, Conversion("{p}.w", "{p}_proj.w", [RopePermute(heads)])).made
    meta = rotary_scores(projected(q), projected(k), interleaved=True)
    hugging_face = rotary_scores(projected(made["q_proj.w"]), projected(made["k_proj.w"]), interleaved=False)
    torch.testing.assert_close(meta, hugging_face)
    assert not torch.allclose(meta, rotary_scores(projected(q), projected(k), interleaved=False))


def roll_first_to_last(tensors: list[Tensor]) -> list[Tensor]:
    return [t.roll(-1, 0) for t in tensors]


def roll_last_to_first(tensors: list[Tensor]) -> list[Tensor]:
    return [t.roll(1, 0) for t in tensors]


def test_c2_value_transforms(run):
    """Detectron's `bbox_pred_*` drops the background's four rows, `cls_score_*` rolls its row to the end."""
    box, score, bias = torch.randn(12, 5), torch.randn(3, 5), torch.randn(3)
    result = run(
        {"bbox_pred_w": box, "cls_score_w": score, "cls_score_b": bias},
        Conversion("bbox_pred_w", "bbox_pred.weight", [Apply(lambda tensors: [tensors[0][4:]])]),
        Conversion("cls_score_{p}", "cls_score.{p}", [Apply(roll_first_to_last, roll_last_to_first)]),
    )
    assert torch.equal(result.made["bbox_pred.weight"], box[4:])
    assert torch.equal(result.made["cls_score.w"], torch.cat([score[1:], score[:1]]))
    assert torch.equal(result.made["cls_score.b"], torch.cat([bias[1:], bias[:1]]))
    assert set(result.undone) == {"cls_score_w", "cls_score_b"}


def test_apply_gets_a_list_and_gives_a_list(run):
    a, b = torch.randn(2), torch.randn(2)
    swap = Apply(lambda t: [t[1], t[0] * 2], lambda t: [t[1] / 2, t[0]])
    made = run({"a": a, "b": b}, Conversion(["a", "b"], ["c", "d"], [swap])).made
    assert torch.equal(made["c"], b)
    assert torch.equal(made["d"], a * 2)
    total = run({f"x.{i}": torch.full((2,), float(i)) for i in range(12)}, Conversion("x.{i}", "y", [Apply(weighted)]))
    assert total.made["y"].tolist() == [sum(i * i for i in range(12))] * 2


def weighted(tensors: list[Tensor]) -> list[Tensor]:
    return [sum((t * i for i, t in enumerate(tensors)), torch.zeros(2))]


def test_apply_may_need_values_of_its_inputs(run):
    through_numpy = Apply(lambda tensors: [torch.from_numpy(tensors[0].numpy().cumsum(0))])
    assert run({"a": torch.ones(3)}, Conversion("a", "b", [through_numpy])).made["b"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda t: t[0], "returns Tensor; return a list of tensors"),
        (lambda t: [1], "returns list; return a list of tensors"),
        (lambda t: [], "returns no tensors"),
        (lambda t: [t[0], t[0]], "2 results for 1 targets"),
        (lambda t: [t[0].mul_(2)], "writes into the tensors"),
        (lambda t: [t[3]], "IndexError: list index out of range"),
    ],
)
def test_apply_that_cannot_be_used_is_found_while_planning(convert_names, fn, why):
    (error,) = convert_names(["a"], Conversion("a", "b", [Apply(fn)])).errors
    assert error.kind == "conversion"
    assert why in error.message


def test_apply_works_on_inference_tensors_and_parameters(run):
    halved = Conversion("a", "b", [Apply(lambda t: [t[0] / 2], lambda t: [t[0] * 2]), Transpose(0, 0)])
    with torch.inference_mode():
        assert run({"a": torch.ones(3)}, halved).made["b"].tolist() == [0.5] * 3
    made = run({"a": torch.nn.Parameter(torch.ones(3))}, halved).made["b"]
    assert made.tolist() == [0.5] * 3
    assert not made.requires_grad


def test_apply_whose_shapes_depend_on_values_is_refused_when_it_runs(convert_names):
    plan = convert_names(["a"], Conversion("a", "b", [Apply(lambda t: [t[0][t[0] >= 0]])]))
    (key,) = plan.keys
    with pytest.raises(MappingError, match="returns float32 \\(2,\\) where float32 \\(8,\\) was planned"):
        key.made.run(lambda i: torch.tensor([[1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))


def test_ops_work_for_every_dtype(run):
    for dtype in (torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn):
        tensors = {f"a.{i}": torch.tensor([i, 1, 0, i]).to(dtype) for i in range(3)}
        stacked = run(tensors, Conversion("a.{i}", "b", [Stack("i", 1)])).made["b"]
        assert stacked.dtype == dtype
        run({"b": stacked}, Conversion("b", ["x", "y"], [Split(0), Reshape([-1])]))
        run({"b": stacked}, Conversion("b", "c.{i}", [Unstack("i", 1)]))


def test_nan_payloads_and_signs_survive(run):
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, -0x003FFFFF], dtype=torch.int32).view(torch.float32)
    made = run({"a.0": bits, "a.1": bits.flip(0)}, Conversion("a.{i}", "b", [Stack("i", 0), Transpose(0, 1)])).made
    assert torch.equal(made["b"].T[0].contiguous().view(torch.int32), bits.view(torch.int32))


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: Transpose(0, "1"), "b='1' is no whole number"),
        (lambda: Transpose(True, 1), "a=True is no whole number"),
        (lambda: Permute([0, 0]), "each dimension once"),
        (lambda: Permute([0, 5]), "each dimension once"),
        (lambda: Permute(3), "dims=3 is no list"),
        (lambda: Permute([]), r"dims=\[\] is no list"),
        (lambda: Reshape([-1, -1]), "one -1"),
        (lambda: Reshape([-2, 3]), "one -1"),
        (lambda: Split(0, [4, -1]), "not negative"),
        (lambda: Split(0, "44"), "sizes='44' is no list"),
        (lambda: Split(None), "dim=None is no whole number"),
        (lambda: Stack("{e}", 0), "its name without braces"),
        (lambda: Unstack("", 0), "its name without braces"),
        (lambda: RopePermute(0), "heads=32"),
        (lambda: RopePermute(4, to="meta"), 'write to="half"'),
        (lambda: Apply("no_such_module:f"), "cannot be imported"),
        (lambda: Apply("torch:nothing_here"), "cannot be imported"),
        (lambda: Apply("torch"), "package.module:name"),
        (lambda: Apply(3), "is no function"),
        (lambda: Apply(torch.stack, inverse="x"), "package.module:name"),
    ],
)
def test_an_op_refuses_fields_that_cannot_be_meant(make, fix):
    with pytest.raises(MappingError, match=fix):
        make()


@pytest.mark.parametrize(
    ("names", "conversion", "why"),
    [
        (["a"], Conversion("a", "b", [Transpose(0, 2)]), "Transpose(a=0, b=2) cannot take (4, 2): Dimension out of range"),
        (["a"], Conversion("a", "b", [Permute([0, 2, 1])]), "Permute(dims=(0, 2, 1)) cannot take (4, 2)"),
        (["a"], Conversion("a", "b", [Reshape([3, -1])]), "Reshape(shape=(3, -1)) cannot take (4, 2)"),
        (["a"], Conversion("a", "b", [RopePermute(3)]), "give the heads of this projection"),
        (["a"], Conversion("a", ["b", "c"], [Split(2)]), "it has no dim 2"),
        (["a"], Conversion("a", ["b", "c"], [Split(0, [1, 1])]), "dim 0 of (4, 2) is 4, and the sizes add up to 2"),
        (["a", "b"], Conversion(["a", "b"], ["c", "d"], [Split(0)]), "takes one tensor, and there are 2"),
        (["a"], Conversion("a", "b", [Concat(0)]), "there is one tensor only"),
        (["a", "b"], Conversion("{x}", "c", [Concat(3)]), "it has no dim 3"),
        (["a", "b"], Conversion("{x}", "c", [Stack("x", 3)]), "no place 3 for a new dimension"),
        (["a"], Conversion("a", "b", [Split(0, [2, 2])]), "2 results for 1 targets"),
        (["a", "b"], Conversion(["a", "b"], ["c", "d"], [Concat(0)]), "1 results for 2 targets"),
        (["a", "b"], Conversion(["a", "b"], "c"), "2 results for 1 targets"),
        (["a"], Conversion("a", ["b.{k}", "c"], [Split(0, [2, 2]), Unstack("k", 0)]), "differ by {k}, and its name by nothing"),
        (["a.0", "b.0"], Conversion(["a.{i}", "b.{i}"], ["c", "d"], [Concat(0), Split(0)]), "would split each of 1 gathered"),
        (["a.0.0"], Conversion("a.{i}.{j}", "b", [Concat(0)]), "{i} and {j} are both gathered"),
        (["a", "b.0"], Conversion(["a", "b.{i}"], "c", [Stack("i", 0), Concat(0)]), "no {i} to stack over"),
        (["a", "b.0"], Conversion(["a", "b.{i}"], "c", [Concat(0)]), "differ in what they have gathered"),
    ],
)  # fmt: skip
def test_an_op_that_cannot_be_run_says_why(convert_names, names, conversion, why):
    plan = convert_names(names, conversion)
    (error,) = plan.errors
    assert error.kind == "conversion"
    assert why in error.message
    assert [key.name for key in plan.failed] == sorted(names)
    assert plan.keys == []


def test_nothing_is_cast_silently():
    keys = [Key("a", "a", "a", (2,), torch.float32), Key("b", "b", "b", (2,), torch.bfloat16)]
    for conversion in (Conversion(["a", "b"], "c", [Concat(0)]), Conversion("{x}", "c", [Stack("x", 0)])):
        (error,) = convert(keys, [conversion]).errors
        assert "joins tensors of bfloat16 and float32" in error.message


def test_what_is_joined_must_have_one_shape():
    keys = [Key(n, n, n, shape, torch.float32) for n, shape in (("a", (2, 3)), ("b", (2, 4)), ("c", (0,)), ("d", (3,)))]

    def error(names, op):
        (problem,) = convert([key for key in keys if key.name in names], [Conversion("{x}", "z", [op])]).errors
        return problem.message

    assert "(2, 3), (2, 4): they differ in shape" in error("ab", Stack("x", 0))
    assert "(2, 3), (2, 4): they differ in more than dim 0" in error("ab", Concat(0))
    assert "(2, 3), (0,): they differ in more than dim 0" in error("ac", Concat(0))  # torch.cat skips such a tensor
    assert "cannot take (2, 3), (3,)" in error("ad", Concat(0))
    (key,) = convert(keys[:2], [Conversion("{x}", "z", [Concat(1)])]).keys
    assert key.shape == (2, 7)


def test_joining_does_not_import_sympy():
    script = (
        "import sys, torch; from warmstart.mapping.conversions.conversion import Conversion; "
        "from warmstart.mapping.conversions.converting import convert; from warmstart.mapping.keys import Key; "
        "keys = [Key(n, n, n, (2,), torch.half) for n in ('a.0.x', 'a.1.x', 'a.0.y', 'a.1.y')]; "
        "ops = [{'stack': {'over': 'i', 'dim': 0}}, {'concat': {'dim': 0}}, {'split': {'dim': 0, 'sizes': [1, 3]}}]; "
        "(b, c) = convert(keys, [Conversion(['a.{i}.x', 'a.{i}.y'], ['b', 'c'], ops)]).keys; "
        "assert (b.shape, c.shape) == ((1, 2), (3, 2)); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_huge_empty_tensor_is_not_taken_apart(convert_names):
    (error,) = convert_names(["a"], Conversion("a", "b.{i}", [Unstack("i", 0)]), shape=(10**12, 0)).errors
    assert "1,000,000,000,000 tensors" in error.message
    (error,) = convert_names(["a"], Conversion("a", "b.{i}", [Unstack("i", 0)]), shape=(0, 4)).errors
    assert "0 tensors" in error.message


def test_wanted_sizes_that_do_not_add_up(convert_names):
    def resolved(wanted):
        (key, *_) = convert_names(["w"], Conversion("w", ["q", "k", "v"], [Split(0)]), shape=(8, 3)).keys
        key.made.resolve(wanted)

    with pytest.raises(MappingError, match=re.escape("the targets want 4 + 2 + 4 of dim 0, and (8, 3) has 8")):
        resolved([(4, 3), (2, 3), (4, 3)])
    with pytest.raises(MappingError, match=re.escape("want 4 + ? + ? of dim 0")):
        resolved([(4, 3), None, None])
    with pytest.raises(MappingError, match="it has no 3 equal parts"):
        resolved([None, None, None])
