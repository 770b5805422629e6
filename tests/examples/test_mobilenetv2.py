"""The example's rules lead every tensor of the pretrained file to the right place."""

from __future__ import annotations

import pytest
import torch

import warmstart
from mobilenetv2 import RENAMES, MobileNetV2
from real_weights import MOBILENETV2
from warmstart.tensors import same_bits


@pytest.fixture(scope="module")
def weights():
    return MOBILENETV2.fetch()


def test_the_rules_map_every_tensor_one_to_one(weights):
    model = MobileNetV2()
    plan = warmstart.plan(model, weights, rename=RENAMES)
    assert not plan.errors
    assert set(plan.mapping) == set(model.state_dict())
    assert {len(keys) for keys in plan.mapping.values()} == {1}
    assert len({keys[0] for keys in plan.mapping.values()}) == 312
    assert plan.coverage == 1
    assert plan.missing == plan.unexpected == ()
    assert not plan.mismatched


def test_the_model_holds_the_file_in_its_order(weights):
    """The file lists its tensors in the network's order, as the module does: an answer that needs no names."""
    model = MobileNetV2()
    report = warmstart.load(model, weights, rename=RENAMES)
    pretrained = torch.load(weights, map_location="cpu", weights_only=True)
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), pretrained.values(), strict=True))
    report.check(model)


@pytest.mark.parametrize("rule", RENAMES)
def test_every_rule_is_needed(weights, rule):
    fewer = {pattern: name for pattern, name in RENAMES.items() if pattern != rule}
    assert warmstart.plan(MobileNetV2(), weights, rename=fewer).errors


def test_pretrained_features_are_finite_and_tell_images_apart(weights):
    model = MobileNetV2().eval()
    warmstart.load(model, weights, rename=RENAMES)
    with torch.no_grad():
        features = model(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, MobileNetV2.features)
    assert features.isfinite().all()
    assert 0.05 < features.std() < 1
    assert not torch.equal(features[0], features[1])
