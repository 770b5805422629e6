"""accelerate's loop on a GPU: precisions, its FSDP2 over NCCL, and models dispatched over devices."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import nn

from warmstart import VerificationError
from warmstart.shards import gathered
from warmstart_accelerate import warm_start

from .conftest import Classifier

pytestmark = [pytest.mark.usefixtures("ended_groups"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _fresh():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randint(0, 11, (8, 3), device=accelerator.device)
    optimizer.zero_grad()
    with accelerator.autocast():
        loss = nn.functional.cross_entropy(model(x).float(), x.sum(1) % 2)
    accelerator.backward(loss)
    optimizer.step()


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: gathered(t).detach().cpu().clone() for n, t in model.encoder.state_dict().items()}


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_precisions(encoder_file, encoder_state, precision):
    accelerator, model = Accelerator(mixed_precision=precision), Classifier()
    report = warm_start(accelerator, model, encoder_file, into="encoder", freeze="encoder.words")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(torch.equal(held(model)[n], v) for n, v in encoder_state.items())
    assert next(model.parameters()).is_cuda
    for _ in range(3):
        step(accelerator, model, optimizer)
    assert torch.equal(held(model)["words.weight"], encoder_state["words.weight"])
    assert not torch.equal(held(model)["up.weight"], encoder_state["up.weight"])
    report.frozen.check()
    assert report.status == "applied"


def test_an_overwritten_tensor_is_found_by_the_first_batch(encoder_file):
    accelerator, model = Accelerator(), Classifier()
    warm_start(accelerator, model, encoder_file, into="encoder")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model.encoder.up.weight[0, 0] += 1
    with pytest.raises(VerificationError, match=r"encoder\.up\.weight"):
        step(accelerator, model, optimizer)


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp2_over_nccl(monkeypatch, encoder_file, encoder_state, efficient, precision):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "29511", "ACCELERATE_USE_FSDP": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda:0"))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=efficient
    )
    accelerator, model = Accelerator(fsdp_plugin=plugin, mixed_precision=precision), Classifier()
    model.encoder.again = nn.Identity()
    if efficient:
        model.encoder.norm = nn.Identity()  # what accelerate sends from rank 0 must be DTensors, which buffers are not
        encoder_state = {n: v for n, v in encoder_state.items() if not n.startswith("norm")}
        save_file(encoder_state, encoder_file)
    report = warm_start(accelerator, model, encoder_file, into="encoder")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    kinds = {type(p).__name__ for p in model.parameters()}
    assert all(torch.equal(held(model)[n], v) for n, v in encoder_state.items())
    step(accelerator, model, optimizer)
    assert not torch.equal(held(model)["up.weight"], encoder_state["up.weight"])
    assert report.status == "applied"
    assert kinds == {"DTensor"}


def test_a_model_that_accelerate_spread_over_devices(encoder_file, encoder_state):
    model = Classifier()
    places = {
        "encoder.words": 0,
        "encoder.again": 0,
        "encoder.up": "cpu",
        "encoder.norm": 0,
        "encoder.down": 0,
        "head": 0,
    }
    model = dispatch_model(model, places, main_device=0)
    accelerator = Accelerator()
    warm_start(accelerator, model, encoder_file, into="encoder")
    x = torch.randint(0, 11, (8, 3), device="cuda")
    plain = Classifier().cuda().eval()
    plain.load_state_dict(model.state_dict() | {f"encoder.{k}": v for k, v in encoder_state.items()}, strict=False)
    with torch.no_grad():
        plain.head.load_state_dict({k: v.cuda() for k, v in model.head.state_dict().items()})
        torch.testing.assert_close(model.eval()(x), plain(x))
