"""A callback's YAML, several sources among it: `warmstart plan` prints the plan that each callback makes, and locks are one."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart.cli.configs import OF_HOSTS

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks

SEVERAL = {
    "pretrained": [
        {"source": "vision.safetensors", "into": "image", "freeze": ["image.bias"]},
        {
            "source": "text.safetensors",
            "into": "text",
            "rename": {"w": "weight", "b": "bias"},
            "allow_unexpected": "old",
        },
    ],
    "verify": "sample",
    "held": "train",
    "log": False,
}
ONE = {"pretrained": "vision.safetensors", "into": "image", "freeze": True, "verify": "full", "log": False}

TOWERS = """
import torch
from lightning.pytorch import LightningModule
from torch import nn

class Towers(LightningModule):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, labels=None):
        return {"loss": self.text(self.image(x)).sum()}

    def training_step(self, batch, index):
        return self(batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"x": torch.ones(4), "labels": 0}
"""


@pytest.fixture
def towers(tmp_path, monkeypatch, run):
    pytest.importorskip("lightning.pytorch")
    save_file({"weight": torch.randn(4, 4), "bias": torch.randn(4)}, tmp_path / "vision.safetensors")
    save_file({"w": torch.randn(4, 4), "b": torch.randn(4), "old": torch.ones(1)}, tmp_path / "text.safetensors")
    (tmp_path / "towers_of_yaml.py").write_text(TOWERS)
    monkeypatch.syspath_prepend(tmp_path)
    return import_module("towers_of_yaml")


def by_lightning(towers, keywords, folder):
    from lightning.pytorch.cli import LightningCLI

    callback = {"class_path": "warmstart_lightning.WarmStart", "init_args": keywords}
    trainer = {"callbacks": [callback], "logger": False, "enable_checkpointing": False, "max_epochs": 1,
               "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    (folder / "fit.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    cli = LightningCLI(towers.Towers, run=False, args=["--config", str(folder / "fit.yaml")], save_config_callback=None)
    cli.trainer.fit(cli.model, torch.utils.data.DataLoader(torch.ones(2, 4), batch_size=2))
    return cli.trainer.callbacks[0].report


def by_transformers(towers, keywords, folder):
    transformers = pytest.importorskip("transformers")
    from warmstart_transformers import WarmStartArguments

    (folder / "hf.yaml").write_text(yaml.safe_dump(keywords))
    parser = transformers.HfArgumentParser((WarmStartArguments,))
    (arguments,) = parser.parse_args_into_dataclasses(["--warmstart_config", str(folder / "hf.yaml")])
    (callback,) = arguments.callbacks()
    settings = transformers.TrainingArguments(str(folder / "run"), report_to=[], use_cpu=True)
    transformers.Trainer(towers.Towers(), settings, train_dataset=towers.Data(), callbacks=[callback])
    return callback.report


def by_accelerate(towers, keywords, folder):
    accelerate = pytest.importorskip("accelerate")
    from warmstart_accelerate import warm_start

    options = dict(keywords)
    sources = options.pop("pretrained")
    if not isinstance(sources, str):
        sources = [warmstart.Pretrained(**each) for each in sources]
    return warm_start(accelerate.Accelerator(cpu=True), towers.Towers(), sources, **options)


@pytest.mark.parametrize("keywords", [SEVERAL, ONE], ids=["several", "one"])
@pytest.mark.parametrize("host", [by_lightning, by_transformers, by_accelerate])
def test_the_same_yaml_gives_the_same_plan_and_one_lock(run, towers, tmp_path, keywords, host):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(keywords))
    arguments = ("plan", "--model", "towers_of_yaml:Towers", "--config", "rules.yaml", "--lock", "l.yaml")
    ran = run(*arguments)
    assert ran.code == 0, ran.err
    report = host(towers, keywords | {"lock": "l.yaml"}, tmp_path)
    assert ran.out == f"{report.plan}\nl.yaml: written\n"
    assert (tmp_path / "l.yaml").read_text() == report.plan.to_yaml()
    assert report.status == "applied"
    (tmp_path / "l.yaml").write_text(report.plan.to_yaml())
    assert run(*arguments).out.endswith("l.yaml: unchanged\n")


def test_a_lock_in_the_yaml_is_the_one_that_is_written(run, towers, tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(SEVERAL | {"lock": "in.lock.yaml"}))
    assert run("plan", "--model", "towers_of_yaml:Towers", "--config", "rules.yaml").code == 0
    assert '"text.weight"' in (tmp_path / "in.lock.yaml").read_text()


def test_what_lightning_saves_is_understood(run, towers, tmp_path):
    parts = [{"class_path": "warmstart.Pretrained", "init_args": part} for part in SEVERAL["pretrained"]]
    saved = {"class_path": "warmstart_lightning.WarmStart", "init_args": SEVERAL | {"pretrained": parts}}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(SEVERAL))
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(saved))
    plain, wrapped = (
        run("plan", "--model", "towers_of_yaml:Towers", f"--config={name}.yaml", "--json")
        for name in ("rules", "saved")
    )
    assert plain.data == wrapped.data
    assert [part["source"] for part in plain.data["parts"]] == ["vision.safetensors", "text.safetensors"]
    assert plain.data["freeze"] == ["image.bias"]


def test_one_source_of_its_own_rules_is_understood_by_every_command(run, towers, tmp_path):
    (tmp_path / "rules.yaml").write_text("pretrained: {source: text.safetensors}\nverify: full\n")
    data = run("inspect", "--config", "rules.yaml", "--json").data
    assert sorted(tensor["key"] for tensor in data["tensors"]) == ["b", "old", "w"]


@pytest.mark.parametrize(("text", "arguments", "words"), [
    ("pretrained: [a.pt, b.pt]", ("inspect",), "names 2 sources, and this command takes one; plan takes several"),
    ("pretrained: [a.pt, {into: x}]", ("plan",), "should be a file, or a mapping such as {source: FILE, into: encoder}"),
    ("pretrained: [a.pt, {source: b.pt, intoo: x}]", ("plan",), "pretrained[1]: 'intoo' is no field; did you mean into?"),
    ("pretrained: [a.pt, {source: b.pt, match: x}]", ("plan",), "pretrained[1]: match='x'"),
    ("{pretrained: [a.pt, b.pt], into: x}", ("plan",), "into beside sources that have fields of their own"),
    ("{pretrained: {source: a.pt}, into: x}", ("plan",), "into beside sources that have fields of their own"),
    ("pretrained: [a.pt, b.pt]", ("plan", "c.pt"), "'c.pt' beside a list of sources"),
    ("pretrained: [a.pt, b.pt]", ("plan", "--into", "x"), "--into beside a list of sources"),
    ("{pretrained: a.pt, verfy: full}", ("plan",), "'verfy' is no option of plan"),
])  # fmt: skip
def test_yaml_that_cannot_be_meant(run, tmp_path, text, arguments, words):
    (tmp_path / "rules.yaml").write_text(text)
    model = ("--model", "torch.nn:Identity") if arguments[0] == "plan" else ()
    ran = run(*arguments, *model, "--config", "rules.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1


def test_every_keyword_of_every_callback_is_known():
    lightning, hf = pytest.importorskip("warmstart_lightning"), pytest.importorskip("warmstart_transformers")
    accelerate = pytest.importorskip("warmstart_accelerate")
    known: set[str] = set()
    for host in (lightning.WarmStart, hf.WarmStartCallback, accelerate.warm_start):
        known |= set(inspect.signature(host).parameters) - {"self", "accelerator", "model", "pretrained", "fields"}
    assert known == OF_HOSTS


def test_a_model_of_one_source_is_no_list(run, tmp_path):
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "rules.yaml").write_text("pretrained: [a.safetensors]")
    assert run("plan", "--model", "a.safetensors", "--config", "rules.yaml", "--json").data["coverage"] == 1
