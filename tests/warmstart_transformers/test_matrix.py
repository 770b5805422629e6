"""{plain, sharded, PEFT} x {train, resume, train twice, model_init, evaluate only}, on values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import bert, bert_config, equal, texts, weights
from transformers import BertModel, TrainerCallback

from warmstart_transformers import WarmStartCallback

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Start(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.values = weights(model)


class Kind:
    """A kind of model and of checkpoint."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        torch.manual_seed(7)
        base = BertModel(bert_config())
        base.save_pretrained(folder / "source", max_shard_size="8KB" if name == "sharded" else "1GB")
        assert (folder / "source" / "model.safetensors.index.json").exists() == (name == "sharded")
        self.source = folder / "source"
        self.pretrained = weights(base)

    def model(self, seed: int = 0):
        model = bert(seed)
        if self.name != "peft":
            return model
        config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
        return get_peft_model(model, config)

    def base(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base model's entries of a model's, under the base's own names."""
        own = {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in values.items()}
        return {n.removeprefix("bert."): v for n, v in own.items() if n.startswith("bert.") and "lora" not in n}

    def reshape(self, checkpoint: Path) -> None:
        """A checkpoint as a larger model's would be: in several files."""
        if self.name == "sharded":
            tree = load_file(checkpoint / "model.safetensors")
            model = bert()
            model.load_state_dict(tree)
            (checkpoint / "model.safetensors").unlink()
            model.save_pretrained(checkpoint, max_shard_size="8KB")
            assert (checkpoint / "model.safetensors.index.json").exists()


@pytest.fixture(params=["plain", "sharded", "peft"])
def kind(request, tmp_path) -> Kind:
    return Kind(request.param, tmp_path)


def test_train(make_trainer, kind):
    model, start = kind.model(), Start()
    callback = WarmStartCallback(kind.source)
    make_trainer(model, callback, start).train()
    assert equal(kind.base(start.values), kind.pretrained)
    assert callback.report.status == "applied"
    assert equal(kind.base(weights(model)), kind.pretrained) == (kind.name == "peft")  # whose base is frozen
    assert not equal(weights(model), start.values)


@pytest.mark.parametrize("attached", [False, True])
def test_resume(make_trainer, kind, tmp_path, attached):
    """Field note 3: the run's own weights win, whatever is pretrained."""
    make_trainer(kind.model(), WarmStartCallback(kind.source), num_train_epochs=2, save_strategy="epoch").train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    kind.reshape(checkpoint)
    saved = weights_of(checkpoint)
    model, start = kind.model(seed=3), Start()
    callback = WarmStartCallback(kind.source)
    trainer = make_trainer(model, callback, start, num_train_epochs=2)
    if attached:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 8
    if kind.name == "peft":
        own = {n.replace(".default", "").replace("modules_to_save.", ""): v for n, v in start.values.items()}
        assert equal(kind.base(start.values), kind.pretrained)
        assert callback.report.status == "applied"  # the base is what was loaded; the adapter is the run's
    else:
        own = start.values
        assert callback.report.status == "superseded-by-resume"
    assert saved.keys() <= own.keys()
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    assert len(saved) > 4


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in checkpoint.glob("*model*.safetensors") for name, value in load_file(file).items()}


def test_resume_the_newest(make_trainer, kind):
    make_trainer(kind.model(), WarmStartCallback(kind.source), num_train_epochs=2, save_strategy="epoch").train()
    trainer = make_trainer(kind.model(3), WarmStartCallback(kind.source), num_train_epochs=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


def test_train_twice(make_trainer, kind):
    model, start = kind.model(), Start()
    trainer = make_trainer(model, WarmStartCallback(kind.source), start)
    trainer.train()
    first = weights(model)
    trainer.train()
    assert equal(start.values, first)


def test_model_init(make_trainer, kind):
    start, callback = Start(), WarmStartCallback(kind.source)
    trainer = make_trainer(
        None, callback, start, model_init=callback.wrap_model_init(lambda: kind.model()), data=texts()
    )
    for _ in range(2):
        trainer.train()
        assert equal(kind.base(start.values), kind.pretrained)
        assert callback.report.status == "applied"


def test_evaluate_only(make_trainer, kind):
    model = kind.model()
    trainer = make_trainer(model, WarmStartCallback(kind.source))
    trainer.evaluate()
    trainer.predict(texts())
    assert equal(kind.base(weights(model)), kind.pretrained)
