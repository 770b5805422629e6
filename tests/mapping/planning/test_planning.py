"""The order of planning, step by step, on names, shapes and dtypes alone."""

from __future__ import annotations

import json

import pytest
import torch
from named import Header, net
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import warmstart
from warmstart import MappingError, Pretrained


def planned(entries, keys, **fields):
    return warmstart.plan(net(entries), Header(keys), **fields)


def kinds(plan) -> list[str]:
    return [problem.kind for problem in plan.errors]


def used(plan) -> dict[str, str]:
    return {target: keys[0] for target, keys in plan.mapping.items()}


# ---- 2. wrappers ----


@pytest.mark.parametrize("wrapped_model", [False, True])
@pytest.mark.parametrize("wrapped_source", [False, True])
def test_fv_1_wrapped_and_unwrapped_sources_and_models_fit_each_other(wrapped_model, wrapped_source):
    model, source = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)) for _ in range(2))
    target = nn.DataParallel(model) if wrapped_model else model
    state = (nn.DataParallel(source) if wrapped_source else source).state_dict()
    plan = warmstart.plan(target, state)
    plan.apply()
    assert plan.prefix is None
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert set(plan.mapping) == set(target.state_dict())  # both sides as they are spelled
    assert {keys[0] for keys in plan.mapping.values()} == set(state)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        checkpoint_wrapper,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
        lambda m: torch.compile(AveragedModel(nn.DataParallel(m)), backend="eager"),
    ],
)
def test_field_note_2_any_wrapper_takes_the_plain_file_and_the_reverse(wrap):
    plain, inner = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    wrapped = wrap(inner)
    forth = warmstart.load(wrapped, plain.state_dict())
    assert forth.coverage == 1
    assert any(torch.equal(tensor, plain[1].weight) for tensor in wrapped.parameters())
    fresh = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    back = warmstart.load(fresh, dict(wrapped.state_dict()), allow_unexpected="?*n_averaged")
    assert back.coverage == 1
    assert torch.equal(fresh[0].weight, plain[0].weight)


def test_field_note_2_wrappers_in_the_middle_of_the_tree():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 1)})
    model["encoder"][1] = checkpoint_wrapper(model["encoder"][1])
    model["encoder"] = nn.DataParallel(torch.compile(model["encoder"], backend="eager"))
    keys = {"encoder._fsdp_wrapped_module.0.weight": (2, 2), "encoder.0._orig_mod.bias": (2,),
            "module.encoder.1.weight": (2, 2), "encoder.1.bias": (2,),
            "_forward_module.head.module.weight": (1, 2), "head.bias": (1,)}  # fmt: skip
    plan = warmstart.plan(model, Header(keys))
    assert plan.errors == ()
    assert used(plan) == {
        "encoder.module._orig_mod.0.weight": "encoder._fsdp_wrapped_module.0.weight",
        "encoder.module._orig_mod.0.bias": "encoder.0._orig_mod.bias",
        "encoder.module._orig_mod.1._checkpoint_wrapped_module.weight": "module.encoder.1.weight",
        "encoder.module._orig_mod.1._checkpoint_wrapped_module.bias": "encoder.1.bias",
        "head.weight": "_forward_module.head.module.weight",
        "head.bias": "head.bias",
    }


def test_field_note_2_real_children_called_module_are_no_wrappers():
    entries = ["module.fc.w", "submodule.w", "base_module.w"]
    assert used(planned(entries, entries)) == {name: name for name in entries}
    # Saved under DataParallel all of it has one more `module.`, which is a prefix like any other then.
    plan = planned(entries, [f"module.{name}" for name in entries])
    assert used(plan) == {name: f"module.{name}" for name in entries}
    assert plan.prefix == ("module", "")
    # _orig_mod is no child of this model, so it is a wrapper's.
    assert used(planned(entries, [f"_orig_mod.{name}" for name in entries])) == {n: f"_orig_mod.{n}" for n in entries}


def test_field_note_2_real_module_children_under_a_real_wrapper():
    model = nn.DataParallel(net(["module.w", "fc.w"]))
    plan = warmstart.plan(model, Header(["module.module.w", "module.fc.w"]))
    assert plan.errors == ()
    assert used(plan) == {"module.module.w": "module.module.w", "module.fc.w": "module.fc.w"}
    assert used(warmstart.plan(model, Header(["module.w", "fc.w"]))) == {
        "module.module.w": "module.w", "module.fc.w": "fc.w"}  # fmt: skip


def test_x_5_all_wrapper_orders_are_stripped_and_what_collides_then_is_an_error():
    plan = planned(["x"], ["_orig_mod.module.x", "module._orig_mod.x", "module.module.x"])
    assert kinds(plan) == ["collision", "collision"]
    assert plan.errors[0].names == ("_orig_mod.module.x", "module._orig_mod.x")
    assert plan.errors[1].names == ("_orig_mod.module.x", "module.module.x")
    assert used(plan) == {"x": "_orig_mod.module.x"}
    assert plan.unexpected == ("module._orig_mod.x", "module.module.x")
    for key in ("_orig_mod.module.x", "module._orig_mod.x", "module.module.x"):
        assert used(planned(["x"], [key])) == {"x": key}


def test_a_wrapper_collision_is_settled_by_select_as_its_message_says():
    keys = ["_orig_mod.x", "module.x"]
    assert "select= takes keys as the file spells them" in planned(["x"], keys).errors[0].message
    plan = planned(["x"], keys, select="module.x")
    assert plan.errors == ()
    assert (used(plan), plan.ignored) == ({"x": "module.x"}, ("_orig_mod.x",))


def test_an_averaged_model_takes_its_own_state_dict():
    model = AveragedModel(nn.Linear(2, 2))
    plan = warmstart.plan(model, AveragedModel(nn.Linear(2, 2)).state_dict())
    assert plan.errors == ()
    assert plan.excluded == plan.ignored == ("n_averaged",)  # its counter is no weight
    assert kinds(warmstart.plan(nn.Linear(2, 2), model.state_dict())) == ["unexpected"]


# ---- 3. select ----


def test_select_narrows_the_source_and_the_rest_is_ignored():
    plan = planned(["a.w"], ["a.w", "b.w", "optimizer.m"], select="a")
    assert plan.errors == ()
    assert (used(plan), plan.ignored, plan.unexpected) == ({"a.w": "a.w"}, ("b.w", "optimizer.m"), ())


@pytest.mark.parametrize("select", ["module.a", "a", "module.a.w", ["a.*", "?gone"]])
def test_select_matches_keys_with_and_without_their_wrappers(select):
    plan = planned(["a.w"], ["module.a.w", "module.b.w"], select=select)
    assert plan.errors == ()
    assert plan.ignored == ("module.b.w",)


def test_mm_1_conv2d_does_not_take_conv2d_2():
    source = nn.ModuleDict({"linear": nn.Linear(1, 2), "conv2d": nn.Conv2d(3, 1, 3), "conv2d_2": nn.Conv2d(3, 2, 3)})
    for value, tensor in enumerate(source.state_dict().values(), start=1):
        tensor.fill_(value)
    model = nn.Conv2d(3, 1, 3)
    for fields in ({"select": "conv2d"}, {"select": "conv2d", "strip_prefix": "conv2d"}):
        nn.init.zeros_(model.weight)
        report = warmstart.load(model, source.state_dict(), **fields)
        assert report.mapping == {"weight": ("conv2d.weight",), "bias": ("conv2d.bias",)}
        assert (model.weight == 3).all()
        assert (model.bias == 4).all()
    with pytest.raises(MappingError, match=r"select='back' matches no checkpoint key"):
        warmstart.load(model, source.state_dict(), select="back")
    with pytest.raises(MappingError, match=r"strip_prefix='back' is the leading path of no checkpoint key"):
        warmstart.load(model, source.state_dict(), strip_prefix="back")


@pytest.mark.parametrize("fields", [{"select": "decoder"}, {"include": "decoder"}])
def test_x_3_decoder_is_a_segment_not_a_substring(fields):
    names = ["encoder.pre_decoder.w", "decoder.w"]
    plan = planned(names, names, **fields, allow_missing="?encoder")
    assert plan.errors == ()
    assert used(plan) == {"decoder.w": "decoder.w"}
    assert plan.ignored == ("encoder.pre_decoder.w",)


# ---- 4. strip_prefix, then rename ----


@pytest.mark.parametrize("prefix", ["enc", "enc.", "?enc"])
def test_strip_prefix_takes_a_leading_path_off_keys_that_have_it(prefix):
    plan = planned(["a.w", "enc2.w", "w.enc.b"], ["enc.a.w", "enc2.w", "w.enc.b"], strip_prefix=prefix)
    assert plan.errors == ()
    assert used(plan) == {"a.w": "enc.a.w", "enc2.w": "enc2.w", "w.enc.b": "w.enc.b"}
    assert plan.prefix is None


def test_rename_sees_what_strip_prefix_left():
    plan = planned(["new.w"], ["p.old.w"], strip_prefix="p", rename={"^old": "new"})
    assert used(plan) == {"new.w": "p.old.w"}
    assert "unused" in kinds(planned(["new.w"], ["p.old.w"], strip_prefix="p", rename={r"^p\.old": "new"}))


def test_a_given_prefix_switches_inference_off():
    assert used(planned(["a.w"], ["enc.a.w"])) == {"a.w": "enc.a.w"}
    assert kinds(planned(["a.w"], ["enc.a.w"], strip_prefix="")) == ["nothing matched"]
    assert used(planned(["m.a.w"], ["enc.a.w"], strip_prefix="enc", rename={"^": "m."})) == {"m.a.w": "enc.a.w"}


@pytest.mark.parametrize("text", ["enx", "encod"])
def test_a_prefix_that_no_key_has_is_an_error_unless_optional(text):
    plan = planned(["w"], ["w"], strip_prefix=text)
    assert kinds(plan) == ["unused"]
    assert f"strip_prefix={text!r} is the leading path of no checkpoint key" in plan.errors[0].message
    assert planned(["w"], ["w"], strip_prefix=f"?{text}").errors == ()


def test_a_wrapper_s_prefix_is_said_to_be_gone_already():
    plan = planned(["w"], ["module.w"], strip_prefix="module.")
    assert kinds(plan) == ["unused"]
    assert "it is removed as a wrapper's already: leave strip_prefix= out" in plan.errors[0].message
    plan = planned(["w"], ["module.w"], rename={r"^module\.": ""})
    assert "rules see 'w', without the wrapper segments of 'module.w'" in plan.errors[0].message


def test_a_prefix_that_is_not_the_best_is_a_hint_and_no_error_of_its_own():
    keys = ["a.w", "foo.a.b", "foo.b.w"]
    plan = planned(["a.w", "a.b", "b.w"], keys, strip_prefix="")
    assert kinds(plan) == ["missing", "unexpected"]
    assert "leave strip_prefix= out: strip 'foo' is inferred then, and 2 of 3 keys match" in plan.errors[1].message
    assert (
        planned(["a.w", "a.b", "b.w"], keys, strip_prefix="", allow_missing=["a.b", "b"], allow_unexpected="foo").errors
        == ()
    )
    # What select= left out is no reason to have stripped otherwise.
    assert (
        planned(["a.w", "b.w"], ["enc.a.w", "enc.b.w"], select="enc.a", strip_prefix="enc", allow_missing="b").errors
        == ()
    )


def test_mm_2_add_and_strip_a_prefix_by_rule():
    names = {"block.conv.weight": (3, 3, 1, 1), "block.norm.running_mean": (3,), "block.norm.num_batches_tracked": ()}
    deep = {f"backbone.{name}": shape for name, shape in names.items()}
    assert used(planned(deep, names, rename={"^": "backbone."})) == {f"backbone.{n}": n for n in names}
    assert used(planned(names, deep, rename={r"^backbone\.": ""})) == {n: f"backbone.{n}" for n in names}


def test_hf_4_and_x_9_rules_end_at_segment_boundaries():
    plan = planned(
        ["q_proj.w2", "q_proj.weight_scale_inv"], ["q_proj.weight", "q_proj.weight_scale_inv"], rename={"weight": "w2"}
    )
    assert used(plan) == {"q_proj.w2": "q_proj.weight", "q_proj.weight_scale_inv": "q_proj.weight_scale_inv"}
    assert used(planned(["qkv.query"], ["qkv.q"], rename={"q": "query"})) == {"qkv.query": "qkv.q"}


def test_a_swap_is_a_swap():
    assert used(planned(["a.w", "b.w"], ["a.w", "b.w"], rename={"a": "b", "b": "a"})) == {"a.w": "b.w", "b.w": "a.w"}


@pytest.mark.parametrize("rename", [{"^y$": "a", "^x$": "a"}, [{"^y$": "x2"}, {"^x2?$": "a"}]])
def test_x_7_two_sources_for_one_target_are_an_error_naming_both(rename):
    plan = planned(["a", "b"], ["x", "y", "b"], rename=rename)
    assert kinds(plan) == ["collision"]
    assert plan.errors[0].names == ("x", "y")
    assert "'x' and 'y' would both become 'a'; make the rule that renames them more exact" in plan.errors[0].message
    assert plan.unexpected == ("y",)  # no key is lost from the account


def test_x_7_a_renamed_key_and_one_that_has_the_name_already_collide():
    plan = planned(["a"], ["a", "x"], rename={"x": "a"})
    assert kinds(plan) == ["collision"]
    assert plan.errors[0].names == ("a", "x")


def test_tf_9_and_field_note_18_a_rule_that_hits_nothing_is_an_error_unless_optional():
    plan = planned(["x"], ["x"], rename={"y": "y2"})
    assert kinds(plan) == ["unused"]
    assert plan.errors[0].names == ("y",)
    assert "rename rule 'y' matches no checkpoint key in whole segments" in plan.errors[0].message
    assert planned(["x"], ["x"], rename={"?y": "y2"}).errors == ()


def test_a_rule_without_a_hit_names_its_stage_and_what_is_near():
    plan = planned(["enc.w"], ["encoder.w"], rename=[{"encoder": "enc"}, {"encodr": "x"}])
    assert "rename rule 'encodr' (stage 2) matches no checkpoint key in whole segments" in plan.errors[0].message
    assert "did you mean 'encoder'" in plan.errors[0].message


def test_tf_5_one_source_for_two_targets_is_not_what_rename_does():
    plan = planned(["v1", "v2"], ["v1"], rename={"v1": "v2"})
    assert (used(plan), plan.missing, kinds(plan)) == ({"v2": "v1"}, ("v1",), ["missing"])


def test_a_rule_that_is_no_regex_is_an_error_of_the_plan():
    assert kinds(planned(["x"], ["x"], rename={"(": ""})) == ["unused"]


NET1 = {
    "linear_1.weight": (10, 5),
    "linear_1.bias": (10,),
    "linear_2.weight": (5, 10),
    "linear_2.bias": (5,),
    "scalar": (),
}
NET2 = {
    "linear_1.weight": (10, 5),
    "linear_1.bias": (10,),
    "linear_3.weight": (5, 10),
    "linear_3.bias": (5,),
    "scalar": (),
}


def test_an_1_one_layer_only():
    plan = planned(NET1, NET2, include="linear_1", select="linear_1")
    assert plan.errors == ()
    assert sorted(plan.mapping) == ["linear_1.bias", "linear_1.weight"]
    assert plan.excluded == ("linear_2.bias", "linear_2.weight", "scalar")


def test_an_2_and_an_4_a_renamed_layer_and_a_scalar():
    plan = planned(NET1, NET2, rename={"linear_3": "linear_2"})
    assert plan.errors == ()
    assert plan.mapping["linear_2.weight"] == ("linear_3.weight",)
    assert plan.mapping["scalar"] == ("scalar",)


def test_an_3_a_renamed_layer_of_another_shape_is_an_error_with_both_shapes():
    plan = planned(
        NET1,
        NET2,
        rename={r"linear_3\.weight": "linear_1.weight", "linear_3": "linear_2"},
        select=["linear_3", "scalar"],
    )
    assert plan.mismatched == {"linear_1.weight": (("linear_3.weight",), (5, 10), (10, 5))}
    assert "linear_1.weight  checkpoint (5, 10), model (10, 5)" in plan.explain()


def test_an_7_an_unused_rule_and_what_keeps_its_init_are_both_listed():
    plan = planned(NET1, NET2, rename={"linear_9": "linear_2"}, select=["linear_1", "scalar"])
    assert kinds(plan) == ["unused", "missing"]
    assert plan.missing == ("linear_2.bias", "linear_2.weight")


# ---- 5. scope ----


def test_into_is_the_scope_and_what_lies_outside_is_excluded():
    plan = planned(["encoder.a", "encoder.b", "head.w"], ["a", "b"], into="encoder")
    assert plan.errors == ()
    assert (used(plan), plan.excluded) == ({"encoder.a": "a", "encoder.b": "b"}, ("head.w",))
    assert plan.coverage == 1


def test_into_is_a_segment_not_a_substring():
    plan = planned(["encoder.a", "encoder2.a"], ["a"], into="encoder")
    assert plan.errors == ()
    assert (used(plan), plan.excluded) == ({"encoder.a": "a"}, ("encoder2.a",))


def test_names_that_rules_produce_are_relative_to_into():
    assert used(planned(["encoder.a.w"], ["x.w"], into="encoder", rename={"x": "a"})) == {"encoder.a.w": "x.w"}
    plan = planned(["encoder.a.w"], ["x.w"], into="encoder", rename={"x": "encoder.a"}, strip_prefix="")
    assert kinds(plan) == ["nothing matched"]


def test_include_and_exclude_narrow_the_scope_by_whole_model_names():
    names = ["encoder.a", "encoder.b", "encoder.c", "head.w"]
    plan = planned(
        names, ["a", "b", "c"], into="encoder", include=["encoder.a", "encoder.b", "head"], exclude="encoder.b"
    )
    assert plan.errors == ()
    assert (used(plan), plan.excluded) == ({"encoder.a": "a"}, ("encoder.b", "encoder.c", "head.w"))
    assert plan.ignored == ("b", "c")


@pytest.mark.parametrize("into", ["encoder", "module.encoder", "encoder.module", "module.encoder.module"])
@pytest.mark.parametrize("spelled", ["encoder.{}", "module.encoder.module.{}"])
def test_into_and_patterns_are_spelled_with_or_without_wrappers(into, spelled):
    model = net(["encoder.a", "encoder.b", "encoder.c", "head"])
    model.encoder = nn.DataParallel(model.encoder)
    model = nn.DataParallel(model)
    plan = warmstart.plan(
        model,
        Header({"a": (2,), "c": (3,)}),
        into=into,
        allow_missing=spelled.format("b"),
        allow_mismatched=spelled.format("c"),
        freeze=[spelled.format("a"), "head"],
        exclude="?module.nothing",
    )
    if into == "encoder.module":  # neither the one nor the other spelling
        assert kinds(plan)[0] == "into"
        return
    assert (plan.errors, plan.prefix) == ((), None)
    assert used(plan) == {"module.encoder.module.a": "a"}
    assert (plan.missing, plan.excluded) == (("module.encoder.module.b",), ("module.head",))
    assert plan.mismatched == {"module.encoder.module.c": (("c",), (3,), (2,))}
    assert sorted(plan.freeze) == ["module.encoder.module.a", "module.head"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"into": "encodr"}, "into='encodr' is no module of the model (did you mean 'encoder'"),
        ({"into": "encoder.a"}, "into='encoder.a' is no module of the model"),  # a parameter
        ({"include": "head.x"}, "include='head.x' matches no model entry (did you mean 'head"),
        ({"exclude": "encodr"}, "exclude='encodr' matches no model entry (did you mean 'encoder'"),
        ({"exclude": "*"}, "nothing of the model is in scope; widen into=, include= or exclude="),
        ({"into": "encoder", "include": "head"}, "nothing of the model is in scope"),
    ],
)
def test_a_scope_that_cannot_be_meant_is_an_error(fields, message):
    plan = planned(["encoder.a", "head.w"], ["encoder.a", "head.w"], **fields)
    assert any(message in problem.message for problem in plan.errors)


def test_all_that_is_wrong_with_a_scope_is_said_at_once():
    plan = planned(["encoder.a"], ["a"], into="encodr", exclude="hed", select="x", freeze="y", allow_missing="z")
    assert [p.names for p in plan.errors] == [("x",), ("encodr",), ("hed",), ("z",), ("y",)]


@pytest.mark.parametrize(
    "field", ["include", "exclude", "allow_missing", "allow_mismatched", "allow_unexpected", "select", "freeze"]
)
def test_a_pattern_without_a_hit_is_an_error_unless_optional(field):
    plan = planned(["a.w", "b.w"], ["a.w", "b.w"], **{field: ["zz.*"]})
    assert any(
        p.kind == "unused" and p.names == ("zz.*",) and f"{field}='zz.*' matches no" in p.message for p in plan.errors
    )
    assert planned(["a.w", "b.w"], ["a.w", "b.w"], **{field: ["?zz.*", *(["a", "b"] if field in ("include", "select") else [])]}
                   ).errors == ()  # fmt: skip


def test_a_pattern_hits_names_that_do_not_need_it():
    plan = planned(["a.w", "b.w"], ["a.w", "b.w"], allow_missing="a", allow_mismatched="b", allow_unexpected="a.w")
    assert plan.errors == ()


def test_es_1_to_es_4_one_layer_in_all_the_ways():
    full = {"layer1.weight": (1, 1), "layer1.bias": (1,), "layer2.weight": (2, 2), "layer2.bias": (2,)}
    layer1 = {"layer1.weight": "layer1.weight", "layer1.bias": "layer1.bias"}
    layer2 = ("layer2.bias", "layer2.weight")
    assert used(planned(full, full)) == {name: name for name in full}  # ES-1
    for fields in (
        {"select": "layer1", "into": "layer1"},
        {"into": "layer1"},
        {"exclude": "layer2"},
        {"include": "layer1"},
    ):
        plan = planned(full, full, **fields)  # ES-2, ES-3
        assert (plan.errors, used(plan), plan.excluded, plan.ignored) == ((), layer1, layer2, layer2)
    plan = planned(full, {"weight": (1, 1), "bias": (1,)}, into="layer1")  # ES-4
    assert (plan.errors, used(plan), plan.excluded) == ((), {k: k.removeprefix("layer1.") for k in layer1}, layer2)


# ---- 7. the inferred prefix ----


@pytest.mark.parametrize(
    ("entries", "keys", "pair"),
    [
        (["a.w", "b.w"], ["foo.a.w", "foo.b.w"], ("foo", "")),
        (["m.a.w", "m.b.w"], ["a.w", "b.w"], ("", "m")),
        (["m.a.w", "m.b.w"], ["foo.a.w", "foo.b.w"], ("foo", "m")),
        (["a.w", "b.w"], ["a.w", "b.w"], None),
    ],
)
def test_one_prefix_pair_is_inferred_and_told(entries, keys, pair):
    plan = planned(entries, keys)
    assert plan.errors == ()
    assert (plan.prefix, plan.coverage) == (pair, 1)
    assert used(plan) == dict(zip(entries, keys, strict=True))
    assert any(note.startswith("prefix inferred: ") and "(2 of 2 keys" in note for note in plan.notes) == (
        pair is not None
    )


def test_field_note_1_a_prefixed_checkpoint_loads_or_says_how(fingerprint):
    model, source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {f"foo.{key}": tensor for key, tensor in source.state_dict().items()}
    before = fingerprint(model)
    with pytest.raises(
        MappingError, match=r"leave strip_prefix= out: strip 'foo' is inferred then, and 4 of 4 keys match"
    ):
        warmstart.load(model, state, strip_prefix="")
    assert fingerprint(model) == before
    report = warmstart.load(model, state)
    assert (report.prefix, report.coverage) == (("foo", ""), 1)
    assert torch.equal(model[1].weight, source[1].weight)


def test_inference_works_inside_into_and_with_rules():
    names = ["model.encoder.a", "model.encoder.b"]
    assert used(planned(names, ["bert.a", "bert.b"], into="model.encoder")) == dict(
        zip(names, ["bert.a", "bert.b"], strict=True)
    )
    whole = planned([*names, "head.w"], [*names, "head.w"], into="model.encoder")
    assert (whole.prefix, whole.ignored) == (("model.encoder", ""), ("head.w",))
    plan = planned(names, ["bert.x", "bert.b"], rename={"x": "a"})
    assert (plan.errors, plan.prefix) == ((), ("bert", "model.encoder"))


def test_the_identity_wins_a_draw_and_shapes_count():
    plan = planned(["a", "b"], ["foo.a", "b"])
    assert (plan.prefix, plan.missing, plan.unexpected) == (None, ("a",), ("foo.a",))
    plan = planned(["x.w", "y.w"], {"x.w": (3,), "y.w": (3,), "p.x.w": (2,), "p.y.w": (2,)}, allow_unexpected="*")
    assert plan.prefix == ("p", "")


def test_a_right_key_is_never_rewritten():
    plan = planned(["a", "b", "c", "enc.z"], ["enc.a", "enc.b", "enc.c", "enc.z"])
    assert plan.errors == ()
    assert used(plan) == {"a": "enc.a", "b": "enc.b", "c": "enc.c", "enc.z": "enc.z"}
    plan = planned(["a", "b", "c", "enc.a"], ["enc.a", "enc.b", "enc.c"])  # enc.a could go to either
    assert used(plan) == {"enc.a": "enc.a", "b": "enc.b", "c": "enc.c"}
    assert plan.missing == ("a",)


def test_a_rewritten_key_that_meets_a_right_one_is_a_collision():
    plan = planned(["a", "b", "c"], ["a", "foo.a", "foo.b", "foo.c"])
    assert kinds(plan) == ["collision"]
    assert plan.errors[0].names == ("a", "foo.a")


def test_pairs_that_tie_are_an_error_that_names_them_and_settles_it():
    plan = planned(["s.w", "t.w"], ["x.w"])
    assert kinds(plan) == ["ambiguous"]
    assert "strip 'x' and add 's'; strip 'x' and add 't'" in plan.errors[0].message
    assert plan.errors[0].message.endswith('for the first of them: into="s", strip_prefix="x"')
    assert used(planned(["s.w", "t.w"], ["x.w"], into="s", strip_prefix="x")) == {"s.w": "x.w"}
    assert used(planned(["s.w", "t.w"], ["x.w"], into="t")) == {"t.w": "x.w"}
    plan = planned(["w"], ["x.w", "y.w"])
    assert plan.errors[0].message.endswith('for the first of them: strip_prefix="x"')
    plan = planned(["m.s.w", "m.t.w"], ["w"], into="m")
    assert plan.errors[0].message.endswith('for the first of them: into="m.s"')


def test_pairs_that_give_the_same_names_are_one_pair():
    plan = planned(["m.a.w", "m.a.v"], ["a.w", "a.v"])  # add 'm', or strip 'a' and add 'm.a'
    assert (plan.errors, plan.prefix) == ((), ("", "m"))


def test_x_1_only_a_prefix_that_is_not_there_is_stripped():
    plan = planned(["conv1.weight"], ["encoder.conv1.weight"], strip_prefix="backbone")
    assert kinds(plan) == ["unused", "nothing matched"]
    assert "leave strip_prefix= out: strip 'encoder' is inferred then, and 1 of 1 keys match" in plan.explain()


# ---- 8. matching ----


def test_equal_names_and_shapes_are_assigned_others_are_mismatched():
    plan = planned({"a": (2, 3), "b": (2,)}, {"a": (3, 2), "b": (2,)})
    assert used(plan) == {"b": "b"}
    assert plan.mismatched["a"].keys == ("a",)
    assert plan.mismatched["a"].checkpoint_shape == (3, 2)
    assert plan.mismatched["a"].model_shape == (2, 3)
    assert (kinds(plan), plan.missing, plan.unexpected) == (["mismatched"], (), ())


@pytest.mark.parametrize(("mine", "theirs"), [((2, 3), (6,)), ((), (1,)), ((1, 2), (2,)), ((0,), (0, 2))])
def test_shapes_of_equal_size_are_not_equal(mine, theirs):
    assert list(planned({"a": mine, "b": (1,)}, {"a": theirs, "b": (1,)}).mismatched) == ["a"]


def test_field_note_16_a_head_swap_is_allowed_by_name_and_nothing_else_with_it():
    entries = {"body.w": (4, 4), "body.v": (4,), "head.weight": (2, 4), "head.bias": (2,)}
    keys = {"body.w": (4, 4), "body.v": (5,), "head.weight": (9, 4), "head.bias": (9,)}
    plan = planned(entries, keys, allow_mismatched="head")
    assert plan.errors[0].names == ("body.v",)
    assert sorted(plan.mismatched) == ["body.v", "head.bias", "head.weight"]  # excused is not hidden
    assert planned(entries, keys, allow_mismatched=["head", "body.v"]).errors == ()


def test_field_note_16_the_wrong_architecture_is_asked_about():
    entries = {f"layer.{i}.{n}": (4, 4) for i in range(4) for n in "abc"} | {"stem": (3,)}
    keys = {f"layer.{i}.{n}": (4, 16) for i in range(4) for n in "abc"} | {"stem": (3,)}
    plan = planned(entries, keys)
    assert "wrong architecture? only 1 of 13 entries have the checkpoint's shape" in plan.explain()
    assert "in 12 of them it has 16 where the model has 4: build the model with 16 there" in plan.explain()
    two_heads = planned({"a": (1,), "b": (1,), "c": (1,)}, {"a": (2,), "b": (2,), "c": (1,)})
    assert "wrong architecture" not in two_heads.explain()


def test_ke_1_another_width_of_the_last_layer(fingerprint):
    source, model = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, out)) for out in (5, 6))
    before = fingerprint(model)
    with pytest.raises(MappingError, match=r"1\.weight  checkpoint \(5, 4\), model \(6, 4\)"):
        warmstart.load(model, source.state_dict())
    assert fingerprint(model) == before
    warmstart.load(model, source.state_dict(), allow_mismatched="1")
    assert torch.equal(model[0].weight, source[0].weight)
    assert fingerprint(model)["1.weight"] == before["1.weight"]


def test_ke_2_one_layer_more(fingerprint):
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 5))
    before = fingerprint(model)
    with pytest.raises(MappingError, match=r'2 model entries without a key(?s:.*)allow_missing=\["2"\]'):
        warmstart.load(model, source.state_dict())
    warmstart.load(model, source.state_dict(), allow_missing="2")
    assert torch.equal(model[1].bias, source[1].bias)
    assert fingerprint(model)["2.weight"] == before["2.weight"]


# ---- 9. leftovers ----


class Extras(nn.Module):
    """A non-persistent buffer and an extra state beside a weight."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.register_buffer("position_ids", torch.arange(3), persistent=False)

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (
            "net.position_ids",
            "1 key ignored (non-persistent buffers, which the model computes itself): net.position_ids",
        ),
        ("net._extra_state", "1 key ignored (modules' extra state, which is not weights): net._extra_state"),
        ("gone._extra_state", "1 key ignored (modules' extra state, which is not weights): gone._extra_state"),
        ("head.w", "1 key ignored (outside the scope): head.w"),
    ],
)
@pytest.mark.parametrize("shape", [(2,), (7, 7)])
def test_field_note_41_and_ac_5_keys_of_what_is_no_entry_in_scope_are_ignored_with_a_note(key, reason, shape):
    model = nn.ModuleDict({"net": Extras(), "head": net({"w": (2,)})})
    plan = warmstart.plan(model, Header({"net.w": (2,), key: shape}), into="net")
    assert plan.errors == ()
    assert (plan.ignored, plan.unexpected) == ((key,), ())
    assert reason in plan.notes


def test_field_note_41_the_same_under_a_prefix_and_a_wrapper():
    model = nn.DataParallel(nn.ModuleDict({"net": Extras(), "head": net({"w": (2,)})}))
    plan = warmstart.plan(
        model, Header({"old.w": (2,), "old.position_ids": (3,), "old._extra_state": (1,)}), into="net"
    )
    assert plan.errors == ()
    assert plan.ignored == ("old._extra_state", "old.position_ids")


def test_a_key_that_is_nowhere_in_the_model_is_unexpected():
    plan = planned(["encoder.a", "head.w"], ["encoder.a", "head.w", "decoder.z"], into="encoder")
    assert (plan.ignored, plan.unexpected, kinds(plan)) == (("head.w",), ("decoder.z",), ["unexpected"])


def test_many_ignored_keys_are_one_note():
    plan = planned(["a.w", *(f"b.{i}" for i in range(9))], ["a.w", *(f"b.{i}" for i in range(9))], into="a")
    assert [n for n in plan.notes if "ignored" in n] == ["9 keys ignored (outside the scope): b.0, b.1, b.2, b.3, ..."]


def test_x_27_batch_norm_buffers_are_loaded_and_an_old_file_may_lack_the_counter():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    source = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    source(torch.randn(4, 1, 3, 3))
    state = dict(source.state_dict())
    report = warmstart.load(model, state)
    assert torch.equal(model[1].running_mean, source[1].running_mean)
    assert int(model[1].num_batches_tracked) == 1
    del state["1.num_batches_tracked"]
    report = warmstart.load(model, state)
    assert report.missing == ("1.num_batches_tracked",)
    assert "1 num_batches_tracked are not in the file and keep their value, as in torch itself" in report.notes
    del state["1.running_mean"]
    with pytest.raises(MappingError, match=r"1\.running_mean"):
        warmstart.load(model, state)


def test_a_counter_of_another_module_is_not_excused():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2))
    model.register_buffer("num_batches_tracked", torch.tensor(0))
    assert kinds(warmstart.plan(model, Header(["w"]))) == ["missing"]


# ---- ties ----


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "mid": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["emb"].weight
    return model


MID = {"mid.weight": (3, 3), "mid.bias": (3,)}


@pytest.mark.parametrize("key", ["emb.weight", "head.weight"])
def test_field_note_14_either_key_gives_a_tied_tensor_its_value_and_the_other_is_not_missing(key):
    plan = warmstart.plan(tied(), Header({**MID, key: (5, 3)}))
    assert (plan.errors, plan.missing, plan.coverage) == ((), (), 1)
    assert plan.mapping["emb.weight"] == plan.mapping["head.weight"] == (key,)
    (alias,) = [a for a in plan.assignments if a.alias_of is not None]
    assert (alias.target, alias.alias_of, alias.sources) == (
        ("head.weight", "emb.weight", ()) if key == "emb.weight" else ("emb.weight", "head.weight", ()))  # fmt: skip


def test_field_note_14_and_x_15_both_keys_must_be_equal(fingerprint):
    model, value = tied(), torch.randn(5, 3)
    state = {
        "mid.weight": torch.ones(3, 3),
        "mid.bias": torch.ones(3),
        "emb.weight": value,
        "head.weight": value.clone(),
    }
    warmstart.load(model, state)
    assert model["head"].weight is model["emb"].weight
    assert torch.equal(model["emb"].weight, value)

    model = tied()
    before = fingerprint(model)
    state["head.weight"] = value + 1
    with pytest.raises(
        MappingError, match=r"'emb\.weight' and 'head\.weight' are one tied tensor, but the checkpoint's"
    ) as error:
        warmstart.load(model, state)
    assert fingerprint(model) == before
    assert error.value.plan is not None
    for excluded, kept in (("head.weight", "emb.weight"), ("emb.weight", "head.weight")):  # as the message offers
        assert f"exclude=[\"{excluded}\"] keeps '{kept}'" in str(error.value)
        model = tied()
        warmstart.load(model, state, exclude=[excluded])
        assert torch.equal(model["emb"].weight, state[kept])


def test_fv_3_a_module_under_two_names_has_nothing_missing():
    source, model = nn.ModuleDict({"x": nn.Linear(10, 10)}), nn.ModuleDict({"x": nn.Linear(10, 10)})
    model["y"] = model["x"]
    nn.init.constant_(source["x"].bias, 5)
    report = warmstart.load(model, source.state_dict())
    assert (model["y"].bias == 5).all()
    assert report.missing == ()
    assert report.mapping["y.bias"] == ("x.bias",)


@pytest.mark.parametrize(("into", "outside"), [("emb", "head.weight"), ("head", "emb.weight")])
def test_into_may_cover_one_name_of_a_tie(into, outside):
    plan = warmstart.plan(tied(), Header({"weight": (5, 3)}), into=into, freeze=True)
    assert plan.errors == ()
    assert list(plan.mapping) == [f"{into}.weight"]
    assert outside in plan.excluded
    assert plan.coverage == 1
    assert plan.freeze == ("emb.weight", "head.weight")  # one tensor is frozen under all its names


@pytest.mark.parametrize("into", ["emb", "head"])
def test_a_whole_file_with_both_keys_into_one_name_of_a_tie(into):
    plan = warmstart.plan(tied(), Header({**MID, "emb.weight": (5, 3), "head.weight": (5, 3)}), into=into)
    assert plan.errors == ()
    assert used(plan) == {f"{into}.weight": f"{into}.weight"}
    assert len(plan.ignored) == 3


@pytest.mark.parametrize("tower", ["left", "right"])
def test_a_whole_file_into_one_of_two_equal_towers_takes_the_tower_s_own_keys(tower):
    names = ["left.a", "left.b", "right.a", "right.b"]
    plan = planned(names, names, into=tower)
    assert plan.errors == ()
    assert used(plan) == {f"{tower}.a": f"{tower}.a", f"{tower}.b": f"{tower}.b"}
    assert len(plan.ignored) == len(plan.excluded) == 2
    assert kinds(planned(names, ["x.a", "x.b", "y.a", "y.b"], into=tower)) == ["ambiguous"]


def test_a_tie_without_a_key_is_missing_under_every_name_and_excused_by_patterns_for_them():
    plan = warmstart.plan(tied(), Header(MID))
    assert plan.missing == ("emb.weight", "head.weight")
    assert warmstart.plan(tied(), Header(MID), allow_missing=["emb", "head"]).errors == ()


def test_a_tie_counts_once_in_the_coverage():
    plan = warmstart.plan(tied(), Header({"emb.weight": (5, 3)}), allow_missing="mid")
    assert plan.coverage == 15 / (15 + 9 + 3)


# ---- 10. the verdict ----


def test_bv_4_both_sides_are_shown_and_each_is_excused_by_its_own_patterns():
    plan = planned(["a", "mine.x"], ["a", "theirs.y"])
    assert kinds(plan) == ["missing", "unexpected"]
    assert "mine.x" in plan.errors[0].message
    assert "theirs.y" in plan.errors[1].message
    assert kinds(planned(["a", "mine.x"], ["a", "theirs.y"], allow_missing="mine")) == ["unexpected"]
    assert kinds(planned(["a", "mine.x"], ["a", "theirs.y"], allow_unexpected="theirs")) == ["missing"]
    excused = planned(["a", "mine.x"], ["a", "theirs.y"], allow_missing="mine.*", allow_unexpected="theirs.y")
    assert excused.errors == ()
    assert (excused.missing, excused.unexpected) == (("mine.x",), ("theirs.y",))  # excused is not hidden


@pytest.mark.parametrize("pattern", ["module.old.w", "old", "old.*", "module.old"])
def test_allow_unexpected_matches_keys_with_and_without_their_wrappers(pattern):
    assert planned(["a"], ["module.a", "module.old.w"], allow_unexpected=pattern).errors == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "none of the 2 keys fits any of the 2 model entries in scope"),
        ({"allow_missing": "*", "allow_unexpected": "*"}, "none of the 2 keys fits"),
        ({"select": "?zz", "allow_missing": "*"}, "select= leaves none of the 2 keys; widen it"),
    ],
)
def test_d2_13_nothing_matched_is_always_an_error(fields, message, fingerprint):
    model = net(["a.w", "b.w"])
    before = fingerprint(model)
    with pytest.raises(MappingError, match=f"nothing matched: {message}") as error:
        warmstart.plan(model, Header(["q.r", "s.t"]), **fields).apply()
    assert fingerprint(model) == before
    assert [p.kind for p in error.value.plan.errors] == ["nothing matched"]  # and no list of all names beside it


def test_d2_13_nothing_of_an_equal_shape_is_nothing_too():
    plan = planned({"a": (2,), "b": (3,)}, {"a": (4,), "b": (5,)}, allow_mismatched="*")
    assert kinds(plan) == ["nothing matched"]
    assert "2 names fit, but every key has another shape than its entry" in plan.errors[0].message


@pytest.mark.parametrize(("least", "fits"), [(0.0, True), (0.75, True), (0.76, False), (1.0, False)])
def test_min_coverage_counts_elements_of_the_scope(least, fits):
    plan = planned(
        {"a": (6,), "b": (2,), "out": (100,)}, {"a": (6,)}, exclude="out", allow_missing="b", min_coverage=least
    )
    assert plan.coverage == 0.75
    assert kinds(plan) == ([] if fits else ["coverage"])
    if not fits:
        assert f"header loads 75.00% of the elements in scope, less than the {least:.2%} asked for" in plan.explain()


def test_min_coverage_of_a_tie_that_another_name_gave():
    plan = warmstart.plan(tied(), Header({**MID, "emb.weight": (5, 3)}), min_coverage=1.0)
    assert plan.errors == ()


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("source", "model", "allowed"),
    [
        (F32, F16, True), (F16, F32, True), (F64, F32, True), (F32, BF16, True), (torch.int64, torch.int32, True),
        (torch.int32, torch.int64, True), (torch.uint8, torch.int64, True), (torch.complex128, torch.complex64, True),
        (torch.int64, F32, False), (torch.bool, F32, False), (F32, torch.int64, False), (torch.complex64, F32, False),
        (F32, torch.complex64, False), (torch.bool, torch.int8, False), (torch.int8, torch.bool, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["model", "checkpoint"])
def test_x_17_and_ac_3_dtypes_of_one_kind_are_cast_others_refused(source, model, allowed, dtype):
    target = nn.Module()
    target.register_buffer("a", torch.zeros(2, dtype=model))
    plan = warmstart.plan(target, Header(["a"], source), dtype=dtype)
    assert kinds(plan) == ([] if allowed else ["dtype"])
    assert plan.assignments[0].cast == ((source, model) if dtype == "model" else None)
    if not allowed:
        a, b = str(source).removeprefix("torch."), str(model).removeprefix("torch.")
        assert f"{a} in the checkpoint cannot become {b} without another meaning" in plan.errors[0].message


def test_ac_3_a_float_is_cast_and_an_integer_stays():
    model = nn.BatchNorm1d(4).half()
    source = nn.BatchNorm1d(4)
    source.num_batches_tracked.fill_(7)
    nn.init.constant_(source.weight, 1 / 3)
    report = warmstart.load(model, source.state_dict())
    assert (model.num_batches_tracked.dtype, int(model.num_batches_tracked)) == (torch.int64, 7)
    assert torch.equal(model.weight, source.weight.half())
    assert "4 tensors are rounded to the model's dtype" in report.notes


@pytest.mark.parametrize(
    ("source", "model", "narrows"),
    [
        (F32, BF16, True),
        (F32, F16, True),
        (F64, F32, True),
        (F16, BF16, True),
        (BF16, F32, False),
        (F32, F64, False),
        (F32, F32, False),
    ],
)
def test_allow_narrowing_false_refuses_what_rounds(source, model, narrows):
    plan = warmstart.plan(net(["a"], model), Header(["a"], source), allow_narrowing=False)
    assert kinds(plan) == (["dtype"] if narrows else [])
    if narrows:
        assert "1 tensors would be rounded to the model's dtype" in plan.explain()
        assert warmstart.plan(net(["a"], model), Header(["a"], source)).notes == (
            "1 tensors are rounded to the model's dtype",
        )
    assert (
        warmstart.plan(net(["a"], model), Header(["a"], source), allow_narrowing=False, dtype="checkpoint").errors == ()
    )


@pytest.mark.parametrize(
    ("values", "model"),
    [
        (torch.tensor([1e308, 1.0], dtype=F64), F32),
        (torch.tensor([7e4, 1.0], dtype=F32), F16),
        (torch.tensor([1 << 40, 1]), torch.int32),
        (torch.tensor([-1, 1]), torch.uint8),
    ],
)
def test_x_17_values_that_the_model_s_dtype_cannot_hold_are_refused_before_the_first_write(values, model):
    target = nn.Module()
    target.register_buffer("a", torch.zeros(2, dtype=model))
    target.register_buffer("b", torch.zeros(2, dtype=values.dtype))
    with pytest.raises(MappingError, match=r"(?s)1 tensors hold values that the model's dtype cannot.*a  .*to "):
        warmstart.load(target, {"a": values, "b": values})
    assert not target.a.any()
    assert not target.b.any()
    warmstart.load(target, {"a": values.clamp(0, 100), "b": values})
    assert target.a.dtype == model


# ---- freeze ----


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (False, ()),
        (True, ("encoder.a", "encoder.b")),
        ("encoder.a", ("encoder.a",)),
        (["*.b", "head"], ("encoder.b", "head.w")),  # also what was not loaded
        ("?zz", ()),
        ([], ()),
    ],
)
def test_what_is_frozen_is_known_from_the_plan(freeze, frozen):
    plan = planned(
        ["encoder.a", "encoder.b", "head.w"], ["encoder.a", "encoder.b"], allow_missing="head", freeze=freeze
    )
    assert plan.errors == ()
    assert plan.freeze == frozen


# ---- several sources ----


def test_several_disjoint_sources_join():
    model = net(["enc.a", "dec.a", "head.w"])
    plan = warmstart.plan(
        model, [Pretrained(Header(["a"]), into="enc"), Pretrained(Header(["x.a"]), into="dec", freeze=True)]
    )
    assert plan.errors == ()
    assert used(plan) == {"enc.a": "a", "dec.a": "x.a"}
    assert [a.part for a in plan.assignments] == [0, 1]
    assert (plan.excluded, plan.freeze) == (("head.w",), ("dec.a",))
    assert plan.prefix is None  # of a plan with one part only
    assert [part.prefix for part in plan.parts] == [None, ("x", "")]
    assert any(note.startswith("source 1: prefix inferred") for note in plan.notes)


def test_one_source_into_two_towers():
    source = Header(["a", "b"])
    plan = warmstart.plan(
        net(["left.a", "left.b", "right.a", "right.b"]), [Pretrained(source, into=t) for t in ("left", "right")]
    )
    assert plan.errors == ()
    assert used(plan) == {"left.a": "a", "left.b": "b", "right.a": "a", "right.b": "b"}


def test_an_entry_given_by_two_sources_is_an_error_naming_both():
    plan = warmstart.plan(net(["a", "b"]), [Header(["a", "b"]), {"x.b": torch.zeros(2)}])
    assert kinds(plan) == ["overlap"]
    assert plan.errors[0].names == ("b",)
    assert "'b' is given by two sources: 'b' of header and 'x.b' of a state dict in memory" in plan.errors[0].message
    assert plan.unexpected == ((1, "x.b"),)
    fixed = warmstart.plan(net(["a", "b"]), [Pretrained(Header(["a", "b"]), exclude=["b"]), Header(["x.b"])])
    assert fixed.errors == ()
    assert used(fixed) == {"a": "a", "b": "x.b"}


def test_a_tie_given_by_two_sources_under_its_two_names_is_an_overlap():
    plan = warmstart.plan(
        tied(), [Header({**MID, "emb.weight": (5, 3)}), Pretrained(Header({"weight": (5, 3)}), into="head")]
    )
    assert kinds(plan) == ["overlap"]
    assert plan.errors[0].names == ("head.weight",)
    assert plan.unexpected == ((1, "weight"),)


@pytest.mark.parametrize("order", [1, -1])
def test_an_entry_that_one_source_fits_and_another_does_not_is_in_one_bucket(order):
    good, bad = (
        Pretrained(Header(["a", "b"])),
        Pretrained(Header({"a": (3,), "c": (2,)}), include=["a", "c"], allow_mismatched="a"),
    )
    plan = warmstart.plan(net(["a", "b", "c"]), [good, bad][::order])
    assert kinds(plan) == ["overlap"]
    assert used(plan) == {"a": "a", "b": "b", "c": "c"}
    assert plan.mismatched == {}
    assert plan.unexpected == (((1, "a"),) if order == 1 else ((0, "a"),))


def test_missing_in_one_scope_is_given_by_another_or_excused_by_one_part():
    model = net(["body.a", "head.w", "new.w"])
    parts = [Pretrained(Header(["body.a"])), Pretrained(Header(["w"]), into="head")]
    plan = warmstart.plan(model, parts)
    assert plan.missing == ("new.w",)  # head.w is in the first one's scope, and the second gave it
    assert kinds(plan) == ["missing"]
    parts[1] = Pretrained(Header(["w"]), into="head", allow_missing="new")
    assert warmstart.plan(model, parts).errors == ()


def test_key_side_buckets_hold_part_and_key():
    parts = [
        Pretrained(Header(["a", "old.x", "skip"]), select=["a", "old"], allow_unexpected="old"),
        Pretrained(Header(["b", "old.x"]), include="b"),
    ]
    plan = warmstart.plan(net(["a", "b"]), parts)
    assert plan.unexpected == ((0, "old.x"), (1, "old.x"))
    assert plan.ignored == ((0, "skip"),)
    assert [(p.kind, p.names) for p in plan.errors] == [("unexpected", ("old.x",))]  # each excuses its own keys
    assert plan.to_dict()["unexpected"] == [[0, "old.x"], [1, "old.x"]]


def test_each_source_has_its_own_min_coverage_and_dtype():
    model = net({"a": (2,), "b": (8,)}, F16)
    parts = [Pretrained(Header({"a": (2,)}), include="a", min_coverage=1.0),
             Pretrained(Header({"b": (8,)}), include="b", dtype="checkpoint", min_coverage=1.0)]  # fmt: skip
    plan = warmstart.plan(model, parts)
    assert plan.errors == ()
    assert [a.cast for a in plan.assignments] == [(F32, F16), None]
    assert kinds(warmstart.plan(model, [Pretrained(Header({"a": (2,)}), min_coverage=0.5), parts[1]])) == ["coverage"]


# ---- the plan ----


def test_the_account_is_complete():
    model = net(["in.a", "in.b", "in.c", "in.d", "out.x"])
    keys = {"in.a": (2,), "in.b": (3,), "old": (1,), "out.x": (2,), "opt": (1,)}
    plan = warmstart.plan(model, Header(keys), include="in", select=["in", "old", "out"])
    assert used(plan) == {"in.a": "in.a"}
    assert (plan.missing, plan.excluded, list(plan.mismatched)) == (("in.c", "in.d"), ("out.x",), ["in.b"])
    assert (plan.unexpected, plan.ignored) == (("old",), ("opt", "out.x"))
    assert plan.coverage == 1 / 4
    assert kinds(plan) == ["missing", "mismatched", "unexpected"]


def test_a_plan_with_errors_is_looked_at_and_not_applied(fingerprint):
    model = net(["a", "b"])
    before = fingerprint(model)
    plan = warmstart.plan(model, Header(["a"]))
    with pytest.raises(MappingError) as error:
        plan.apply()
    assert error.value.plan is plan
    assert str(error.value) == plan.explain()
    assert fingerprint(model) == before


def test_planning_reads_nothing_and_leaves_the_model_and_the_random_state_alone(fingerprint):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    source = Header({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, torch.float64)
    before, random = fingerprint(model), torch.get_rng_state()
    plan = warmstart.plan(model, source, freeze=True, exclude="1.num_batches_tracked")
    assert plan.errors == ()
    assert fingerprint(model) == before
    assert model.training
    assert source.bytes_read == 0
    assert torch.equal(random, torch.get_rng_state())


def test_to_dict_is_json_and_the_digest_is_of_the_decisions():
    plan = planned({"a": (2,), "b": (3,), "c": (1,)}, {"x.a": (2,), "x.b": (4,), "old": (1,)}, allow_missing="c")
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["parts"][0]["rules"] == {"allow_missing": "c"}
    assert data["mismatched"] == {"b": {"keys": ["x.b"], "checkpoint": [4], "model": [3]}}
    assert [e["kind"] for e in data["errors"]] == ["mismatched", "unexpected"]
    same = planned({"a": (2,), "b": (3,), "c": (1,)}, {"old": (1,), "x.b": (4,), "x.a": (2,)})
    assert plan.digest() == same.digest()
    assert plan.digest() != planned({"a": (2,), "b": (3,), "c": (1,)}, {"x.a": (2,), "x.b": (3,), "x.c": (1,)}).digest()
    assert plan.digest() != planned({"a": (2,), "b": (3,), "c": (1,)}, {"x.a": (2,)}, freeze=True).digest()


def test_1_a_tree_is_chosen_by_its_key():
    trees = {"model": {"a": torch.zeros(2)}, "model_ema": {"a": torch.ones(2)}, "optimizer": {"state": {}}}
    model = net(["a"])
    warmstart.load(model, trees, checkpoint_key="model_ema")
    assert (model.a == 1).all()
    with pytest.raises(warmstart.CheckpointError, match="model_ema"):
        warmstart.plan(model, trees)
