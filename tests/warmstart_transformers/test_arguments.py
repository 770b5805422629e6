"""`WarmStartArguments` beside `TrainingArguments`: flags, YAML and JSON files, and a Trainer made of them."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from tiny import Plain, equal, numbers, weights
from transformers import HfArgumentParser, Trainer, TrainingArguments

from warmstart import MappingError, PretrainedFields
from warmstart_transformers import WarmStartArguments, WarmStartCallback

PARSER = (WarmStartArguments, TrainingArguments)


def parsed(*flags: str) -> WarmStartArguments:
    return HfArgumentParser(WarmStartArguments).parse_args_into_dataclasses([str(flag) for flag in flags])[0]


def train(warm: WarmStartArguments, args: TrainingArguments) -> Plain:
    model = Plain()
    Trainer(model, args, train_dataset=numbers(), callbacks=warm.callbacks()).train()
    return model


def training_flags(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "num_train_epochs": 1, "logging_strategy": "no",
    }  # fmt: skip


def test_flags_make_a_run(plain_source, tmp_path):
    own = ["--warmstart_source", plain_source, "--warmstart_into", "encoder", "--warmstart_freeze", "true"]
    theirs = [word for name, value in training_flags(tmp_path).items() for word in (f"--{name}", str(value))]
    warm, args = HfArgumentParser(PARSER).parse_args_into_dataclasses([*map(str, own), *theirs])
    model = train(warm, args)
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))
    assert not model.encoder[0].weight.requires_grad


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_files_make_a_run(plain_source, tmp_path, kind):
    rules = {
        "warmstart_source": str(plain_source), "warmstart_into": "encoder", "warmstart_freeze": ["encoder.0", "encoder.1"],
        "warmstart_rename": {"^0": "0"}, "warmstart_unfreeze": {"1": "encoder.1"},
    }  # fmt: skip
    path = tmp_path / f"run.{kind}"
    path.write_text(json.dumps(rules | training_flags(tmp_path)))  # which is YAML too
    parser = HfArgumentParser(PARSER)
    warm, args = parser.parse_yaml_file(path) if kind == "yaml" else parser.parse_json_file(path)
    model = train(warm, args)
    expected = torch.load(plain_source, weights_only=True)
    assert torch.equal(model.encoder[0].weight, expected["0.weight"])
    assert not torch.equal(model.encoder[3].weight, expected["3.weight"])


def test_structured_flags_are_json():
    (callback,) = parsed(
        "--warmstart_source", "a.pt", "--warmstart_rename", '{"^a": "b"}', "--warmstart_fill", '{"x.bias": 0}',
        "--warmstart_adapt", '{"pos": {"slice_or_pad": {"fill": "keep"}}}', "--warmstart_min_coverage", "0.5",
        "--warmstart_convert", '[{"sources": "q", "targets": ["k", "v"]}]', "--warmstart_unfreeze", '{"2": ["a", "b"]}',
        "--warmstart_unfreeze_unit", "step", "--warmstart_freeze", "a", "b", "--warmstart_trust_pickle", "false",
    ).callbacks()  # fmt: skip
    (part,) = callback.pretrained
    assert part.rename == {"^a": "b"}
    assert part.fill == {"x.bias": 0.0}
    assert part.min_coverage == 0.5
    assert part.freeze == ["a", "b"]
    assert not part.trust_pickle
    assert len(part.convert) == len(part.adapt) == 1
    assert callback._life.told.schedule.stages == {2: ["a", "b"]}


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_several_sources_with_their_own_rules(plain_source, tmp_path, kind):
    torch.save({"weight": torch.ones(2, 8), "bias": torch.ones(2)}, tmp_path / "head.pt")
    parts = [
        {"source": str(plain_source), "into": "encoder", "freeze": True},
        {"source": str(tmp_path / "head.pt"), "into": "head"},
    ]
    config = tmp_path / f"warm.{kind}"
    config.write_text(json.dumps({"pretrained": parts, "verify": "sample", "log": False}))
    (callback,) = parsed("--warmstart_config", config, "--warmstart_verify", "full").callbacks()
    assert callback._life.told.verify == "full"  # a flag takes precedence
    model = Plain()
    Trainer(model, TrainingArguments(**training_flags(tmp_path)), train_dataset=numbers(), callbacks=[callback])
    assert equal(weights(model.encoder), torch.load(plain_source, weights_only=True))
    assert model.head.weight.eq(1).all()


def test_no_source_is_no_callback():
    assert parsed().callbacks() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmstart_into", "encoder"], "--warmstart_into without a source; add --warmstart_source FILE"),
        (["--warmstart_source", "a", "--warmstart_rename", "x"], "--warmstart_rename 'x' is no JSON"),
    ],
)
def test_what_cannot_be_meant_is_told_with_the_flag_to_type(flags, message):
    with pytest.raises(MappingError, match=message):
        parsed(*flags).callbacks()


def test_a_rule_beside_several_sources_is_refused():
    with pytest.raises(TypeError, match="into"):
        parsed("--warmstart_source", "a", "b", "--warmstart_into", "encoder").callbacks()


def test_every_keyword_has_its_flag():
    keywords = set(inspect.signature(WarmStartCallback).parameters) - {"pretrained", "fields"}
    flags = {field.name.removeprefix("warmstart_") for field in dataclasses.fields(WarmStartArguments)}
    assert flags == keywords | PretrainedFields.__annotations__.keys() | {"source", "config"}
    assert all(field.metadata["help"] for field in dataclasses.fields(WarmStartArguments))
