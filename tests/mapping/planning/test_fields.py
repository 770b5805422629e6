"""`convert`, `adapt`, `fill` and `match` inside a plan: buckets, errors, and what is written."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import warmstart
from warmstart import (
    AdaptInChannels,
    Concat,
    Conversion,
    MappingError,
    MapRows,
    Pretrained,
    ResizePosEmbed,
    SliceOrPad,
    Split,
    Stack,
)


def kinds(plan) -> list[str]:
    return [problem.kind for problem in plan.errors]


class Grouped(nn.Module):
    """Grouped-query attention: 4 query rows, 2 of keys and of values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, n, bias=False) for n in (4, 2, 2))


def stack(layers: int) -> nn.Module:
    root = nn.Module()
    root.layers = nn.ModuleList(Grouped() for _ in range(layers))
    return root


# ---- convert ----


def test_a_split_takes_its_sizes_from_the_entries_under_a_prefix_that_is_inferred():
    model, fused = stack(2), {f"model.layers.{i}.qkv.weight": torch.randn(8, 3) for i in range(2)}
    convert = [Conversion("{p...}.qkv.weight", [f"{{p...}}.{x}.weight" for x in "qkv"], [Split(0)])]
    plan = warmstart.plan(model, fused, convert=convert)
    assert plan.prefix == ("model", "")
    assert plan.mapping["layers.1.k.weight"] == ("model.layers.1.qkv.weight",)
    plan.apply()
    assert torch.equal(model.layers[1].v.weight, fused["model.layers.1.qkv.weight"][6:])


def test_targets_of_a_conversion_are_relative_to_into():
    model = nn.ModuleDict({"encoder": stack(1), "head": nn.Linear(2, 2)})
    fused = {"layers.0.qkv.weight": torch.randn(8, 3)}
    convert = {
        "sources": "layers.{i}.qkv.weight",
        "targets": [f"layers.{{i}}.{x}.weight" for x in "qkv"],
        "ops": [{"split": {"dim": 0}}],
    }
    report = warmstart.load(model, fused, into="encoder", convert=[convert])
    assert torch.equal(model["encoder"].layers[0].q.weight, fused["layers.0.qkv.weight"][:4])
    assert report.excluded == ("head.bias", "head.weight")


def test_a_student_takes_every_second_layer_of_its_teacher():
    teacher = {
        f"layers.{i}.{x}.weight": torch.full((4 if x == "q" else 2, 3), float(i)) for i in range(6) for x in "qkv"
    }
    model = stack(3)
    convert = [Conversion("layers.{2*i}.{r...}", "layers.{i}.{r...}")]
    plan = warmstart.plan(model, teacher, convert=convert)
    assert kinds(plan) == ["unexpected"]  # the odd layers go nowhere, and that has to be said
    report = warmstart.load(model, teacher, convert=convert, allow_unexpected="layers")
    assert [int(layer.q.weight[0, 0]) for layer in model.layers] == [0, 2, 4]
    assert report.mapping["layers.1.q.weight"] == ("layers.2.q.weight",)
    assert sorted(report.unexpected) == sorted(f"layers.{i}.{x}.weight" for i in (1, 3, 5) for x in "qkv")


def test_a_copy_goes_to_several_targets():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    source = nn.Linear(2, 2).state_dict()
    report = warmstart.load(
        model, {f"enc.{k}": v for k, v in source.items()}, convert=[Conversion("enc.{x}", ["a.{x}", "b.{x}"])]
    )
    assert torch.equal(model["a"].weight, source["weight"])
    assert torch.equal(model["b"].weight, source["weight"])
    assert model["a"].weight is not model["b"].weight
    assert report.coverage == 1


def test_what_a_conversion_makes_may_be_adapted_cast_and_mismatched():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    state = {"e.0": torch.randn(3), "e.1": torch.randn(3)}
    convert = [Conversion("e.{i}", "w", [Stack("i", 0)])]
    plan = warmstart.plan(model, state, convert=convert)
    assert kinds(plan) == ["nothing matched", "mismatched"]
    assert plan.mismatched["w"] == (("e.0", "e.1"), (2, 3), (5, 3))
    report = warmstart.load(model, state, convert=convert, adapt={"w": SliceOrPad(7.0)})
    assert torch.equal(model.w[:2], torch.stack([state["e.0"], state["e.1"]]).double())
    assert (model.w[2:] == 7).all()
    assert report.coverage == pytest.approx(6 / 15)


def test_an_incomplete_instance_is_one_error_that_names_what_lacks():
    state = {
        "layers.0.q.weight": torch.randn(4, 3),
        "layers.0.k.weight": torch.randn(2, 3),
        "layers.1.q.weight": torch.randn(4, 3),
    }
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(3, 6, bias=False) for _ in range(2))
    convert = [Conversion(["layers.{i}.q.weight", "layers.{i}.k.weight"], "layers.{i}.weight", [Concat(0)])]
    plan = warmstart.plan(model, state, convert=convert)
    (problem,) = [p for p in plan.errors if p.kind == "incomplete"]
    assert "layers.1.k.weight" in str(problem)
    assert "unexpected" not in kinds(plan)


def test_an_output_that_fits_nothing_is_an_error_although_its_key_is_used(fingerprint):
    model = nn.Linear(3, 4, bias=False)
    before = fingerprint(model)
    convert = [Conversion("kv", ["weight", "valeu"], [Split(0, [4, 4])])]
    with pytest.raises(MappingError, match=r"makes 'valeu', \(4, 3\), which fits nothing"):
        warmstart.load(model, {"kv": torch.randn(8, 3)}, convert=convert)
    assert fingerprint(model) == before


def test_a_conversion_that_hits_nothing_is_an_error_unless_it_is_optional():
    model, source = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
    plan = warmstart.plan(model, source, convert=[Conversion("wieght", "weight")])
    assert kinds(plan) == ["unused"]
    assert "'weight'" in str(plan.errors[0])
    assert not warmstart.plan(model, source, convert=[Conversion("?wieght", "weight")]).errors


def test_pretrained_with_conversions_and_adapters_is_plain_data():
    rules = {
        "convert": [{"sources": ["e.{i}"], "targets": ["w"], "ops": [{"stack": {"over": "i", "dim": 0}}]}],
        "adapt": {"pos": {"resize_pos_embed": {"prefix_tokens": 0, "src_grid": [2, 3], "dst_grid": [3, 2]}}},
        "fill": {"gain": 1},
        "match": "suffix",
    }
    pretrained = Pretrained("file.safetensors", **rules)
    assert pretrained.convert == [Conversion(["e.{i}"], ["w"], [Stack("i", 0)])]
    assert pretrained.adapt == {"pos": ResizePosEmbed(prefix_tokens=0, src_grid=(2, 3), dst_grid=(3, 2))}
    again = Pretrained("file.safetensors", **pretrained.rules())
    assert again.rules() == pretrained.rules()
    assert pickle.loads(pickle.dumps(pretrained)).rules() == pretrained.rules()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"convert": "a"}, "convert='a'"),
        ({"convert": [{"sources": "a"}]}, "targets"),
        ({"convert": [{"sources": "a", "targets": "b", "ops": [{"stak": {}}]}]}, "stak"),
        ({"adapt": {"a": {"resize": {}}}}, "resize_pos_embed"),
        ({"adapt": {"a": {"map_rows": {"olds": []}}}}, "olds"),
        ({"adapt": [1]}, "adapt"),
        ({"fill": {"a": "x"}}, "fill"),
        ({"fill": {"": 1.0}}, "empty pattern"),
        ({"match": "longest"}, 'match="suffix"'),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_when_they_are_written(fields, words):
    with pytest.raises((MappingError, TypeError), match=words):
        Pretrained("x", **fields)


# ---- adapt ----


def test_an_adapter_that_is_not_named_is_never_applied():
    plan = warmstart.plan(nn.Embedding(5, 2), {"weight": torch.zeros(3, 2)})
    assert "mismatched" in kinds(plan)
    assert not plan.assignments


def test_an_adapter_that_does_not_fit_names_the_entry_and_both_shapes():
    model = nn.Conv2d(1, 2, 3, bias=False)
    plan = warmstart.plan(model, {"weight": torch.zeros(4, 3, 3, 3)}, adapt={"weight": AdaptInChannels()})
    assert "adapter" in kinds(plan)
    assert "mismatched" not in kinds(plan)
    problem = next(p for p in plan.errors if p.kind == "adapter")
    assert "'weight'" in str(problem)
    assert "(4, 3, 3, 3)" in str(problem)
    assert "(2, 1, 3, 3)" in str(problem)


def test_two_patterns_with_different_adapters_for_one_entry_are_an_error():
    plan = warmstart.plan(
        nn.Embedding(5, 2), {"weight": torch.zeros(3, 2)}, adapt={"weight": SliceOrPad(0.0), "*": SliceOrPad(1.0)}
    )
    assert kinds(plan) == ["adapter"]


def test_a_pattern_of_adapt_without_a_hit_is_an_error():
    plan = warmstart.plan(nn.Linear(2, 2), nn.Linear(2, 2), adapt={"wieght": SliceOrPad()})
    assert kinds(plan) == ["unused"]
    assert "'weight'" in str(plan.errors[0])


def test_rows_may_be_permuted_at_equal_shape():
    model, rows = nn.Embedding(3, 2), torch.randn(3, 2)
    warmstart.load(model, {"weight": rows}, adapt={"weight": MapRows(["a", "b", "c"], ["c", "a", "b"])})
    assert torch.equal(model.weight, rows[[2, 0, 1]])


def test_kept_rows_survive_the_check_when_training_starts():
    model, rows = nn.Embedding(4, 2), torch.randn(2, 2)
    own = model.weight.detach().clone()
    report = warmstart.load(
        model, {"weight": rows}, adapt={"weight": MapRows(["a", "b"], ["x", "b", "a", "y"], new_rows="keep")}
    )
    assert torch.equal(model.weight, torch.stack([own[0], rows[1], rows[0], own[3]]))
    report.check(model)
    with torch.no_grad():
        model.weight[1, 0] += 1
    with pytest.raises(warmstart.VerificationError):
        report.check(model)


def test_adapted_values_are_verified_from_a_file_after_a_cast_of_the_host(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.randn(1, 5, 8)}, tmp_path / "pos.safetensors")
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1, 10, 8))
    report = warmstart.load(model, tmp_path / "pos.safetensors", adapt={"weight": ResizePosEmbed(prefix_tokens=1)})
    model.bfloat16()
    report.check(model)


# ---- fill ----


def test_fill_gives_a_constant_and_says_so():
    model = nn.LSTM(2, 3)
    state = {k: v for k, v in nn.LSTM(2, 3).state_dict().items() if k != "bias_hh_l0"}
    report = warmstart.load(model, state, fill={"bias_hh_l0": 0})
    assert torch.equal(model.bias_hh_l0, torch.zeros(12))
    assert report.mapping["bias_hh_l0"] == ()
    assert report.coverage == pytest.approx(
        1 - 12 / sum(p.numel() for p in model.parameters())
    )  # a constant is not loaded
    assert "constant 0" in str(report)
    report.check(model)


def test_fill_and_a_key_for_one_entry_are_an_error_also_through_a_tie():
    model, source = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
    assert kinds(warmstart.plan(model, source, fill={"bias": 0})) == ["fill"]
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    plan = warmstart.plan(tied, {"a.weight": torch.ones(2, 2)}, fill={"b.weight": 0})
    assert kinds(plan) == ["fill"]


@pytest.mark.parametrize(
    ("fill", "kind"),
    [
        ({"nothing": 0}, "unused"),
        ({"head": 0}, "fill"),
        ({"body.bias": 0, "body": 1}, "fill"),
        ({"count": 0.5}, "fill"),
    ],
)
def test_a_fill_that_cannot_be_meant_is_an_error(fill, kind):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    scope = {} if "count" in fill else {"into": "body"}
    plan = warmstart.plan(model, {"weight": torch.zeros(2, 2)}, fill=fill, allow_missing="*", **scope)
    assert kind in kinds(plan)


def test_ones_and_filled_entries_are_frozen_with_what_was_loaded():
    model = nn.Linear(2, 2)
    report = warmstart.load(model, {"weight": torch.ones(2, 2)}, fill={"bias": 1}, freeze=True)
    assert report.frozen.names == ("bias", "weight")


# ---- match ----


def test_suffixes_are_opt_in_and_ties_name_their_rivals():
    model = nn.ModuleDict({"block1": nn.ModuleDict({"layer1": nn.Linear(2, 3)}), "layer2": nn.Linear(3, 2)})
    state = {
        "layer1.weight": torch.ones(3, 2),
        "layer1.bias": torch.ones(3),
        "y.layer2.weight": torch.ones(2, 3),
        "y.layer2.bias": torch.ones(2),
    }
    assert warmstart.plan(model, state).errors
    report = warmstart.load(model, state, match="suffix")
    assert report.mapping["block1.layer1.weight"] == ("layer1.weight",)
    assert (model["layer2"].bias == 1).all()
    two = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    plan = warmstart.plan(two, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, match="suffix", allow_missing="*")
    assert "ambiguous" in kinds(plan)
    assert all(name in plan.explain() for name in ("'weight'", "'a.weight'", "'b.weight'"))


# ---- several sources ----


def test_field_note_47_a_filled_entry_of_one_source_and_a_key_of_another_overlap():
    model = nn.Linear(2, 2)
    parts = [Pretrained({"weight": torch.ones(2, 2)}, fill={"bias": 0}), Pretrained({"bias": torch.ones(2)})]
    plan = warmstart.plan(model, parts)
    assert kinds(plan) == ["overlap"]
    assert "a constant" in str(plan.errors[0])


# ---- errors whose line to type works ----


def test_two_conversions_to_one_name_leave_no_key_without_a_bucket():
    model = nn.Module()
    model.s = nn.Parameter(torch.zeros(4))
    plan = warmstart.plan(
        model, {"x": torch.ones(4), "y": torch.ones(4)}, convert=[Conversion("x", "s"), Conversion("y", "s")]
    )
    assert "collision" in kinds(plan)
    assert (plan.mapping, plan.unexpected) == ({"s": ("x",)}, ("y",))


def test_an_adapter_that_cannot_fit_may_be_allowed_as_a_mismatch():
    model = nn.Conv2d(1, 2, 3)
    state = {"weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(2)}
    adapt = {"weight": AdaptInChannels()}
    assert 'allow_mismatched=["weight"]' in warmstart.plan(model, state, adapt=adapt).explain()
    plan = warmstart.plan(model, state, adapt=adapt, allow_mismatched=["weight"])
    assert plan.errors == ()
    assert list(plan.mismatched) == ["weight"]


def test_one_wrong_adapter_at_many_entries_is_one_error():
    model = nn.ModuleList(nn.Conv2d(1, 2, 3, bias=False) for _ in range(24))
    state = {f"{i}.weight": torch.zeros(4, 3, 3, 3) for i in range(24)}
    plan = warmstart.plan(model, state, adapt={"*.weight": AdaptInChannels()})
    assert kinds(plan).count("adapter") == 1
    assert len(plan.explain().splitlines()) <= 40
    assert "24 entries" in plan.explain()
    assert "{0-23}.weight" in plan.explain()


def test_a_hole_among_the_experts_is_named():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(12, 2))
    state = {f"e.{i}": torch.zeros(2) for i in range(12) if i != 7}
    plan = warmstart.plan(model, state, convert=[Conversion("e.{i}", "w", [Stack("i", 0)])])
    assert kinds(plan)[0] == "incomplete"
    assert "'e.7'" in plan.explain()


def test_a_failed_conversion_is_not_blamed_on_select():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2))
    plan = warmstart.plan(model, {"q": torch.zeros(2)}, convert=[Conversion(["q", "k"], "w", [Concat(0)])])
    assert "select=" not in plan.explain()


def test_an_output_that_is_not_needed_may_be_allowed():
    model = nn.Linear(3, 4, bias=False)
    convert = [Conversion("kv", ["weight", "value"], [Split(0, [4, 4])])]
    plan = warmstart.plan(model, {"kv": torch.randn(8, 3)}, convert=convert)
    assert 'allow_unexpected=["kv"]' in plan.explain()
    assert not warmstart.plan(model, {"kv": torch.randn(8, 3)}, convert=convert, allow_unexpected=["kv"]).errors


def test_a_permutation_of_the_model_s_own_rows_is_verified():
    model = nn.Embedding(2, 3)
    own = model.weight.detach().clone()
    report = warmstart.load(model, model.state_dict(), adapt={"weight": MapRows(None, [1, 0])})
    assert torch.equal(model.weight, own[[1, 0]])
    report.check(model)
