from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart import MappingError
from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.ops.applying import Apply
from warmstart.mapping.conversions.ops.joining import Concat, Split
from warmstart.mapping.conversions.ops.layout import Permute, Reshape, RopePermute, Transpose
from warmstart.mapping.conversions.ops.stacking import Stack, Unstack
from warmstart.tensors import same_bits


def test_experts_are_stacked_in_natural_order(run):
    tensors = {f"l.{i}.experts.{e}.w": torch.full((2, 2), 100.0 * i + e) for i in range(11) for e in range(12)}
    names = list(tensors)
    random.Random(0).shuffle(names)
    result = run({name: tensors[name] for name in names}, Conversion("l.{i}.experts.{e}.w", "l.{i}.w", [Stack("e", 0)]))
    assert len(result.made) == 11
    for i in range(11):
        assert result.made[f"l.{i}.w"][:, 0, 0].tolist() == [100.0 * i + e for e in range(12)]
    assert result.undone.keys() == tensors.keys()


def test_gate_and_up_of_a_mixture_of_experts(run):
    """transformers' `MergeModulelist(dim=0)` and `Concatenate(dim=1)`."""
    w = {n: [torch.randn(6, 4) for _ in range(12)] for n in ("w1", "w3")}
    tensors = {f"model.layers.0.experts.{e}.{n}.weight": w[n][e] for n in w for e in range(12)}
    fused = Conversion(
        ["model.layers.{i}.experts.{e}.w1.weight", "model.layers.{i}.experts.{e}.w3.weight"],
        "layers.{i}.mlp.gate_up_proj",
        [Stack("e", 0), Concat(1)],
    )
    result = run(tensors, fused)
    expected = torch.cat([torch.stack(w["w1"]), torch.stack(w["w3"])], dim=1)
    assert torch.equal(result.made["layers.0.mlp.gate_up_proj"], expected)
    assert result.undone.keys() == tensors.keys()


def test_fused_qkv_of_grouped_query_attention(run):
    wqkv = {
        f"layers.{i}.wqkv.{p}": torch.randn(*s) for i in range(3) for p, s in (("weight", (16, 8)), ("bias", (16,)))
    }
    apart = Conversion("layers.{i}.wqkv.{p}", [f"h.{{i}}.{n}_proj.{{p}}" for n in "qkv"], [Split(0)])
    rows = {"q": 8, "k": 4, "v": 4}
    entries = {f"h.{i}.{n}_proj.weight": (rows[n], 8) for i in range(3) for n in rows}
    entries |= {f"h.{i}.{n}_proj.bias": (rows[n],) for i in range(3) for n in rows}
    result = run(wqkv, apart, entries=entries)
    for i in range(3):
        for p in ("weight", "bias"):
            q, k, v = wqkv[f"layers.{i}.wqkv.{p}"].split([8, 4, 4])
            assert torch.equal(result.made[f"h.{i}.q_proj.{p}"], q)
            assert torch.equal(result.made[f"h.{i}.k_proj.{p}"], k)
            assert torch.equal(result.made[f"h.{i}.v_proj.{p}"], v)
    together = run(result.made, apart.inverse())
    assert together.made.keys() == wqkv.keys()
    assert all(torch.equal(together.made[name], wqkv[name]) for name in wqkv)


def test_gpt_2_keeps_its_linear_weights_transposed(run):
    """`Conv1D` is (in, out): transpose, then split; the same function comes out."""
    weight, bias, x = torch.randn(8, 24), torch.randn(24), torch.randn(5, 8)
    result = run(
        {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": bias},
        Conversion("h.{i}.attn.c_attn.weight", [f"l.{{i}}.{n}.weight" for n in "qkv"], [Transpose(0, 1), Split(0)]),
        Conversion("h.{i}.attn.c_attn.bias", [f"l.{{i}}.{n}.bias" for n in "qkv"], [Split(0)]),
    )
    made = [x @ result.made[f"l.0.{n}.weight"].T + result.made[f"l.0.{n}.bias"] for n in "qkv"]
    torch.testing.assert_close(torch.cat(made, 1), x @ weight + bias)


def test_a_student_from_every_second_teacher_layer(run):
    teacher = {f"layers.{i}.{n}": torch.full((1,), float(i)) for i in range(12) for n in ("a.w", "b")}
    result = run(teacher, Conversion("layers.{2*i}.{r...}", "layers.{i}.{r...}"))
    assert {name: int(t) for name, t in result.made.items()} == {
        f"layers.{i}.{n}": 2 * i for i in range(6) for n in ("a.w", "b")
    }
    # What the teacher calls layer 1, 3, 5 is displaced by what becomes layer 1, 3, 5; 7, 9, 11 stay as they are.
    assert [key.name for key in result.plan.displaced] == [f"layers.{i}.{n}" for i in (1, 3, 5) for n in ("a.w", "b")]
    plain = [key.name for key in result.plan.keys if key.made is None]
    assert plain == sorted(f"layers.{i}.{n}" for i in (7, 9, 11) for n in ("a.w", "b"))


def test_x_21_a_digit_in_a_segment_before_is_not_the_layer(convert_names):
    plan = convert_names(["enc2.layers.7.w"], Conversion("enc2.layers.{i}.w", "h.{i}.w"))
    assert [key.name for key in plan.keys] == ["h.7.w"]


def test_a_rest_of_no_segments_and_of_several(convert_names):
    plan = convert_names(["a.w", "a.b.w", "a.b.c.w"], Conversion("a.{r...}.w", "z.{r...}.v"))
    assert [key.name for key in plan.keys] == ["z.b.c.v", "z.b.v", "z.v"]


def test_virtual_keys_stand_in_the_pool_like_any_other(convert_names):
    plan = convert_names(["x", "q.0", "q.1"], Conversion("q.{i}", "p", [Stack("i", 0)]), shape=(4, 2), dtype=torch.half)
    p, x = plan.keys
    assert (p.spelled, p.clean, p.name, p.shape, p.dtype, p.output) == ("p", "p", "p", (2, 4, 2), torch.half, 0)
    assert p.made.label == "q.{i} -> p by Stack(over='i', dim=0)"
    assert p.sources == ("file.q.0", "file.q.1")
    assert (x.spelled, x.made) == ("file.x", None)


def test_shapes_that_wait_for_the_entries_they_go_to(convert_names):
    plan = convert_names(["w"], Conversion("w", ["q", "k"], [Split(0)]))
    assert [key.shape for key in plan.keys] == [None, None]
    made = plan.keys[0].made
    made.resolve([(3, 2), (1, 2)])
    assert made.shapes == [(3, 2), (1, 2)]
    assert made.dtypes == [torch.float32] * 2


def test_one_source_copied_to_each_target(run):
    w = torch.tensor([0.0, -0.0, float("nan")])
    result = run({"emb": w}, Conversion("emb", ["a", "b"]))
    assert same_bits(result.made["a"], w)
    assert same_bits(result.made["b"], w)
    (derived,) = {key.made for key in result.plan.keys}
    with pytest.raises(MappingError, match=r"'a' and 'b' are copies of 'file.emb' and differ"):
        derived.undo([w, w.abs()])


def test_a_source_without_the_shared_placeholder_joins_every_instance(run):
    tensors = {"scale": torch.tensor([2.0]), "l.0.w": torch.tensor([3.0]), "l.1.w": torch.tensor([5.0])}
    result = run(tensors, Conversion(["l.{i}.w", "scale"], "l.{i}.v", [Apply(lambda t: [t[0] * t[1]])]))
    assert {name: t.item() for name, t in result.made.items()} == {"l.0.v": 6.0, "l.1.v": 10.0}


def test_an_incomplete_instance_names_itself_and_what_it_lacks(convert_names):
    qkv = Conversion([f"l.{{i}}.{n}" for n in "qkv"], "l.{i}.qkv", [Concat(0)])
    plan = convert_names(["l.2.q", "l.2.k", "l.10.q", "l.0.q", "l.0.k", "l.0.v"], qkv)
    (error,) = plan.errors
    assert error.kind == "incomplete"
    assert "    i=2: no 'l.2.v'\n    i=10: no 'l.10.k', 'l.10.v'" in error.message
    assert set(error.names) == {"file.l.2.q", "file.l.2.k", "file.l.10.q"}
    assert [key.name for key in plan.failed] == ["l.10.q", "l.2.k", "l.2.q"]
    assert [key.name for key in plan.keys] == ["l.0.qkv"]


def test_a_gap_in_what_is_gathered_makes_an_instance_incomplete(convert_names):
    both = Conversion(["l.{i}.{e}.a", "l.{i}.{e}.b"], "l.{i}.ab", [Stack("e", 0), Concat(1)])
    names = [f"l.0.{e}.{n}" for e in range(11) for n in "ab" if (e, n) != (9, "b")]
    (error,) = convert_names(names, both).errors
    assert "i=0: no 'l.0.9.b'" in error.message
    grid = Conversion("x.{i}.{j}", "y", [Stack("i", 0), Stack("j", 0)])
    (error,) = convert_names(["x.0.0", "x.0.1", "x.1.0"], grid).errors
    assert "no 'x.1.1'" in error.message


def test_a_shared_source_alone_is_incomplete(convert_names):
    (error,) = convert_names(["n.3"], Conversion(["l.{i}.{h}", "n.{i}"], "z.{i}.{h}", [Concat(0)])).errors
    assert error.kind == "incomplete"
    assert "i=3: no 'l.3.{h}'" in error.message


def test_a_conversion_that_matches_nothing(convert_names):
    (error,) = convert_names(["layers.0.weight"], Conversion("layer.{i}.weight", "h.{i}.weight")).errors
    assert error.kind == "unused"
    assert "did you mean 'layers.0.weight'?" in error.message
    assert "start a source with '?'" in error.message
    assert convert_names(["layers.0.weight"], Conversion("?layer.{i}.weight", "h.{i}.weight")).errors == []


def test_one_key_in_two_conversions(convert_names):
    plan = convert_names(["a.w"], Conversion("{x}.w", "{x}.v"), Conversion("a.{y}", "b.{y}"))
    (error,) = plan.errors
    assert error.kind == "collision"
    assert "'a.w' is taken both by the source '{x}.w' of conversion 1 and by the source 'a.{y}' of con" in error.message
    twice = Conversion(["{x}.w", "a.{y}"], "z", [Concat(0)])
    assert "'a.w' is taken both by" in convert_names(["a.w"], twice).errors[-1].message


def test_two_outputs_of_one_name(convert_names):
    (error,) = convert_names(["a", "b"], Conversion("a", "c"), Conversion("b", "c")).errors
    assert error.kind == "collision"
    assert "'c' is made both by a -> c and by b -> c" in error.message
    (error,) = convert_names(["l.0.a", "l.1.a"], Conversion("l.{i}.a", ["m.{i}", "a"])).errors
    assert "'a' is made by two instances of l.{i}.a -> m.{i}, a" in error.message


@pytest.mark.parametrize(
    "name", ["a.(b|c)+", "a.{i}", "a.{r...}", "a..w", ".", "", "a.\x1b[31m", "a.$^", "a." + "x" * 10_000, "a.\\1"]
)
def test_hostile_names_are_renamed_as_they_are(convert_names, name):
    plan = convert_names([name, "zz"], Conversion("{r...}", "new.{r...}"))
    assert [key.name for key in plan.keys] == sorted(["new." + name, "new.zz"])
    (error,) = convert_names([name], Conversion("{r...}", "n.{r...}", [Transpose(0, 7)])).errors
    assert "\x1b" not in error.message
    assert len(error.message) < 1500


def test_one_fault_of_many_instances_is_one_error(convert_names):
    plan = convert_names([f"l.{i}.w" for i in range(1000)], Conversion("l.{i}.w", "h.{i}", [Transpose(0, 5)]))
    (error,) = plan.errors
    assert "i=0: Transpose" in error.message
    assert "and 999 more instances" in error.message


def test_the_order_of_keys_changes_nothing(convert_names):
    names = [f"l.{i}.{e}.{n}" for i in range(3) for e in range(3) for n in "abc"] + ["l.9.0.a", "h.0"]
    rules = (
        Conversion(["l.{i}.{e}.a", "l.{i}.{e}.b"], "h.{i}", [Stack("e", 0), Concat(0)]),
        Conversion("l.{i}.{e}.c", "h.0", [Stack("e", 0), Stack("i", 0)]),
    )

    def outcome(order):
        plan = convert_names(order, *rules)
        return (
            [(key.name, key.shape, key.sources) for key in plan.keys],
            plan.errors,
            [key.name for key in plan.displaced],
            [key.name for key in plan.failed],
        )

    expected = outcome(names)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert outcome(names) == expected


def test_no_inverse_is_said_in_a_few_words(convert_names):
    (key,) = convert_names(["a"], Conversion("a", "b", [Transpose(0, 1), Apply("torch:atleast_1d")])).keys
    assert key.made.no_inverse == "Apply(torch:atleast_1d) has no inverse="
    (key,) = convert_names(["a"], Conversion("a", "b", [Reshape([-1])])).keys
    assert key.made.no_inverse is None


def test_one_input_at_a_time_is_held_while_joining(convert_names):
    """Memory is the result and one input: each input is let go before the next is read."""
    import weakref

    fused = Conversion(["{e}.a", "{e}.b"], "ab", [Transpose(0, 1), Stack("e", 0), Concat(1)])
    (key,) = convert_names([f"{e}.{n}" for e in range(12) for n in "ab"], fused, shape=(3, 2)).keys
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(number: int) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = torch.full((3, 2), float(number))
        alive.append(weakref.ref(tensor))
        return tensor

    (made,) = key.made.run(read)
    assert len(alive) == 24
    assert made[:, 0, 0].tolist() == [float(e) for e in range(12)]
    assert made[:, 2, 0].tolist() == [float(12 + e) for e in range(12)]


def test_a_source_is_read_once(convert_names):
    plan = convert_names(["w"], Conversion("w", ["a.{k}", "b.{k}"], [Split(0, [2, 2]), Unstack("k", 0)]))
    reads: list[int] = []
    outputs = plan.keys[0].made.run(lambda i: reads.append(i) or torch.arange(8.0).reshape(4, 2))
    assert reads == [0]
    assert [t.tolist() for t in outputs] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_planning_is_linear_in_the_number_of_keys(convert_names):
    names = [f"model.layers.{i}.block.{j}.weight" for i in range(1000) for j in range(100)]
    rules = (
        Conversion("{p...}.layers.{2*i}.block.7.{r...}", "h.{i}.{p...}.{r...}", [Transpose(0, 1)]),
        Conversion(["model.layers.{i}.block.0.weight", "model.layers.{i}.block.1.weight"], "f.{i}", [Concat(0)]),
        Conversion("model.layers.{i}.block.99.weight", ["g.{i}.q", "g.{i}.k"], [Split(0)]),
    )
    start = time.process_time()
    plan = convert_names(names, *rules)
    assert time.process_time() - start < 10  # measured: under 1 s
    assert plan.errors == []
    assert len(plan.keys) == 100_000 - 500 - 2000 - 1000 + 500 + 1000 + 2000


@st.composite
def chains(draw):
    """Ops that fit a tensor (or `n` of them, gathered) one after the other, and the number of results."""
    count = draw(st.integers(1, 12))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    ops, gathered = [], True
    current = list(shape)
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["transpose", "permute", "reshape", "rope", "join", "split", "apply"]))
        dim = draw(st.integers(-len(current), len(current) - 1))
        if kind == "transpose":
            other = draw(st.integers(0, len(current) - 1))
            ops.append(Transpose(dim, other))
            current[dim], current[other] = current[other], current[dim]
        elif kind == "permute":
            order = draw(st.permutations(range(len(current))))
            ops.append(Permute(order))
            current = [current[d] for d in order]
        elif kind == "reshape":
            current = draw(st.sampled_from([[-1], [1, -1], [current[0], -1]]))
            ops.append(Reshape(current))
            numel = int(torch.tensor(shape).prod()) * (count if not gathered else 1)
            known = -int(torch.tensor(current).prod())
            current = [numel // known if size == -1 else size for size in current]
        elif kind == "rope" and len(current) <= 2 and current[0] % 2 == 0:
            ops.append(RopePermute(1))
        elif kind == "join" and gathered:
            gathered = False
            if draw(st.booleans()):
                ops.append(Stack("e", dim))
                current.insert(dim if dim >= 0 else len(current) + 1 + dim, count)
            else:
                ops.append(Concat(dim))
                current[dim] *= count
        elif kind == "split" and not gathered:
            first = draw(st.integers(0, current[dim]))
            ops += [
                Split(dim, [first, current[dim] - first]),
                Apply(reverse, reverse),
                Apply(reverse, reverse),
                Concat(dim),
            ]
        elif kind == "apply" and not gathered:
            ops.append(Apply(negative, negative))
    if gathered:
        ops.append(Stack("e", 0))
        current.insert(0, count)
    if draw(st.booleans()):
        return count, shape, [*ops, Unstack("k", 0)], current[0]
    return count, shape, ops, None


def reverse(tensors):
    return tensors[::-1]


def negative(tensors):
    return [-t for t in tensors]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(chain=chains())
def test_every_chain_of_ops_comes_back_bit_for_bit(run, chain):
    count, shape, ops, parts = chain
    tensors = {f"x.{e}": torch.randn(shape) for e in range(count)}
    result = run(tensors, Conversion("x.{e}", "y" if parts is None else "y.{k}", ops))
    assert len(result.made) == (1 if parts is None else parts)
    assert result.undone.keys() == tensors.keys()
