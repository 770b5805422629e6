"""Numbered layers against named ones: sure where they fit in one way only, and silent where anything else would fit as well."""

from __future__ import annotations

import random

import pytest

import mobilenetv2
from warmstart import MappingError
from warmstart.mapping.planning.renames import Renamer

NORM = ("weight", "bias", "running_mean", "running_var")
WIDTHS = (8, 12, 12, 16, 16, 16, 24)


def conv_norm(conv, norm, *shape):
    return {f"{conv}.weight": shape, **{f"{norm}.{tensor}": shape[:1] for tensor in NORM}}


def pair(rows):
    """Both sides, and entry to key, of (key, entry, shape) for the convolutions and norms of each row."""
    keys, truth = {}, {}
    for (conv, norm), (own_conv, own_norm), shape in rows:
        theirs, ours = conv_norm(conv, norm, *shape), conv_norm(own_conv, own_norm, *shape)
        keys |= theirs
        truth |= dict(zip(ours, theirs, strict=True))
    return keys, {entry: keys[key] for entry, key in truth.items()}, truth


def bottlenecks(name, widths=WIDTHS, blocks="blocks.{}"):
    """Inverted residuals as an `nn.Sequential`, and named: `name` gives the n-th convolution and norm of a block."""
    rows = [(("features.0.0", "features.0.1"), ("stem.conv", "stem.norm"), (widths[0], 3, 3, 3))]
    width = widths[0]
    for block, out in enumerate(widths[1:], 1):
        shapes = [(width * 6, width, 1, 1), (width * 6, 1, 3, 3), (out, width * 6, 1, 1)]
        for turn, shape in enumerate(shapes):
            at = f"features.{block}.conv"
            theirs = f"{at}.{3 * turn}", f"{at}.{3 * turn + 1}"
            rows.append((theirs, tuple(f"{blocks.format(block)}.{n}" for n in name(turn)), shape))
        width = out
    return pair(rows)


def named(turn):
    part = ("expand", "depthwise", "project")[turn]
    return f"{part}.conv", f"{part}.norm"


def separately(turn):
    return ("conv_pw", "conv_dw", "conv_pwl")[turn], f"bn{turn + 1}"


def residual(shortcut="shortcut"):
    """A ResNet as torchvision spells it, and by stages and words; the first shortcut has the shape of a map beside it."""
    rows, width = [], 8
    for stage, inner in enumerate((8, 16, 32, 64)):
        for block in range(3):
            for turn, shape in enumerate(((inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1))):
                at, own = f"layer{stage + 1}.{block}", f"encoder.stages.{stage}.layers.{block}"
                theirs = f"{at}.conv{turn + 1}", f"{at}.bn{turn + 1}"
                rows.append((theirs, (f"{own}.layer.{turn}.convolution", f"{own}.layer.{turn}.normalization"), shape))
            if not block:
                theirs = f"{at}.downsample.0", f"{at}.downsample.1"
                own = f"{own}.{shortcut}"
                rows.append((theirs, (f"{own}.convolution", f"{own}.normalization"), (4 * inner, width, 1, 1)))
            width = 4 * inner
    return pair(rows)


def sure(suggestion):
    return {entry: keys[0] for entry, keys in suggestion.mapping.items()}


@pytest.mark.parametrize("name", [named, separately])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_sequence_of_blocks_into_named_ones(suggest, name, swapped):
    keys, entries, truth = bottlenecks(name)
    if swapped:
        keys, entries, truth = entries, keys, {key: entry for entry, key in truth.items()}
    found = sure(suggest(keys, entries))
    assert {entry: truth[entry] for entry in found} == found
    stem = {entry for entry in truth if not entry.startswith(("blocks", "features"))}
    assert set(found) >= set(truth) - stem


def test_one_rule_for_each_place_in_a_block(suggest):
    keys, entries, truth = bottlenecks(named)
    rename = suggest(keys, entries).pretrained.rename
    assert rename[r"^features\.(\d+)\.conv\.3"] == r"blocks.\1.depthwise.conv"
    assert len(rename) == 2 + 6
    renamer = Renamer([rename])
    assert {entry: key for key in keys if (entry := renamer(key))} == truth


def test_blocks_of_unlike_names_are_told_by_the_names_of_others(suggest):
    """In the first stage `downsample` has the shape of `conv3`; in the others it has not."""
    keys, entries, truth = residual()
    assert sure(suggest(keys, entries)) == truth
    keys, entries, truth = residual("other")
    assert sure(suggest(keys, entries)) == truth


def test_the_order_of_names_is_no_evidence(suggest):
    keys, entries, _ = bottlenecks(separately)
    chance = random.Random(0)
    shuffled = [dict(chance.sample(list(side.items()), len(side))) for side in (keys, entries)]
    assert sure(suggest(*shuffled)) == sure(suggest(keys, entries))


@pytest.mark.parametrize(
    ("lost", "other"),
    [
        ("features.5.", "blocks.4."),  # two blocks of one shape
        ("features.5.conv.0.", "blocks.4.expand.conv"),
        ("features.5.conv.1.", "blocks.5.depthwise.norm"),  # two norms of one width
        ("features.5.conv.4.", "blocks.5.expand.norm"),
        ("features.4.conv.4.", "blocks.5.expand."),
    ],
)
@pytest.mark.parametrize("name", [named, separately])
def test_another_layer_of_one_shape_missing_on_each_side(suggest, lost, other, name):
    """Nothing that is sure is wrong, and what lost its partner has none."""
    keys, entries, truth = bottlenecks(name)
    if name is separately:
        for words, parts in (("expand", ("conv_pw", "bn1")), ("depthwise", ("conv_dw", "bn2"))):
            other = (
                other.replace(f"{words}.conv", parts[0])
                .replace(f"{words}.norm", parts[1])
                .replace(f"{words}.", parts[0])
            )
    keys = {key: shape for key, shape in keys.items() if not key.startswith(lost)}
    entries = {entry: shape for entry, shape in entries.items() if not entry.startswith(other)}
    try:
        found = sure(suggest(keys, entries))
    except MappingError:
        return
    assert {entry: truth[entry] for entry in found} == found


def darknet(count=4):
    """Stages of a convolution and blocks, named, and all in one row: the first two 3x3 maps of a stage are of one shape."""
    rows, width = [(("conv1.conv", "conv1.bn"), ("model.0.conv", "model.0.bn"), (4, 3, 3, 3))], 4
    for stage in range(1, count + 1):
        at, turn = f"stage{stage}", 2 * stage - 1
        rows.append(
            ((f"{at}.conv.conv", f"{at}.conv.bn"), (f"model.{turn}.conv", f"model.{turn}.bn"), (2 * width, width, 3, 3))
        )
        width *= 2
        for block in range(stage):
            for part, shape in ((1, (width // 2, width, 1, 1)), (2, (width, width // 2, 3, 3))):
                theirs, ours = f"{at}.res{block}.conv{part}", f"model.{turn + 1}.{block}.cv{part}"
                rows.append(((f"{theirs}.conv", f"{theirs}.bn"), (f"{ours}.conv", f"{ours}.bn"), shape))
    return pair(rows)


def test_what_nothing_beside_it_settles_is_told_by_all(suggest):
    keys, entries, truth = darknet()
    assert sure(suggest(keys, entries)) == truth


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [darknet, residual, lambda: bottlenecks(separately)])
def test_nothing_sure_is_wrong_whatever_is_missing(suggest, make, seed):
    keys, entries, truth = make()
    chance = random.Random(seed)
    for side in (keys, entries):
        modules = sorted(
            {name.rsplit(".", depth)[0] for name in side for depth in (1, 2, 3) if name.count(".") > depth}
        )
        for lost in chance.sample(modules, 2):
            for name in [name for name in side if name.startswith(f"{lost}.")]:
                del side[name]
    try:
        found = sure(suggest(keys, entries))
    except MappingError:
        return
    assert {entry: truth.get(entry) for entry in found} == found


def test_like_blocks_may_be_any(suggest):
    """A tower of blocks that are all alike, one of two on each side: shapes say nothing of which it is."""
    keys, entries, _ = bottlenecks(named)
    for i in range(4):
        keys |= conv_norm(f"classes.{i}.0", f"classes.{i}.1", 24, 24, 3, 3)
        entries |= conv_norm(f"box_tower.part{i}.conv", f"box_tower.part{i}.norm", 24, 24, 3, 3)
    suggestion = suggest(keys, entries)
    assert len(suggestion.mapping) >= 5 * 18
    assert not any(entry.startswith("box_tower") for entry in suggestion.mapping)


def test_two_towers_of_one_shape_are_not_told_apart(suggest):
    keys, entries = {}, {}
    for theirs, ours in (("rgb", "left"), ("depth", "right")):
        a, b, _ = bottlenecks(named)
        keys |= {f"{theirs}.{key}": shape for key, shape in a.items()}
        entries |= {f"{ours}.{entry}": shape for entry, shape in b.items()}
    with pytest.raises(MappingError, match="too little in common"):
        suggest(keys, entries)


def test_mobilenetv2_of_the_example(suggest):
    """All names differ, and the rules are those that were written by hand."""
    model = mobilenetv2.MobileNetV2().state_dict()
    back = {}
    for rule, name in mobilenetv2.RENAMES.items():
        for entry in model:
            block = entry.split(".")[1] if entry.startswith("blocks.") else ""
            prefix = name.replace(r"\1", block)
            if entry.startswith(f"{prefix}.") and entry not in back:
                back[entry] = rule.replace("\\.", ".").replace(r"(\d+)", block) + entry.removeprefix(prefix)
    assert len(set(back.values())) == len(model) == 312
    suggestion = suggest(
        {key: tuple(model[entry].shape) for entry, key in back.items()}, {n: tuple(t.shape) for n, t in model.items()}
    )
    assert sure(suggestion) == back
    assert {rule.removeprefix("^"): name for rule, name in suggestion.pretrained.rename.items()} == mobilenetv2.RENAMES


@pytest.mark.parametrize("turn", range(8))
def test_a_layer_goes_where_its_bias_went(suggest, turn):
    """A map whose own partner has lost its weight is none for another of its shape."""
    keys, entries = {}, {}
    for level in range(8):
        shape = (4 * (level + 1), 3 * (level + 2), 1, 1)
        keys |= {f"neck.{level}.proj.weight": shape, f"neck.{level}.proj.bias": shape[:1]}
    keys |= {"mask.final.bias": (4 * (turn + 1),)}
    entries = dict(keys)
    keys["mask.final.weight"] = keys.pop(f"neck.{turn}.proj.weight")
    assert sure(suggest(keys, entries)) == {name: name for name in keys.keys() & entries.keys()}
