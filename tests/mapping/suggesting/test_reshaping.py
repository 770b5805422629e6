"""Conversions, where names fit and shapes say that tensors are fused, stacked or transposed."""

from __future__ import annotations

import pytest
import torch

import warmstart
from warmstart import Pretrained
from warmstart.mapping.suggesting.suggesting import suggest_rules

from .conftest import layers, net

D, F, E = 6, 10, 3
REST = {"norm.weight": (D,), "attn.proj.weight": (D, D + 1), "mlp.down.weight": (D, F), "mlp.up.weight": (F, D)}


def loaded(keys, entries, **options):
    """The suggestion, and the model and the tensors after loading with it."""
    source = {key: torch.randn(shape) for key, shape in keys.items()}
    model = net(entries).to_empty(device="cpu")
    suggestion = suggest_rules(model, Pretrained(source), warmstart.open_checkpoint(source), **options)
    plan = warmstart.plan(model, suggestion.pretrained)
    assert plan.mapping == suggestion.mapping
    if not plan.errors:
        plan.apply()
    return suggestion, model.state_dict(), source


@pytest.mark.parametrize("name", ["qkv", "in_proj"])
def test_a_fused_projection_is_split_into_three(name):
    keys = layers("net.blocks.{}", REST | {f"attn.{name}.weight": (3 * D, D), f"attn.{name}.bias": (3 * D,)}, range(2))
    parts = {
        f"attn.{p}.{leaf}": shape
        for p in ("q_proj", "k_proj", "v_proj")
        for leaf, shape in (("weight", (D, D)), ("bias", (D,)))
    }
    suggestion, state, source = loaded(keys, layers("layers.{}", REST | parts, range(2)))
    assert suggestion.unexplained == ((), ())
    for i in range(2):
        got = torch.cat([state[f"layers.{i}.attn.{p}.weight"] for p in ("q_proj", "k_proj", "v_proj")])
        assert torch.equal(got, source[f"net.blocks.{i}.attn.{name}.weight"])


def test_three_projections_are_joined_into_one():
    parts = {f"attn.{p}_proj.weight": (D, D) for p in "qkv"}
    suggestion, state, source = loaded(
        layers("layers.{}", REST | parts, range(2)),
        layers("blocks.{}", REST | {"attn.qkv.weight": (3 * D, D)}, range(2)),
    )
    assert suggestion.unexplained == ((), ())
    want = torch.cat([source[f"layers.1.attn.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(state["blocks.1.attn.qkv.weight"], want)


def test_query_key_value_may_be_interleaved_and_is_only_proposed():
    keys = layers("h.{}", REST | {"attn.query_key_value.weight": (3 * D, D)}, range(2))
    parts = {f"attn.{p}_proj.weight": (D, D) for p in "qkv"}
    entries = layers("layers.{}", REST | parts, range(2))
    suggestion, _, _ = loaded(keys, entries)
    assert not [entry for entry in suggestion.mapping if "_proj" in entry]
    assert "interleaved" in str(suggestion)
    accepted, state, source = loaded(keys, entries, accept="layers.*.attn.q_proj")
    assert len(accepted.mapping) == len(entries)
    assert torch.equal(state["layers.0.attn.k_proj.weight"], source["h.0.attn.query_key_value.weight"][D : 2 * D])


def test_one_tensor_for_each_expert_is_stacked_into_one():
    experts = {f"moe.experts.{e}.w_in.weight": (F, D) for e in range(E)}
    suggestion, state, source = loaded(
        layers("layers.{}", REST | experts, range(2)),
        layers("layers.{}", REST | {"moe.experts.w_in": (E, F, D)}, range(2)),
    )
    assert suggestion.unexplained == ((), ())
    want = torch.stack([source[f"layers.1.moe.experts.{e}.w_in.weight"] for e in range(E)])
    assert torch.equal(state["layers.1.moe.experts.w_in"], want)


def test_one_tensor_for_all_experts_is_unstacked():
    experts = {f"moe.experts.{e}.w_in.weight": (F, D) for e in range(E)}
    suggestion, state, source = loaded(
        layers("layers.{}", REST | {"moe.experts.w_in": (E, F, D)}, range(2)),
        layers("model.layers.{}", REST | experts, range(2)),
    )
    assert suggestion.unexplained == ((), ())
    assert torch.equal(state["model.layers.0.moe.experts.2.w_in.weight"], source["layers.0.moe.experts.w_in"][2])


def test_a_transposed_matrix_is_transposed_and_square_ones_beside_it_are_doubted():
    keys = layers(
        "h.{}",
        {"mlp.c_fc.weight": (D, F), "attn.c_proj.weight": (D, D), "ln.weight": (D,), "mlp.c_fc.bias": (F,)},
        range(3),
    )
    entries = layers(
        "h.{}",
        {"mlp.c_fc.weight": (F, D), "attn.c_proj.weight": (D, D), "ln.weight": (D,), "mlp.c_fc.bias": (F,)},
        range(3),
    )
    suggestion, _, source = loaded(keys, entries)
    assert suggestion.mapping["h.0.mlp.c_fc.weight"] == ("h.0.mlp.c_fc.weight",)
    assert not [entry for entry in suggestion.mapping if "c_proj" in entry]
    assert "square" in str(suggestion)
    plan = warmstart.plan(net(entries).to_empty(device="cpu"), suggestion.pretrained)
    report = plan.apply()
    assert torch.equal(report.plan.model.state_dict()["h.1.mlp.c_fc.weight"], source["h.1.mlp.c_fc.weight"].T)
