from __future__ import annotations

import copy
import functools
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import weight_norm

import warmstart
from warmstart import MappingError
from warmstart.mapping.keys import Key
from warmstart.mapping.load_hooks.load_hooks import Honoured, honour
from warmstart.tensors import same_bits


def pool(state: Mapping[str, Tensor], prefix: str = "") -> list[Key]:
    """Keys as planning has them: the file spells them with `prefix`, the names are the model's."""
    return [Key(prefix + name, prefix + name, name, tuple(t.shape), t.dtype) for name, t in state.items()]


def honoured(model: nn.Module, state: Mapping[str, Tensor], versions=None, prefix: str = "") -> Honoured:
    """`honour`, checked to leave the model as it is and to have read nothing."""
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items() if not is_lazy(t)}
    held = [(m, dict(m.__dict__)) for m in model.modules()]
    out = honour(pool(state, prefix), dict(model.named_modules()), versions or {})
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is t and same_bits(t, value) for name, (t, value) in before.items())
    assert all(m.__dict__ == attributes for m, attributes in held)
    return out


def is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.parameter.UninitializedTensorMixin)


def values(out: Honoured, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """What the keys give, by name."""
    source = {prefix + name: t for name, t in state.items()}
    found = {}
    for key in out.keys:
        assert key.name not in found
        if key.made is None:
            found[key.name] = source[key.spelled]
        else:
            made = key.made
            found[key.name] = made.run(lambda i: source[made.sources[i]])[key.output]  # noqa: B023
            assert (tuple(found[key.name].shape), found[key.name].dtype) == (key.shape, key.dtype)
            assert found[key.name].device.type == "cpu"
    return found


def check_like_torch(
    model: nn.Module, state: Mapping[str, Tensor], versions=None, prefix: str = "", another=copy.deepcopy
) -> Honoured:
    """Written as the keys say, the model holds bit for bit what torch's own `load_state_dict` gives it."""
    source = {name: t.clone() for name, t in state.items()}
    expected = another(model)
    given = dict(source)
    ordered = type("StateDict", (dict,), {})(given)
    if versions is not None:
        ordered._metadata = {path.removeprefix(prefix.rstrip(".")).lstrip("."): v for path, v in versions.items()}
    incompatible = expected.load_state_dict(copy.deepcopy(ordered), strict=False)
    out = honoured(model, source, versions, prefix)
    assert out.errors == []
    got = values(out, source, prefix)
    assert all(same_bits(t, state[name]) for name, t in source.items()), "the source was written to"
    written = another(model)
    entries = written.state_dict(keep_vars=True)
    want = expected.state_dict()
    for name, entry in entries.items():
        if name in got:
            if tuple(got[name].shape) != tuple(() if is_lazy(entry) else entry.shape) or is_lazy(entry):
                assert out.shapes[name] == got[name].shape
            assert same_bits(got[name].to(entry.dtype), want[name]), name
        else:
            assert same_bits(entry, want[name]), name
            assert name in incompatible.missing_keys or name in out.excused or name.endswith("num_batches_tracked")
    assert sorted(set(got) - set(entries)) == sorted(incompatible.unexpected_keys)
    for key in out.keys:
        if key.made is not None:
            assert key.made.no_inverse
            with pytest.raises(MappingError, match=r"inverse|computes"):
                key.made.undo([])
    return out


def random_state(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t + 3
        for name, t in model.state_dict().items()
    }


# Torch's own.


def old_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): t
        for k, t in state.items()
    }


def test_field_note_42_old_weight_norm_keys_become_those_of_the_parametrization():
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), weight_norm(nn.Conv1d(2, 3, 5), dim=2))
    state = old_weight_norm(random_state(model))
    out = check_like_torch(model, state)
    assert {k.spelled: k.name for k in out.keys}["0.weight_g"] == "0.parametrizations.weight.original0"
    assert all(key.made is None for key in out.keys)  # a rename: it can be taken back
    assert out.notes == [
        "ParametrizedLinear: its own loading renames 2 tensors, as in torch itself",
        "ParametrizedConv1d: its own loading renames 2 tensors, as in torch itself",
    ]


def test_field_note_42_one_half_of_weight_norm_alone_stays_as_it_is():
    out = honoured(weight_norm(nn.Linear(3, 4)), {"weight_g": torch.ones(4, 1), "bias": torch.ones(4)})
    assert [key.name for key in out.keys] == ["weight_g", "bias"]
    assert out.notes == []


@pytest.mark.parametrize("version", [None, {"": {"version": 1}}])
def test_modules_without_their_own_way_are_left_alone(version):
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.BatchNorm1d(4), nn.Linear(4, 4))
    state = random_state(model)
    del state["1.num_batches_tracked"]
    out = check_like_torch(model, state, version)
    assert [key.name for key in out.keys] == list(state)
    assert out.notes == []


def test_an_old_batch_norm_below_a_hook_keeps_its_counter():
    class Renamed(nn.BatchNorm1d):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            if prefix + "gamma" in state_dict:
                state_dict[prefix + "weight"] = state_dict.pop(prefix + "gamma")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    model = nn.Sequential(Renamed(3))
    model[0].num_batches_tracked.fill_(5)
    state = random_state(model)
    state["0.gamma"] = state.pop("0.weight")
    del state["0.num_batches_tracked"]
    out = check_like_torch(model, state)
    assert "0.num_batches_tracked" not in {key.name for key in out.keys}


@pytest.mark.parametrize("version", [{}, {"": {"version": 1}, "0": {"version": 1}}, {"": {}, "0": {"version": 3}}])
def test_observers_take_the_shape_of_what_they_get(version):
    # Nothing in torch 2.13's observers warns when built; should a later one, only that import may.
    from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver

    for observer in (PerChannelMinMaxObserver, MinMaxObserver, HistogramObserver):
        if version.get("0") == {"version": 1} and observer is PerChannelMinMaxObserver:
            continue  # torch looks for `min_vals` then, and loads them nowhere
        seen = observer()
        seen(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
        model = nn.Sequential(observer(), nn.Linear(2, 2))
        state = {f"0.{name}": t for name, t in seen.state_dict().items()}
        out = check_like_torch(model, state, version)
        if observer is PerChannelMinMaxObserver:
            assert out.shapes == {"0.min_val": (6,), "0.max_val": (6,)}
        if not version or version["0"]["version"] == 1:  # eps was no buffer then: torch takes its own, not the file's
            made = next(key.made for key in out.keys if key.name == "0.eps")
            assert made.sources == ()
            assert [key.spelled for key in out.ignored] == ["0.eps"]


def test_a_fake_quantiser_and_its_observer_take_the_shape_of_what_they_get():
    from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver

    quantiser = functools.partial(
        FakeQuantize, PerChannelMinMaxObserver, dtype=torch.qint8, quant_min=-128, quant_max=127,
        qscheme=torch.per_channel_symmetric,
    )  # fmt: skip
    seen = quantiser()
    seen(torch.randn(5, 2))
    out = check_like_torch(nn.Sequential(quantiser()), {f"0.{k}": t for k, t in seen.state_dict().items()})
    assert out.shapes["0.activation_post_process.min_val"] == (5,)


def test_old_spectral_norm_is_computed():
    from torch.nn.utils import spectral_norm

    model = nn.Sequential(spectral_norm(nn.Linear(3, 4)))
    state = random_state(model)
    state["0.weight"] = state["0.weight_orig"] / 2
    del state["0.weight_v"]
    out = check_like_torch(model, state)
    made = next(key.made for key in out.keys if key.name == "0.weight_v")
    assert set(made.sources) == {"0.weight_orig", "0.weight", "0.weight_u"}
    assert made.label == "0 (Linear)"


# Custom modules.


class Migrating(nn.Module):
    """Version 2 keeps its kernel transposed, and its bias under another name."""

    _version = 2

    def __init__(self, n: int = 3, m: int = 4) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(n, m))
        self.bias = nn.Parameter(torch.randn(m))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "kernel"] = state_dict[prefix + "kernel"].t()
            state_dict[prefix + "bias"] = state_dict.pop(prefix + "b")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("n", [3, 4])
def test_a_version_is_migrated(n):
    model = nn.Sequential(nn.Linear(2, 2), Migrating(n, 4))
    state = random_state(model)
    state["1.kernel"] = torch.randn(4, n)
    state["1.b"] = state.pop("1.bias")
    out = check_like_torch(model, state, {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 1}})
    assert [(k.name, k.spelled) for k in out.keys if k.made is None and k.name != k.spelled] == [("1.bias", "1.b")]
    assert next(k for k in out.keys if k.name == "1.kernel").sources == ("1.kernel",)
    assert out.notes == ["Migrating: its own loading renames 1 tensor, makes 1 tensor, as in torch itself"]


def test_fv_6_the_version_is_found_under_the_path_that_the_file_has():
    model = nn.Sequential(Migrating(4, 4))
    state = random_state(model)
    versions = {"enc": {"version": 1}, "enc.0": {"version": 2}}
    out = check_like_torch(model, state, versions, prefix="enc.")
    assert all(key.made is None for key in out.keys)  # version 2: nothing to migrate, though the shape would allow it
    state["0.b"] = state.pop("0.bias")
    out = check_like_torch(model, state, {"enc": {"version": 1}, "enc.0": {"version": 1}}, prefix="enc.")
    assert any(key.made is not None for key in out.keys)


class Split(nn.Module):
    """Keeps q, k and v apart; its pre-hook, as a bound method, splits the fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 2) for _ in range(3))
        self._register_load_state_dict_pre_hook(self._split)
        self.split = 0

    def _split(self, state_dict, prefix, *rest):
        for leaf in ("weight", "bias"):
            if f"{prefix}qkv.{leaf}" in state_dict:
                self.split += 1
                for name, part in zip("qkv", state_dict.pop(f"{prefix}qkv.{leaf}").chunk(3), strict=True):
                    state_dict[f"{prefix}{name}.{leaf}"] = part


def test_a_hook_that_is_a_bound_method_runs_on_the_stand_in():
    model = nn.Sequential(Split())
    state = {"0.qkv.weight": torch.randn(6, 3), "0.qkv.bias": torch.randn(6)}
    out = check_like_torch(model, state)
    assert model[0].split == 0
    assert len({id(key.made) for key in out.keys}) == 2  # one per key that is read: three outputs each


@pytest.mark.parametrize("public", [True, False])
def test_a_hook_gets_the_stand_in_as_its_module(public):
    def grow(module, state_dict, prefix, *rest):
        # New rows keep what the module has.
        old = state_dict[prefix + "weight"]
        state_dict[prefix + "weight"] = torch.cat([old, module.weight.detach()[len(old) :]])
        module.seen = True

    layer = nn.Linear(3, 5)
    model = nn.Sequential(layer)
    if public:
        layer.register_load_state_dict_pre_hook(grow)
    else:
        layer._register_load_state_dict_pre_hook(grow, with_module=True)
    state = {"0.weight": torch.randn(2, 3), "0.bias": torch.randn(5)}
    out = check_like_torch(model, state)
    assert not hasattr(layer, "seen")
    # What it held when it was planned: reading once more after the write must give the same.
    layer.weight.data.fill_(9)
    assert 9 not in values(out, state)["0.weight"]


def test_a_closure_and_a_partial_speak_of_the_stand_in():
    def hook(layer, state_dict, prefix, *rest):
        layer.bias.zero_()
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"].expand_as(layer.weight)

    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5))
    first, second = model
    first._register_load_state_dict_pre_hook(lambda *args: hook(first, *args))
    second._register_load_state_dict_pre_hook(functools.partial(hook, second))
    state = {"0.weight": torch.randn(1, 3), "1.weight": torch.randn(5, 1)}
    out = honoured(model, state)
    assert out.errors == []
    got = values(out, state)
    with torch.no_grad():
        model.load_state_dict(state, strict=False)  # not on a copy, whose closures would still speak of this one
    assert got.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(same_bits(t, model.state_dict()[name]) for name, t in got.items())


def test_a_stand_in_of_another_module_is_not_written_to():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other = model[1]
    model[0]._register_load_state_dict_pre_hook(lambda *args: other.weight.data.zero_())
    out = honoured(model, random_state(model))
    (error,) = out.errors
    assert "0 (Linear)" in str(error)
    assert "writes to a tensor that is neither its own nor given to it" in str(error)
    assert str(error).endswith('exclude=["0"]')


class Own(nn.Module):
    """Loads without torch's help, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 2))
        self.scale = nn.Parameter(torch.randn(2))
        self.register_buffer("count", torch.tensor(1))
        self.register_buffer("cache", torch.randn(2), persistent=False)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        with torch.no_grad():
            self.table[:2].copy_(state_dict[prefix + "top"])
            self.table[2:] = state_dict[prefix + "bottom"] * 2 + self.cache
        self.scale.data = state_dict[prefix + "gain"]
        self.count += 1


def test_a_module_that_writes_to_itself():
    model = nn.Sequential(Own())
    state = {"0.top": torch.randn(2, 2), "0.bottom": torch.randn(2, 2), "0.gain": torch.randn(2)}
    expected = copy.deepcopy(model)
    expected.load_state_dict(state)
    out = honoured(model, state)
    got = values(out, state)
    for name in ("0.table", "0.scale", "0.count"):
        assert same_bits(got[name], expected.state_dict()[name])
    assert {key.name: key.sources for key in out.keys if key.made is None} == {"0.scale": ("0.gain",)}
    leftover = {key.spelled for key in out.keys} | set().union(*(key.sources for key in out.keys))
    assert leftover >= set(state)


def test_nested_modules_each_see_what_the_one_above_left():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Migrating(3, 3)
            self.register_load_state_dict_pre_hook(self.rename)

        @staticmethod
        def rename(module, state_dict, prefix, local_metadata, *rest):
            for name in [n for n in state_dict if n.startswith(prefix + "old.")]:
                state_dict[name.replace("old.", "inner.")] = state_dict.pop(name) * 2

    model = nn.Sequential(Outer(), nn.Linear(2, 2))
    state = {"0.old.kernel": torch.randn(3, 3), "0.old.b": torch.randn(3), "1.weight": torch.randn(2, 2)}
    out = check_like_torch(model, state)
    assert next(k for k in out.keys if k.name == "0.inner.kernel").sources == ("0.old.kernel",)


def test_a_hook_at_the_root_changes_the_keys_of_others_and_one_below_cannot():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def swap(state_dict, prefix, *rest):
        a, b = prefix + "0.weight", prefix + "1.weight"
        state_dict[a], state_dict[b] = state_dict[b], state_dict[a]
        state_dict[prefix + "0.bias"] = state_dict[prefix + "1.bias"]

    def outside(state_dict, prefix, *rest):
        state_dict["1.bias"] = torch.zeros(2)
        state_dict.pop(prefix + "extra", None)

    model._register_load_state_dict_pre_hook(swap)
    model[0]._register_load_state_dict_pre_hook(outside)
    state = random_state(model) | {"0.extra": torch.ones(1)}
    out = check_like_torch(model, state)
    assert {k.name: k.sources for k in out.keys} == {
        "0.weight": ("1.weight",), "1.weight": ("0.weight",), "1.bias": ("1.bias",), "0.bias": ("1.bias",)
    }  # fmt: skip
    assert sorted(key.spelled for key in out.ignored) == ["0.bias", "0.extra"]


def test_a_module_that_fills_in_its_own_value_does_not_miss_the_key():
    class Filling(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict.setdefault(prefix + "bias", self.bias)
            super()._load_from_state_dict(state_dict, prefix, *rest)

    class Excusing(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
            missing.remove(prefix + "bias")

    model = nn.Sequential(Filling(2, 2), Excusing(2, 2), nn.Linear(2, 2))
    state = {f"{i}.weight": torch.randn(2, 2) for i in range(3)}
    out = check_like_torch(model, state)
    assert out.excused == ["0.bias", "1.bias"]


def test_a_hook_that_writes_into_what_it_is_given_does_not_write_into_the_source():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._register_load_state_dict_pre_hook(lambda state_dict, prefix, *rest: state_dict[prefix + "weight"].mul_(2))
    state = {"0.weight": torch.randn(2, 2), "0.bias": torch.randn(2)}
    expected = {name: t.clone() for name, t in state.items()}
    expected["0.weight"] *= 2
    got = values(honoured(model, state), state)
    assert all(same_bits(t, expected[name]) for name, t in got.items())
    assert not same_bits(state["0.weight"], expected["0.weight"])


@pytest.mark.parametrize("path", ["0", ""])
def test_a_hook_that_looks_at_values_is_an_error_in_words(path):
    def hook(state_dict, prefix, *rest):
        if state_dict[f"{prefix}{'' if prefix else '0.'}weight"].sum() > 0:
            raise AssertionError

    model = nn.Sequential(nn.Linear(2, 2))
    model.get_submodule(path)._register_load_state_dict_pre_hook(hook)
    state = random_state(model)
    out = honoured(model, state)
    assert [key.name for key in out.keys] == list(state)
    (error,) = out.errors
    assert error.kind == "load hook"
    assert "or not on their shapes alone" in str(error)
    assert str(error).endswith('exclude=["0"]' if path else "call that instead")


@pytest.mark.parametrize(
    "error", [KeyError("gone"), RuntimeError("line\n\x1b[31mtwo"), RecursionError(), MemoryError()]
)
def test_a_hook_that_raises_is_an_error_in_words(error):
    def hook(*args):
        raise error

    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._register_load_state_dict_pre_hook(hook)
    out = honour(pool(random_state(model)), dict(model.named_modules()), {}, into="enc")
    assert "enc.0 (Linear)" in str(out.errors[0])
    assert "\x1b" not in str(out.errors[0])
    assert str(out.errors[0]).endswith('exclude=["enc.0"]')


def test_what_the_module_itself_refuses_is_an_error():
    model = nn.Sequential(nn.InstanceNorm1d(3, affine=True))
    state = random_state(model) | {"0.running_mean": torch.zeros(3), "0.running_var": torch.ones(3)}
    out = honoured(model, state)
    assert "Unexpected running stats buffer(s)" in str(out.errors[0])
    assert [key.name for key in out.keys] == list(state)


def test_another_shape_is_left_for_the_plan_to_say():
    model = nn.Sequential(Migrating(3, 4))
    state = {"0.kernel": torch.randn(5, 5), "0.bias": torch.randn(4)}
    out = honoured(model, state, {"0": {"version": 2}})
    assert out.errors == []
    assert [(key.name, key.shape) for key in out.keys] == [("0.kernel", (5, 5)), ("0.bias", (4,))]
    assert out.shapes == {}


def test_a_module_without_a_key_below_it_is_not_asked():
    def hook(*args):
        raise AssertionError

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    model["a"]._register_load_state_dict_pre_hook(hook)
    out = honoured(model, {"ab.weight": torch.ones(2, 2)})
    assert (out.errors, out.notes, [key.name for key in out.keys]) == ([], [], ["ab.weight"])


def test_extra_state_and_open_shapes_pass_by():
    model = nn.Sequential(Migrating(3, 4))
    keys = [
        Key("0.kernel", "0.kernel", "0.kernel", None, torch.float32),
        Key("0._extra_state", "0._extra_state", "0._extra_state", (9,), torch.uint8),
        Key("0.bias", "0.bias", "0.bias", (4,), torch.float32),
    ]
    out = honour(list(keys), dict(model.named_modules()), {"0": {"version": 2}})
    assert sorted(key.name for key in out.keys) == ["0._extra_state", "0.bias", "0.kernel"]
    assert out.errors == []


def test_a_made_key_is_made_before_the_module_gets_it():
    model = nn.Sequential(Split())
    first = honour(pool({"0.old": torch.empty(6, 3)}), {"0": Halving()}, {})
    assert [key.name for key in first.keys] == ["0.qkv.weight"]
    out = honour(first.keys, dict(model.named_modules()), {})
    state = {"0.old": torch.randn(6, 3)}
    got = values(out, state)
    assert same_bits(torch.cat([got[f"0.{n}.weight"] for n in "qkv"]), state["0.old"] / 2)


class Halving(nn.Module):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[prefix + "qkv.weight"] = state_dict.pop(prefix + "old") / 2


def test_a_post_hook_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    out = honoured(model, random_state(model))
    assert out.notes == ["Sequential: hooks that run after load_state_dict are not called"]


def test_what_cannot_be_copied_is_shared():
    class Holding(Migrating):
        def __init__(self) -> None:
            super().__init__()
            self.lock = __import__("threading").Lock()
            self.handles = [iter([])]
            object.__setattr__(self, "parent", [self])

        def __deepcopy__(self, memo):
            raise AssertionError

    model = nn.Sequential(Holding())
    out = honour(pool({"0.kernel": torch.ones(4, 3), "0.b": torch.ones(4)}), dict(model.named_modules()), {})
    assert out.errors == []
    assert sorted(key.name for key in out.keys) == ["0.bias", "0.kernel"]


def test_other_dtypes_are_cast_by_the_plan_not_by_the_module():
    model = nn.Sequential(Migrating(3, 4)).half()
    state = {"0.kernel": torch.randn(4, 3), "0.b": torch.randn(4)}
    out = honoured(model, state)
    assert {key.name: key.dtype for key in out.keys} == {"0.kernel": torch.float32, "0.bias": torch.float32}
    assert same_bits(values(out, state)["0.kernel"], state["0.kernel"].t())


def test_values_that_come_out_otherwise_than_planned_are_an_error():
    class Growing(nn.Module):
        extra: list[int] = []  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            self.extra.append(1)
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].repeat(len(self.extra))
            super()._load_from_state_dict(state_dict, prefix, *rest)

    out = honour(pool({"weight": torch.ones(2)}), {"": Growing()}, {})
    with pytest.raises(MappingError, match=r"makes \(4,\) of 'weight' where its shapes alone gave \(2,\)"):
        values(out, {"weight": torch.ones(2)})


# Lazy modules.


@pytest.mark.parametrize(
    ("lazy", "real"),
    [
        (lambda: nn.LazyLinear(3), lambda: nn.Linear(5, 3)),
        (lambda: nn.LazyConv2d(3, 2), lambda: nn.Conv2d(4, 3, 2)),
        (nn.LazyBatchNorm1d, lambda: nn.BatchNorm1d(6)),
    ],
)
def test_a_lazy_module_takes_the_shapes_of_the_keys(lazy, real):
    model = nn.Sequential(lazy())
    state = random_state(nn.Sequential(real()))
    out = check_like_torch(model, state, another=lambda _: nn.Sequential(lazy()))  # torch cannot copy a lazy buffer
    assert model[0].has_uninitialized_params()
    assert out.shapes == {name: tuple(t.shape) for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert [key.name for key in out.keys] == list(state)


def test_materialising_each_entry_and_copying_into_it_ends_where_torch_does():
    by_torch, ours = nn.LazyConv2d(3, 2), nn.LazyConv2d(3, 2)
    state = random_state(nn.Conv2d(4, 3, 2))
    weight = ours.weight
    by_torch.load_state_dict(state)
    for name, shape in honoured(ours, state).shapes.items():
        entry = ours.get_parameter(name)
        entry.materialize(shape)
        entry.data.copy_(state[name])
    assert ours.weight is weight
    assert type(ours) is type(by_torch) is nn.LazyConv2d
    assert ours.in_channels == by_torch.in_channels == 0
    assert len(ours._load_state_dict_pre_hooks) == len(by_torch._load_state_dict_pre_hooks) == 1
    assert all(same_bits(t, ours.state_dict()[name]) for name, t in by_torch.state_dict().items())
    x = torch.randn(1, 4, 5, 5)
    assert same_bits(ours(x), by_torch(x))  # the first forward makes it a plain layer and removes its hooks
    assert type(ours) is type(by_torch) is nn.Conv2d


# Parametrized tensors.


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, x: Tensor) -> Tensor:
        if (x <= 0).any():
            raise ValueError("not positive")
        return x.log()


class NoInverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def orthogonal(**how):
    return lambda: parametrizations.orthogonal(nn.Linear(4, 4), **how)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: weight_norm(nn.Linear(4, 4)), ["original0", "original1"]),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), ["original"]),
        (lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric()), ["original"]),
        (orthogonal(), ["0.base", "original"]),
        (orthogonal(orthogonal_map="householder", use_trivialization=False), ["original"]),
    ],
)
def test_field_note_42_a_plain_weight_is_stored_as_assigning_it_would(build, names):
    torch.manual_seed(0)
    model = nn.Sequential(build())
    value = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])  # symmetric and orthogonal
    expected = copy.deepcopy(model)
    expected[0].weight = value
    state = {"0.weight": value.clone(), "0.bias": torch.randn(4)}
    random = torch.get_rng_state()
    out = honoured(model, state)
    assert torch.equal(torch.get_rng_state(), random)
    assert out.errors == []
    got = values(out, state)
    assert sorted(got) == ["0.bias", *(f"0.parametrizations.weight.{name}" for name in names)]
    for name in names:
        path = f"0.parametrizations.weight.{name}"
        assert same_bits(got[path], expected.state_dict()[path])
    assert all(key.sources == ("0.weight",) for key in out.keys if key.name != "0.bias")
    assert same_bits(state["0.weight"], value)


def test_where_nothing_is_computed_the_key_is_only_renamed():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)))
    out = honoured(model, {"0.weight": torch.ones(4, 4)})
    assert [(key.name, key.made) for key in out.keys] == [("0.parametrizations.weight.original", None)]


def test_a_tall_orthogonal_weight_is_the_same_at_every_reading():
    model = parametrizations.orthogonal(nn.Linear(2, 4))
    state = {"weight": torch.linalg.qr(torch.randn(4, 2))[0]}
    out = honoured(model, state)
    first, second = values(out, state), values(out, state)
    assert all(same_bits(first[name], second[name]) for name in first)
    model.load_state_dict(first, strict=False)
    assert torch.allclose(model.weight, state["weight"], atol=1e-5)


def test_a_value_that_the_parametrization_cannot_hold_is_refused_before_anything_is_written(fingerprint):
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)))
    before = fingerprint(model)
    with pytest.raises(warmstart.MappingError, match=r"cannot hold the checkpoint's value[\s\S]*exclude="):
        warmstart.load(model, {"0.weight": torch.randn(4, 4), "0.bias": torch.zeros(4)})
    assert fingerprint(model) == before


def test_a_stored_tensor_in_the_file_is_taken_as_it_is():
    model = weight_norm(nn.Linear(3, 4))
    state = random_state(model) | {"weight": torch.ones(4, 3)}
    assert [key.name for key in honoured(model, state).keys] == list(state)


def test_a_buffer_can_be_parametrized_too():
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "running_var", Exp())
    state = {"running_var": torch.tensor([1.0, 2.0, 3.0])}
    out = honoured(layer, state)
    assert same_bits(values(out, state)["parametrizations.running_var.original"], state["running_var"].log())


def test_wider_keys_are_computed_wide_and_left_to_the_plan_to_round():
    model = weight_norm(nn.Linear(3, 4)).to(torch.bfloat16)
    state = {"weight": torch.randn(4, 3)}
    out = honoured(model, state)
    assert {key.dtype for key in out.keys} == {torch.float32}
    assert same_bits(values(out, state)["parametrizations.weight.original1"], state["weight"])


@pytest.mark.parametrize(
    ("build", "shape", "words"),
    [
        (NoInverse, (3, 3), "NoInverse has no right_inverse to say what to store\n  -> give it one, def right_inverse"),
        (Symmetric, (3, 2), r"of another shape: (3, 2) in the checkpoint, (3, 3) in the model"),
    ],
)
def test_a_plain_weight_that_cannot_be_stored_is_an_error_with_the_fix(build, shape, words):
    model = parametrize.register_parametrization(nn.Linear(3, 3), "weight", build())
    out = honoured(model, {"weight": torch.ones(shape)})
    assert [key.name for key in out.keys] == ["weight"]
    assert words in str(out.errors[0])
    assert "register_parametrization" in str(out.errors[0]).rpartition("->")[2]


def test_a_map_without_inverse_and_a_value_that_is_refused_are_errors():
    model = orthogonal(orthogonal_map="cayley", use_trivialization=False)()
    assert "load before register_parametrization" in str(honoured(model, {"weight": torch.eye(4)}).errors[0])
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "running_var", Exp())
    out = honoured(layer, {"running_var": -torch.ones(3)})
    with pytest.raises(MappingError, match="right_inverse refuses the checkpoint's value: not positive"):
        values(out, {"running_var": -torch.ones(3)})


# What is installed.


def test_transformers_models_with_hooks_load_as_in_torch():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=11, hidden_size=8, state_size=2, num_hidden_layers=2, time_step_rank=2, intermediate_size=16
    )
    model = transformers.MambaModel(config)
    state = random_state(model)
    state["embedding.weight"] = state.pop("embeddings.weight")
    out = check_like_torch(model, state)
    assert next(key for key in out.keys if key.spelled == "embedding.weight").name == "embeddings.weight"

    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    model = nn.Sequential(DetrFrozenBatchNorm2d(3))
    state = random_state(model) | {"0.num_batches_tracked": torch.tensor(7)}
    out = check_like_torch(model, state)
    assert [key.spelled for key in out.ignored] == ["0.num_batches_tracked"]


def test_many_keys_stay_cheap():
    state = {f"layers.{i}.weight": torch.empty(1) for i in range(100_000)}
    modules = {"": nn.Module(), **{f"layers.{i}": nn.Linear(1, 1) for i in range(2000)}}
    keys = pool(state)
    started = time.perf_counter()
    assert len(honour(keys, modules, {}).keys) == 100_000
    assert time.perf_counter() - started < 0.5
    for i in range(0, 2000, 10):
        weight_norm(modules[f"layers.{i}"])
        state |= {f"layers.{i}.weight_g": torch.empty(1, 1), f"layers.{i}.weight_v": torch.empty(1, 1)}
        del state[f"layers.{i}.weight"]
    keys = pool(state)
    started = time.perf_counter()
    out = honour(keys, modules, {})
    assert sum(key.spelled != key.name for key in out.keys) == 400
    assert time.perf_counter() - started < 3


def test_fsdp2_s_own_post_hooks_are_no_news_and_others_beside_them_are():
    script = """
import torch, torch.distributed as dist, warmstart
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
state = {name: value.clone() for name, value in net.state_dict().items()}
fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
assert net[0]._load_state_dict_post_hooks
assert warmstart.plan(net, state).notes == (), warmstart.plan(net, state).notes
net[1].register_load_state_dict_post_hook(lambda module, keys: None)
assert [str(n) for n in warmstart.plan(net, state).notes] == [
    "BatchNorm1d: hooks that run after load_state_dict are not called"
], warmstart.plan(net, state).notes
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
