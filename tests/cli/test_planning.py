"""`warmstart plan`: the same plan as `warmstart.plan` and the callback, and lock files that all of them take."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart.cli.options import as_options

RULES = {
    "source": "bert.pt",
    "checkpoint_key": "model",
    "into": "encoder",
    "rename": [{"q": "query"}, {"k": "key"}],
    "convert": [{"sources": ["{i}.v.a", "{i}.v.b"], "targets": "{i}.value.weight", "ops": [{"concat": {"dim": 0}}]}],
    "adapt": {"encoder.position": {"resize_pos_embed": {"prefix_tokens": 0, "mode": "linear"}}},
    "fill": {"encoder.scale": 0.5},
    "allow_unexpected": ["pooler"],
    "min_coverage": 0.2,
    "freeze": "encoder.0",
}

MODULE = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))

class Encoder(nn.ModuleList):
    def __init__(self):
        super().__init__(Layer() for _ in range(2))
        self.position = nn.Parameter(torch.zeros(1, 16, 4))
        self.scale = nn.Parameter(torch.ones(1))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(4, 2)

class NeedsMore(nn.Module):
    def __init__(self, width):
        super().__init__()

class Raises(nn.Module):
    def __init__(self):
        raise RuntimeError("no \\x1b[31mGPU here")

def make():
    return Net()

net = Net()
number = 3
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A module with models, a checkpoint with two trees, and the rules as YAML."""
    tree = {f"{i}.{part}.weight": torch.randn(4, 4) for i in range(2) for part in "qk"}
    tree |= {f"{i}.v.{half}": torch.randn(2, 4) for i in range(2) for half in "ab"}
    tree |= {"position": torch.randn(1, 4, 4), "pooler.weight": torch.randn(4, 4)}
    torch.save({"model": tree, "ema": dict(tree)}, tmp_path / "bert.pt")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "planned_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def net() -> nn.Module:
    from importlib import import_module

    return import_module("planned_models").Net()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")  # Lightning's
def test_the_same_yaml_gives_the_same_plan_here_in_python_and_in_the_callback(run, written):
    lightning = pytest.importorskip("lightning.pytorch")
    from warmstart_lightning import WarmStart

    ran = run("plan", "--model", "planned_models:Net", "--config", "rules.yaml", "--lock", "cli.lock.yaml")
    assert ran.code == 0, ran.err
    rules = yaml.safe_load((written / "rules.yaml").read_text())
    plan = warmstart.plan(net(), warmstart.Pretrained(**rules))
    assert ran.out == f"{plan}\ncli.lock.yaml: written\n"
    assert (written / "cli.lock.yaml").read_text() == plan.to_yaml()
    data = run("plan", "--model", "planned_models:Net", "--config", "rules.yaml", "--json").data
    assert data == {"fits": True, "digest": plan.digest(), "lock": None} | json.loads(json.dumps(plan.to_dict()))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = (child for _, child in net().named_children())

        def training_step(self, batch, index):
            return self.head(self.encoder.scale * batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)

    callback = WarmStart(warmstart.Pretrained(**rules), lock="cli.lock.yaml", log=False)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 4)), num_workers=0)
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, default_root_dir=written,
    ).fit(Module(), data)  # fmt: skip
    assert callback.report is not None
    assert (
        callback.report.plan.to_yaml().splitlines()[3:] == plan.to_yaml().splitlines()[3:]
    )  # but for the class's name

    # and the other way round
    (written / "python.lock.yaml").write_text(plan.to_yaml())
    ran = run("plan", "--model", "planned_models:make", "--config", "rules.yaml", "--lock", "python.lock.yaml")
    assert ran.out.endswith("python.lock.yaml: unchanged\n")
    warmstart.load(net(), warmstart.Pretrained(**rules), lock="cli.lock.yaml")


def test_options_say_the_same_as_yaml(run, written):
    words = []
    for name, value in RULES.items():
        if name != "source":
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    typed = run("plan", "bert.pt", "--model", "planned_models:Net", *words, "--json")
    filed = run("plan", "--config", "rules.yaml", "--model", "planned_models:Net", "--json")
    assert typed.code == filed.code == 0, typed.err
    assert typed.data == filed.data


def test_what_is_typed_stands_over_the_file_wherever_it_is_typed(run, written):
    torch.save({"elsewhere.weight": torch.ones(2, 2)}, written / "other.pt")
    ran = run("plan", "other.pt", "--into", "", "--model", "planned_models:Net", "--config", "rules.yaml", "--json")
    parts = ran.data["parts"] if "parts" in (ran.data if ran.out else {}) else None
    assert ran.code == 3  # the file's checkpoint_key stays
    assert parts is None
    assert "there is no tree 'model'" in ran.data["error"]["message"]
    ran = run(
        "plan", "other.pt", "--checkpoint_key", "null", "--model", "planned_models:Net", "--config=rules.yaml", "--json"
    )
    assert ran.data["parts"][0]["source"] == "other.pt"
    assert ran.data["parts"][0]["rules"]["into"] == "encoder"


def test_a_plan_with_errors_is_shown_and_no_lock_is_written(run, written):
    ran = run("plan", "bert.pt", "--checkpoint_key", "ema", "--model", "planned_models:Net", "--lock", "l.yaml")
    assert ran.code == 1
    plan = warmstart.plan(net(), "bert.pt", checkpoint_key="ema")
    assert ran.out.startswith(as_options(plan.explain()))
    assert "l.yaml: not written" in ran.out
    assert not (written / "l.yaml").exists()
    assert (
        run("plan", "bert.pt", "--checkpoint_key", "ema", "--model", "planned_models:Net", "--json").data["fits"]
        is False
    )


def test_a_lock_that_decides_otherwise_is_kept_unless_forced(run, written):
    arguments = ("plan", "--model", "planned_models:Net", "--config", "rules.yaml", "--lock", "l.yaml")
    assert run(*arguments).code == 0
    before = (written / "l.yaml").read_text()
    ran = run(*arguments, "--freeze", "encoder.1")
    assert ran.code == 1
    assert "l.yaml: not replaced" in ran.out
    assert "6 decisions differ from l.yaml" in ran.out
    assert (written / "l.yaml").read_text() == before
    assert run(*arguments, "--freeze", "encoder.1", "--force").code == 0
    assert (written / "l.yaml").read_text() != before
    (written / "l.yaml").write_text("something: else\n")
    assert run(*arguments).code == 1
    assert (written / "l.yaml").read_text() == "something: else\n"


def test_another_checkpoint_as_the_model(run, tmp_path):
    save_file(
        {"a.training": torch.ones(2, 3), "a.b.steps": torch.ones(1, dtype=torch.int64)}, tmp_path / "model.safetensors"
    )
    save_file(
        {"x.a.training": torch.ones(2, 3), "x.a.b.steps": torch.ones(1, dtype=torch.int64)}, tmp_path / "s.safetensors"
    )
    ran = run("plan", "s.safetensors", "--model", "model.safetensors", "--json")
    assert ran.code == 0
    assert ran.data["model"] == "model.safetensors"
    assert {a["target"]: a["sources"] for a in ran.data["assignments"]} == {
        "a.training": ["x.a.training"],
        "a.b.steps": ["x.a.b.steps"],
    }


def test_a_tree_of_another_checkpoint_as_the_model(run, written):
    ran = run("plan", "bert.pt", "--model", "bert.pt", "--checkpoint_key", "model", "--model_checkpoint_key", "ema")
    assert ran.code == 0
    assert run("plan", "bert.pt", "--model", "bert.pt", "--checkpoint_key", "model").code == 3


def test_a_checkpoint_whose_names_no_model_can_have(run, tmp_path):
    torch.save({"a..b": torch.ones(2, 2)}, tmp_path / "odd.pt")
    ran = run("plan", "odd.pt", "--model", "odd.pt")
    assert ran.code == 3
    assert "'a..b' has an empty segment" in ran.err


def test_a_transformers_folder_is_built_from_its_config_without_memory(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "tiny")
    model = transformers.BertForMaskedLM(config)
    torch.save(dict(model.state_dict()), tmp_path / "tiny.pt")
    ran = run("plan", "tiny.pt", "--model", "tiny", "--json")
    assert ran.code == 0, ran.err
    assert ran.data["digest"] == warmstart.plan(model, tmp_path / "tiny.pt").digest()
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "nothing-known"}')
    ran = run("plan", "tiny.pt", "--model", "tiny")
    assert ran.code == 2
    assert "--model tiny: transformers does not build it" in ran.err


@pytest.mark.parametrize(("model", "words"), [
    ("planned_models:Nat", "planned_models has no Nat; did you mean planned_models:Net?"),
    ("planned_modles:Net", "there is no module planned_modles"),
    ("planned_models:NeedsMore", "cannot be built without arguments (missing a required argument: 'width')"),
    ("planned_models:Raises", r"building it raised RuntimeError: no \x1b[31mGPU here"),
    ("planned_models:number", "gives int, not a torch.nn.Module"),
    ("planned_models", "planned_models is a module; name what it has, planned_models:Class"),
    ("broken_models:Net", "importing broken_models raised ZeroDivisionError"),
    ("lacking_models:Net", "importing lacking_models needs not_installed_at_all, which is not installed"),
])  # fmt: skip
def test_a_model_that_cannot_be_had_is_a_usage_error(run, written, model, words):
    (written / "broken_models.py").write_text("1 / 0")
    (written / "lacking_models.py").write_text("import not_installed_at_all")
    ran = run("plan", "bert.pt", "--model", model)
    assert ran.code == 2
    assert ran.out == ""
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_module_that_is_made_already_is_a_model_too(run, written):
    assert run("plan", "--config", "rules.yaml", "--model", "planned_models:net").code == 0
