"""The core on a CUDA model: values, casts, adapters, meta, checks, freezing, drift, and the memory that it takes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart import Conversion, MappingError, MapRows, Transpose, VerificationError

from .conftest import Classifier, Encoder


def on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    held = on_cpu(model)
    for name, tensor in state.items():
        assert held[prefix + name].dtype == tensor.dtype, name
        assert torch.equal(held[prefix + name], tensor), name


@pytest.mark.parametrize("verify", ["full", "sample", "off"])
def test_a_model_on_the_gpu_holds_the_files_values_in_its_own_objects(encoder_file, encoder_state, verify):
    model = Classifier().cuda()
    objects = dict(model.named_parameters())
    report = warmstart.load(model, encoder_file, into="encoder", verify=verify)
    assert_same(model.encoder, encoder_state)
    assert all(objects[name] is parameter and parameter.is_cuda for name, parameter in model.named_parameters())
    assert model.encoder.again.weight is model.encoder.words.weight
    report.check(model)


@pytest.mark.parametrize("form", ["pt", "npz", "memory"])
def test_other_sources(tmp_path, encoder_state, form):
    if form == "pt":
        torch.save({k: v.cuda() for k, v in encoder_state.items()}, tmp_path / "w.pt")
        source = tmp_path / "w.pt"
    elif form == "npz":
        np.savez(tmp_path / "w.npz", **{k: v.numpy() for k, v in encoder_state.items()})
        source = tmp_path / "w.npz"
    else:
        source = {k: v.cuda() for k, v in encoder_state.items()}
    model = Encoder().cuda()
    report = warmstart.load(model, source)
    assert_same(model, encoder_state)
    report.check(model)


@pytest.mark.parametrize(("there", "here"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_casts(tmp_path, encoder_state, there, here):
    there, here = getattr(torch, there), getattr(torch, here)
    state = {k: v.to(there) if v.is_floating_point() else v for k, v in encoder_state.items()}
    save_file(state, tmp_path / "w.safetensors")
    model = Encoder().cuda().to(here)
    report = warmstart.load(model, tmp_path / "w.safetensors")
    assert_same(model, {k: v.to(here) if v.is_floating_point() else v for k, v in state.items()})
    report.check(model)


def test_large_tensors_of_odd_sizes_and_views(tmp_path):
    torch.manual_seed(3)
    model = nn.ParameterDict(
        {
            "large": torch.empty(5_000_003),
            "matrix": torch.empty(2049, 1025),
            "turned": torch.empty(300, 200).t(),
            "scalar": torch.empty(()),
            "none": torch.empty(0, 4),
        }
    ).cuda()
    state = {name: torch.randn(p.shape) for name, p in model.items()}
    save_file(state, tmp_path / "w.safetensors")
    for verify in ("off", "full", "sample"):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
        warmstart.load(model, tmp_path / "w.safetensors", verify=verify).check(model)
        assert_same(model, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("at", [0, 3_000_000, -1])
def test_what_is_wrong_with_one_element_of_many_is_seen(tmp_path, dtype, at):
    """Of several pieces: a value that is not finite is noted, one that was written to is named."""
    good = torch.randn(6_000_001).to(dtype)
    odd = good.clone()
    odd[at] = float("nan")
    for name, tensor in (("good", good), ("odd", odd)):
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    model = nn.ParameterDict({"w": nn.Parameter(torch.empty_like(good), requires_grad=False)}).cuda()
    assert any("non-finite" in note for note in warmstart.load(model, tmp_path / "odd.safetensors").notes)
    report = warmstart.load(model, tmp_path / "good.safetensors")
    assert not any("non-finite" in note for note in report.notes)
    report.check(model)
    with torch.no_grad():
        model["w"].view(torch.uint8 if dtype.itemsize == 1 else dtype)[at] = 3
    with pytest.raises(VerificationError, match="w"):
        report.check(model)


def test_a_sample_sees_a_tensor_that_was_initialised_anew(tmp_path):
    save_file({"weight": torch.randn(3000, 2000)}, tmp_path / "w.safetensors")
    model = nn.Linear(2000, 3000, bias=False).cuda()
    report = warmstart.load(model, tmp_path / "w.safetensors", verify="sample")
    report.check(model)
    model.reset_parameters()
    with pytest.raises(VerificationError, match="weight"):
        report.check(model)


def test_what_the_device_was_asked_before_does_not_come_after(tmp_path):
    state = {"weight": torch.randn(2048, 2048)}
    save_file(state, tmp_path / "w.safetensors")
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            model = nn.Linear(2048, 2048, bias=False, device="cuda")
            torch.cuda._sleep(500_000_000)
            nn.init.zeros_(model.weight)
            warmstart.load(model, tmp_path / "w.safetensors", verify="off")
            doubled = model.weight * 2
        torch.cuda.synchronize()
        assert_same(model, state)
        assert torch.equal(doubled.detach().cpu(), state["weight"] * 2)


def test_values_that_no_number_equals_are_compared_by_their_bits(tmp_path):
    save_file({"weight": torch.tensor([[float("nan"), -0.0], [float("inf"), 1.0]])}, tmp_path / "w.safetensors")
    model = nn.Linear(2, 2, bias=False).cuda()
    report = warmstart.load(model, tmp_path / "w.safetensors")
    assert any("non-finite" in note for note in report.notes)
    with torch.no_grad():
        model.weight[0, 1] = 0.0
    with pytest.raises(VerificationError, match="weight"):
        report.check(model)


def test_a_model_on_meta_gets_its_memory_on_the_gpu(encoder_file, encoder_state):
    with torch.device("meta"):
        model = Classifier()
    with torch.device("cuda"):
        warmstart.load(model, encoder_file, into="encoder")
    assert all(t.device.type == "cuda" for t in model.encoder.state_dict().values())
    assert_same(model.encoder, encoder_state)


def test_a_model_of_two_devices(encoder_file, encoder_state):
    model = Encoder()
    model.up.cuda()
    model.norm.cuda()
    report = warmstart.load(model, encoder_file)
    assert model.up.weight.is_cuda
    assert not model.down.weight.is_cuda
    assert_same(model, encoder_state)
    report.check(model)


def test_adapters_conversions_and_fills(tmp_path, encoder_state):
    state = dict(encoder_state)
    state["up.weight"] = state["up.weight"].t().contiguous()
    del state["down.bias"]
    save_file(state, tmp_path / "w.safetensors")
    rows = MapRows(old=list("abcdefghijk"), new=list("kjihgfedcbaZ"), new_rows="mean")
    model = Encoder()
    model.words = nn.Embedding(12, 6)
    model.again.weight = model.words.weight
    model = model.cuda()
    report = warmstart.load(
        model,
        tmp_path / "w.safetensors",
        adapt={"words.weight": rows},
        convert=[Conversion("up.weight", "up.weight", [Transpose(0, 1)])],
        fill={"down.bias": 0.5},
    )
    held = on_cpu(model)
    assert torch.equal(held["words.weight"][:11], encoder_state["words.weight"].flip(0))
    torch.testing.assert_close(held["words.weight"][11], encoder_state["words.weight"].mean(0))
    assert torch.equal(held["up.weight"], encoder_state["up.weight"])
    assert torch.equal(held["down.bias"], torch.full((6,), 0.5))
    report.check(model)


def test_what_is_wrong_leaves_the_gpu_untouched(tmp_path, encoder_state):
    save_file(encoder_state | {"up.weight": torch.ones(12, 7)}, tmp_path / "w.safetensors")
    model = Encoder().cuda()
    before = on_cpu(model)
    with pytest.raises(MappingError, match=r"up\.weight"):
        warmstart.load(model, tmp_path / "w.safetensors")
    assert_same(model, before)


def test_an_overwritten_tensor_is_named(encoder_file):
    model = Encoder().cuda()
    report = warmstart.load(model, encoder_file)
    with torch.no_grad():
        model.down.weight[3, 4] += 1e-3
    with pytest.raises(VerificationError, match=r"down\.weight"):
        report.check(model)


def test_a_model_that_moves_after_the_load_is_still_the_loaded_one(encoder_file, encoder_state):
    model = Encoder()
    report = warmstart.load(model, encoder_file)
    model.cuda()
    report.check(model)
    assert_same(model, encoder_state)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_frozen_parts_keep_every_bit_through_training_under_autocast(encoder_file, encoder_state, dtype):
    model = Classifier().cuda()
    report = warmstart.load(model, encoder_file, into="encoder", freeze=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        model.train()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(
                model(torch.randint(0, 11, (8, 3), device="cuda")), torch.randint(0, 2, (8,), device="cuda")
            )
        loss.backward()
        optimizer.step()
    report.frozen.check()
    assert_same(model.encoder, encoder_state)
    with torch.no_grad():
        model.encoder.norm.running_mean += 1
    with pytest.raises(warmstart.FrozenChangedError, match="running_mean"):
        report.frozen.check()


def test_held_rows_stay_and_new_ones_train(tmp_path, encoder_file, encoder_state):
    rows = MapRows(old=list("abcdefghijk"), new=list("abcdefghijkXY"), freeze_old=True)
    model = Classifier()
    model.encoder.words = nn.Embedding(13, 6)
    model.encoder.again.weight = model.encoder.words.weight
    model = model.cuda()
    warmstart.load(model, encoder_file, into="encoder", adapt={"encoder.words.weight": rows})
    new = model.encoder.words.weight[11:].detach().cpu().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(torch.tensor([[0, 11, 12], [3, 11, 12]], device="cuda"))
        out.square().sum().backward()
        optimizer.step()
    held = model.encoder.words.weight.detach().cpu()
    assert torch.equal(held[:11], encoder_state["words.weight"])
    assert not torch.equal(held[11:], new)


def test_a_compiled_model(encoder_file, encoder_state):
    model = torch.compile(Encoder().cuda(), backend="eager")
    warmstart.load(model, encoder_file).check(model)
    assert_same(model._orig_mod, encoder_state)


def test_a_load_takes_no_more_memory_than_its_largest_tensor_and_a_little(tmp_path):
    state = {f"{i}.weight": torch.randn(2048, 2048) for i in range(8)}  # 16 MiB each
    save_file(state, tmp_path / "w.safetensors")
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, device="cuda") for _ in range(8)))
    for verify in ("full", "sample", "off"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        report = warmstart.load(model, tmp_path / "w.safetensors", verify=verify)
        report.check(model)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= (16 << 20) + (32 << 20), verify
        assert torch.cuda.memory_allocated() == before
    assert_same(model, state)


def test_loading_a_cpu_model_makes_no_cuda_context():
    code = (
        "import torch, warmstart\n"
        "model = torch.nn.Embedding(11, 6)\n"
        "warmstart.load(model, {'weight': torch.ones(11, 6)}).check(model)\n"
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
