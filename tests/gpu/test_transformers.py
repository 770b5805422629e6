"""transformers' Trainer on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from warmstart import VerificationError
from warmstart_transformers import WarmStartCallback

sys.path.insert(0, str(Path(__file__).parent.parent / "warmstart_transformers"))
from tiny import bert, texts

pytestmark = [pytest.mark.usefixtures("ended_groups"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def source(tmp_path):
    bert(7).bert.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert all(p.is_cuda for p in model.parameters())
        self.start = held(model)


def held(model) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().clone() for name, t in model.bert.state_dict().items()}


def arguments(tmp_path, **options) -> TrainingArguments:
    return TrainingArguments(
        str(tmp_path / "run"), report_to=[], disable_tqdm=True, per_device_train_batch_size=4, learning_rate=0.01,
        weight_decay=0.1, logging_strategy="no", **{"num_train_epochs": 2, "save_strategy": "no", **options},
    )  # fmt: skip


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}, {"bf16": True, "torch_compile": True}])
def test_precisions(tmp_path, source, precision):
    callback, look = WarmStartCallback(source, into="bert", freeze="bert.embeddings"), Look()
    model = bert()
    trainer = Trainer(model, arguments(tmp_path, **precision), train_dataset=texts(), callbacks=[callback, look])
    trainer.train()
    expected = bert(7).bert.state_dict()
    assert all(torch.equal(look.start[name], value) for name, value in expected.items())
    end = held(model)
    kept = {n for n, v in expected.items() if torch.equal(end[n], v)}
    assert {n for n in expected if n.startswith("embeddings")} <= kept
    assert "encoder.layer.0.attention.self.query.weight" not in kept
    assert callback.report.status == "applied"


def test_an_overwritten_tensor_stops_the_run(tmp_path, source):
    class Overwrite(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.bert.encoder.layer[0].output.dense.weight.zero_()

    callback = WarmStartCallback(source, into="bert")
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=texts(), callbacks=[callback, Overwrite()])
    with pytest.raises(VerificationError, match=r"bert\.encoder\.layer\.0\.output\.dense\.weight"):
        trainer.train()


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, source):
    ends = []
    for resume in (None, tmp_path / "run" / "checkpoint-4"):
        callback = WarmStartCallback(source, into="bert", freeze="bert.embeddings")
        model = bert()
        trainer = Trainer(
            model, arguments(tmp_path, save_strategy="epoch", fp16=True), train_dataset=texts(), callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        ends.append(held(model))
        assert callback.report.status == ("superseded-by-resume" if resume else "applied")
    assert all(torch.equal(ends[1][n], v) for n, v in ends[0].items())
