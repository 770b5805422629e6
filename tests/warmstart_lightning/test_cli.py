"""The callback from a LightningCLI YAML file: every way to write what is to be loaded."""

from __future__ import annotations

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from warmstart import Conversion, SliceOrPad, Stack
from warmstart_lightning import WarmStart

pytestmark = pytest.mark.filterwarnings("ignore")


def parsed(tmp_path, arguments) -> WarmStart:
    callback = {"class_path": "warmstart_lightning.WarmStart", "init_args": arguments}
    config = {"trainer": {"logger": False, "enable_checkpointing": False, "callbacks": [callback]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(BoringModel, run=False, args=["--config", str(path)], save_config_callback=None)
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, WarmStart)]
    return found


@pytest.mark.parametrize(
    "pretrained",
    [
        {"class_path": "warmstart.Pretrained", "init_args": {"source": "a.pt", "into": "enc"}},
        [{"class_path": "warmstart.Pretrained", "init_args": {"source": "a.pt", "into": "enc"}}, "b.pt"],
        [{"source": "a.pt", "into": "enc"}, {"source": "b.pt"}],
    ],
)
def test_field_note_47_sources_with_rules_of_their_own(tmp_path, pretrained):
    first, *rest = parsed(tmp_path, {"pretrained": pretrained}).pretrained
    assert (first.source, first.into) == ("a.pt", "enc")
    assert [part.source for part in rest] == ["b.pt"] * (isinstance(pretrained, list))


def test_conversions_adapters_and_constants_are_plain_data(tmp_path):
    rules = {
        "convert": [{"sources": "e.{i}", "targets": "w", "ops": [{"stack": {"over": "i", "dim": 0}}]}],
        "adapt": {"pos": {"slice_or_pad": {"fill": 0.0}}},
        "fill": {"gain": 1.0},
        "match": "suffix",
        "rename": [{"a": "b"}],
    }
    (part,) = parsed(tmp_path, {"pretrained": "a.pt", **rules}).pretrained
    assert part.conversions == (Conversion("e.{i}", "w", [Stack("i", 0)]),)
    assert part.adapters == {"pos": SliceOrPad(0.0)}
    assert (part.fill, part.match, part.stages) == ({"gain": 1.0}, "suffix", ({"a": "b"},))


def test_what_the_callback_itself_takes(tmp_path):
    options = {"freeze": True, "unfreeze": {2: "enc.1", 4: ["enc"]}, "unfreeze_unit": "step", "held": "train"}
    options |= {
        "stages": ["fit", "validate"],
        "on_freeze_change": "allow",
        "verify": "sample",
        "log": False,
        "name": "a",
    }
    callback = parsed(tmp_path, {"pretrained": "a.pt", "into": "enc", **options})
    told = callback._life.told
    assert (told.schedule.stages, told.unfreeze_unit) == ({2: ["enc.1"], 4: ["enc"]}, "step")
    assert (told.held, told.on_freeze_change, told.verify) == ("train", "allow", "sample")
    assert callback.state_key == "WarmStart{'into': 'a'}"
