"""Field note 22: reentrant gradient checkpointing behind what is frozen gives no gradients; who is told of it, and who not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from warmstart import Pretrained, TimingError
from warmstart.lifecycle import Lifecycle, Settings

# What torch says of it: no module is named, and the rest trains.
pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # the Trainer asks by an old name
)


class Net(nn.Module):
    """Four layers, each run in a checkpoint of its own."""

    def __init__(self, *, reentrant: bool = True, whole: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        self.head, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)
        self.reentrant, self.whole = reentrant, whole

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.layers,) if self.whole else self.layers:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return self.head(x)


def started(model: nn.Module, freeze: object = "layers.0", **options: object) -> Lifecycle:
    """A run of `model` from weights in memory, about to train."""
    source = {name: torch.full_like(value, 0.1) for name, value in model.state_dict().items()}
    life = Lifecycle(Settings([Pretrained(source, freeze=freeze)], **options))
    life.apply(model)
    life.start(model, resumed=False)
    return life


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.mark.parametrize("whole", [False, True], ids=["each layer", "all layers in one"])
def test_what_would_get_no_gradient_is_named_before_the_first_step(whole):
    model = Net(whole=whole)
    started(model)
    with pytest.raises(TimingError, match=r"^layers\.1\.0 runs in reentrant(.|\n)*use_reentrant=False"):
        model(X)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "freeze"),
    [
        ({"reentrant": False}, "layers.0"),
        ({}, "layers"),  # in the checkpoints is nothing that trains
        ({}, "head"),  # torch's own matter: nothing in front of them is frozen; see below
    ],
    ids=["not reentrant", "frozen as a whole", "input that needs a gradient"],
)
def test_who_trains_is_let_train_and_nothing_is_left_behind(options, freeze):
    model = Net(**options)
    del model.unused
    started(model, freeze)
    model(X.requires_grad_(freeze == "head")).sum().backward()
    X.requires_grad_(False)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if not name.startswith(freeze)
    }
    assert hooks(model) == 0


def test_what_no_forward_uses_is_no_alarm_and_is_let_go_at_the_end_of_training():
    model = Net(reentrant=False)
    life = started(model)
    for _ in range(2):
        model(X).sum().backward()
    assert model.unused.weight.grad is None
    assert hooks(model) == 2  # of the model and of the layer that waits
    life.guard(full=True)
    assert hooks(model) == 0


def test_a_teacher_s_forward_without_gradients_is_no_alarm_and_the_student_s_is():
    """The same model, in training mode, as reinforcement learning runs it for its old probabilities."""
    model = Net()
    started(model)
    with torch.no_grad():
        model(X)
    with pytest.raises(TimingError, match=r"layers\.1\.0"):
        model(X)


def test_validation_is_no_alarm_and_training_after_it_is():
    model = Net()
    started(model)
    with torch.no_grad():
        model.eval()(X)
    with pytest.raises(TimingError, match=r"layers\.1\.0"):
        model.train()(X)


def test_a_checkpoint_within_another_that_has_gradients_is_no_alarm():
    model = Net()
    del model.unused
    started(model)
    model.layers.requires_grad_(True)

    x = X.clone().requires_grad_(True)
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert model.layers[1][0].weight.grad is not None


def test_a_release_behind_what_stays_frozen_is_looked_at_anew():
    model = Net()
    life = started(model, "layers", unfreeze={1: "layers.2"})
    model(X).sum().backward()
    life.advance(1)
    with pytest.raises(TimingError, match=r"^layers\.2\.0 runs"):
        model(X)


def test_a_run_that_freezes_nothing_is_left_to_torch():
    model = Net()
    started(model, False)
    assert hooks(model) == 0


def test_copies_and_compiled_models_train_as_the_model_does():
    model = Net(reentrant=False)
    started(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model, backend="eager")):
        twin(X).sum().backward()
        assert next(p for name, p in twin.named_parameters() if name.endswith("layers.1.0.weight")).grad is not None


class Behind(nn.Module):
    """Something between a layer that is frozen and a head."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.head = nn.Linear(4, 4), between, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.first(x)))


class InTwoParts(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self, 2, x, use_reentrant=True)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True)


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (lambda: checkpoint_wrapper(nn.Linear(4, 4), CheckpointImpl.REENTRANT), "between._checkpoint_wrapped_module"),
        (
            lambda: checkpoint_wrapper(attention(), CheckpointImpl.REENTRANT),
            "between._checkpoint_wrapped_module.self_attn",
        ),
        (lambda: InTwoParts(nn.Linear(4, 4), nn.Linear(4, 4)), r"between\.0"),
    ],
    ids=["torch's wrapper", "an attention in it", "checkpoint_sequential"],
)
def test_other_ways_to_checkpoint_reentrantly_are_named_too(between, named):
    model = Behind(between())
    started(model, "first")
    with pytest.raises(TimingError, match=f"^{named} runs in reentrant"):
        model(X)


@pytest.mark.parametrize(
    "between",
    [
        lambda: checkpoint_wrapper(nn.Linear(4, 4), CheckpointImpl.NO_REENTRANT),
        lambda: nn.Sequential(nn.Sequential(shared := nn.Linear(4, 4)), nn.Sequential(shared)),
        attention,
        lambda: nn.DataParallel(nn.Linear(4, 4)),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
    ids=["torch's wrapper", "one module under two names", "an attention", "DataParallel", "a parametrization"],
)
def test_what_trains_is_seen_to_train_and_let_go(between):
    model = Behind(between())
    started(model, "first")
    model(X).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {"first.weight", "first.bias"}
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    "traced",
    [
        lambda model: torch.jit.trace(model, X),
        fx.symbolic_trace,
        lambda model: torch.export.export(model, (X,)).module(),
        lambda model: torch.compile(model, backend="eager", fullgraph=True),
    ],
    ids=["jit.trace", "fx", "export", "compile"],
)
def test_what_is_traced_while_it_is_watched_computes_the_same(traced):
    model = Behind(nn.Linear(4, 4))
    started(model, "first")
    assert torch.equal(traced(model)(X), copy.deepcopy(model)(X))
