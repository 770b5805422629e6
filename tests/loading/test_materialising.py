"""Meta and lazy models: real memory, the model's dtype, owners' own initialisation, ties kept, nothing left on meta."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart import MappingError


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.body = nn.Linear(4, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2, dtype=dtype)


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


def left_on_meta(model: nn.Module) -> list[str]:
    return [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]


def test_x_13_a_meta_model_is_materialised_with_the_file_s_values():
    source = Net().state_dict()
    model = on_meta(Net)
    held = list(model.parameters())
    warmstart.load(model, source)
    assert left_on_meta(model) == []
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.items())
    assert all(
        a is b for a, b in zip(held, model.parameters(), strict=True)
    )  # the objects are kept: no optimizer is orphaned
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("meta", [True, False])
def test_field_note_37_the_model_s_dtype_stays_whether_on_meta_or_not(meta):
    """D14 and D14b: a bf16 file into an fp32 model is fp32 in both."""
    source = {name: t.bfloat16() if t.is_floating_point() else t for name, t in Net().state_dict().items()}
    model = on_meta(Net) if meta else Net()
    warmstart.load(model, source)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.body.weight, source["body.weight"].float())


def test_what_the_file_lacks_is_initialised_by_its_owner_and_what_was_loaded_is_kept():
    source = Net().state_dict()
    partial = {name: t for name, t in source.items() if name != "body.bias" and not name.startswith("head")}
    model = on_meta(Net)
    torch.manual_seed(7)
    report = warmstart.load(model, partial, allow_missing=["body.bias", "head"])
    assert left_on_meta(model) == []
    assert torch.equal(model.body.weight, source["body.weight"])  # reset_parameters drew a weight, which was put back
    torch.manual_seed(7)
    expected = [nn.Linear(4, 4), nn.Linear(4, 2)]
    assert torch.equal(model.body.bias, expected[0].bias)
    assert torch.equal(model.head.weight, expected[1].weight)
    assert any("initialised by their own modules" in note for note in report.notes)


def test_a_full_load_of_a_meta_model_draws_nothing():
    source, model = Net().state_dict(), on_meta(Net)
    before = torch.get_rng_state()
    warmstart.load(model, source)
    assert torch.equal(torch.get_rng_state(), before)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.shift = nn.Parameter(torch.ones(3))


def test_what_has_no_initialisation_is_named_before_anything_is_written():
    model = on_meta(Bare)
    plan = warmstart.plan(model, {"scale": torch.arange(3.0)}, allow_missing="shift")
    assert not plan.errors
    with pytest.raises(MappingError, match=r"shift[\s\S]*Bare has no reset_parameters[\s\S]*fill=\{\"shift\": 0.0\}"):
        plan.apply()
    assert left_on_meta(model) == ["scale", "shift"]
    report = warmstart.load(model, {"scale": torch.arange(3.0)}, fill={"shift": 0.5})
    assert torch.equal(model.shift, torch.full((3,), 0.5))
    assert report.mapping == {"scale": ("scale",), "shift": ()}


class Forgets(Bare):
    def reset_parameters(self):
        nn.init.ones_(self.scale)


def test_an_owner_that_initialises_something_else_is_found_out():
    with pytest.raises(MappingError, match=r"shift[\s\S]*Forgets does not set it"):
        warmstart.load(on_meta(Forgets), {"scale": torch.arange(3.0)}, allow_missing="shift")


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))
        self.register_buffer("inv_freq", torch.arange(3.0), persistent=False)


class Recomputes(Rotary):
    def reset_parameters(self):
        self.inv_freq = torch.arange(3.0)
        nn.init.zeros_(self.weight)


def test_field_note_23_a_non_persistent_buffer_is_recomputed_or_demanded():
    """M4: all that is left on meta is a buffer that no file has."""
    model = on_meta(Recomputes)
    warmstart.load(model, {"weight": torch.ones(2)})
    assert torch.equal(model.inv_freq, torch.arange(3.0))
    assert torch.equal(model.weight, torch.ones(2))
    model = on_meta(Rotary)
    with pytest.raises(MappingError, match=r"inv_freq[\s\S]*include_buffers=False"):
        warmstart.load(model, {"weight": torch.ones(2)})
    assert model.weight.is_meta


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("key", ["embed.weight", "head.weight"])
def test_field_note_14_ties_are_still_tied_when_they_were_on_meta(key):
    model = on_meta(Tied)
    warmstart.load(model, {key: torch.arange(15.0).reshape(5, 3)})
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, torch.arange(15.0).reshape(5, 3))


def test_what_is_out_of_scope_stays_on_meta():
    model = on_meta(Net)
    warmstart.load(model, nn.Linear(4, 4).state_dict(), into="body")
    assert left_on_meta(model) == [n for n in left_on_meta(on_meta(Net)) if not n.startswith("body")]


def test_an_owner_s_real_tensors_are_left_alone():
    model = Net()
    model.body.bias = nn.Parameter(torch.full((4,), 5.0))
    model.body.weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    report = warmstart.load(
        model, {"norm.weight": torch.ones(4)}, include=["norm.weight", "body.weight"], allow_missing="body"
    )
    assert torch.equal(model.body.bias, torch.full((4,), 5.0))
    assert not model.body.weight.is_meta
    assert model.body.weight.abs().max() <= 0.5
    assert report.missing == ("body.weight",)


def test_a_transformers_model_on_meta_computes_the_same():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    source = LlamaForCausalLM(config).eval()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    warmstart.load(model, source.state_dict())
    assert left_on_meta(model) == []
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)


def test_a_lazy_model_takes_the_file_s_shapes():
    source = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    report = warmstart.load(model, source.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(model(x), source(x))
    assert type(model[0]) is nn.Linear
    assert report.coverage == 1


def test_a_lazy_model_that_the_file_does_not_fill_stays_lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    source = copy.deepcopy(model[1].state_dict())
    plan = warmstart.plan(model, {f"1.{k}": v for k, v in source.items()})
    assert [p.kind for p in plan.errors] == ["missing"]
    warmstart.load(model, {f"1.{k}": v for k, v in source.items()}, allow_missing="0")
    assert nn.parameter.is_lazy(model[0].weight)


class Parent(nn.Module):
    """An owner that initialises its children too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.child = nn.Linear(2, 2)

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        nn.init.constant_(self.child.weight, 9)
        nn.init.constant_(self.child.bias, 9)


def test_m1_an_owner_s_initialisation_leaves_what_its_children_had():
    with torch.device("meta"):
        model = Parent()
    first = warmstart.load(model, {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, into="child")
    warmstart.load(model, {"scale": torch.ones(1)}, include="scale", adapt={"scale": warmstart.SliceOrPad()})
    first.check(model)
    assert torch.equal(model.scale, torch.ones(2))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_weak_references_to_their_weights(kind):
    source = kind(3, 4)
    with torch.device("meta"):
        model = nn.ModuleDict({"rnn": kind(3, 4)})
    warmstart.load(model, source.state_dict(), into="rnn")
    x = torch.randn(2, 1, 3)
    assert torch.equal(model["rnn"](x)[0], source(x)[0])


def test_an_adapter_that_gives_every_element_needs_no_initialisation():
    with torch.device("meta"):
        model = Bare()
    state = {"scale": torch.ones(2), "shift": torch.ones(3)}
    warmstart.load(model, state, adapt={"scale": warmstart.SliceOrPad(4.0)})
    assert torch.equal(model.scale, torch.tensor([1.0, 1, 4]))


def test_an_adapter_at_a_lazy_entry_is_an_error():
    model = nn.Sequential(nn.LazyLinear(3))
    state = {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3)}
    plan = warmstart.plan(model, state, adapt={"0": warmstart.MapRows(list("abc"), list("cab"))})
    assert "adapter" in [p.kind for p in plan.errors]
    assert "dummy batch" in plan.explain()


def test_observers_take_the_shapes_of_their_file():
    from torch.ao.quantization import PerChannelMinMaxObserver

    source, model = nn.Sequential(PerChannelMinMaxObserver()), nn.Sequential(PerChannelMinMaxObserver())
    source(torch.randn(4, 4))
    warmstart.load(model, source.state_dict())
    assert torch.equal(model[0].min_val, source[0].min_val)
    assert model[0].min_val.shape == (4,)


def test_a_plain_weight_into_weight_norm_on_meta():
    with torch.device("meta"):
        model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    value = torch.randn(4, 3)
    warmstart.load(model, {"weight": value, "bias": torch.zeros(4)})
    assert torch.allclose(model.weight, value, atol=1e-6)


class Averaging(nn.Module):
    """A buffer that is written to in a forward that autograd records."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        return self.mean.mul_(0.5).add_(self.weight * x * 0.5).sum()


def test_a_buffer_with_a_file_s_pages_for_memory_may_be_written_to_under_autograd(tmp_path):
    save_file({"weight": torch.full((4,), 3.0), "mean": torch.full((4,), 2.0)}, tmp_path / "a.safetensors")
    model = on_meta(Averaging)
    warmstart.load(model, tmp_path / "a.safetensors")
    model(torch.ones(4)).backward()
    assert torch.equal(model.mean, torch.full((4,), 2.5))
    assert torch.equal(model.weight.grad, torch.full((4,), 0.5))


class Reaching(nn.Module):
    """An owner that writes, also past torch's count of writes, to what is not below it."""

    def __init__(self, other: nn.Linear):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(2))
        self.others = [other]
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.scale, 5.0)
        nn.init.constant_(self.others[0].weight, 7.0)
        self.others[0].bias.data.fill_(7.0)


class Reached(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.head = Reaching(self.body)


@pytest.mark.parametrize("verify", ["full", "sample", "off"])
def test_an_owner_that_reaches_beyond_itself_leaves_what_a_file_gave(tmp_path, verify):
    source = {"body.weight": torch.arange(6.0).view(2, 3), "body.bias": torch.tensor([8.0, 9.0])}
    save_file(source, tmp_path / "a.safetensors")
    model = on_meta(Reached)
    warmstart.load(model, tmp_path / "a.safetensors", verify=verify, allow_missing="head")
    assert torch.equal(model.body.weight, source["body.weight"])
    assert torch.equal(model.body.bias, source["body.bias"])
    assert torch.equal(model.head.scale, torch.full((2,), 5.0))


@pytest.mark.parametrize("verify", ["full", "sample", "off"])
def test_a_lazy_model_on_meta_gets_memory(tmp_path, verify):
    source = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    model = on_meta(lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)))
    warmstart.load(model, tmp_path / "a.safetensors", verify=verify)
    assert left_on_meta(model) == []
    x = torch.randn(3, 6)
    assert torch.equal(model(x), source(x))
