"""Dispatched models: what lies on the CPU or on disk is written to where the hook reads it, never into the placeholder."""

from __future__ import annotations

import json

import loops
import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file

from warmstart import CheckpointError, MappingError, VerificationError
from warmstart_accelerate import onloaded, warm_start

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", "disk", "mixed", "disk with buffers", "bfloat16 on disk"])
def offloaded(request, tmp_path):
    model = loops.Net().eval()
    folder = tmp_path / "offload"
    match request.param:
        case "cpu":
            cpu_offload(model, execution_device=CPU)
        case "disk":
            disk_offload(model, folder, execution_device=CPU)
        case "mixed":
            device_map = {
                "encoder.0": "cpu",
                "encoder.1": "disk",
                "encoder.2": "cpu",
                "encoder.3": "disk",
                "head": "cpu",
            }
            dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)
        case "disk with buffers":
            disk_offload(model, folder, execution_device=CPU, offload_buffers=True)
        case "bfloat16 on disk":
            disk_offload(model.to(torch.bfloat16), folder, execution_device=CPU)
    return model


def loaded_by_hand(source, dtype):
    torch.manual_seed(0)
    model = loops.Net().eval()
    model.encoder.load_state_dict(torch.load(source))
    return model.to(dtype)


def trains_frozen_as_a_plain_one(source, model):
    seen = loops.train(source, model=model, freeze=True)
    assert seen.report.status == "applied"
    seen.accelerator.end_training()
    loops.fresh()
    theirs = loops.train(source, freeze=True)
    assert seen.losses == theirs.losses


def test_the_next_forward_computes_with_what_was_loaded(offloaded, source):
    with onloaded(offloaded):
        dtype = offloaded.encoder[0].weight.dtype
        head = {k: v.detach().clone() for k, v in offloaded.head.state_dict().items()}
    placeholders = {n for n, p in offloaded.named_parameters() if p.is_meta}
    assert placeholders
    report = warm_start(Accelerator(cpu=True), offloaded, source, into="encoder")
    assert {n for n, p in offloaded.named_parameters() if p.is_meta} == placeholders
    expected = loaded_by_hand(source, dtype)
    expected.head.load_state_dict(head)
    x = torch.randn(16, 4, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):  # what a forward puts aside has to be what was loaded as well
            assert torch.equal(offloaded(x), expected(x))
    with onloaded(offloaded):
        report.check(offloaded)


def test_what_is_overwritten_in_the_map_is_found(offloaded, source):
    report = warm_start(Accelerator(cpu=True), offloaded, source, into="encoder")
    with onloaded(offloaded), torch.no_grad():
        offloaded.encoder[3].weight[0] += 1
    with onloaded(offloaded), pytest.raises(VerificationError, match=r"encoder\.3\.weight"):
        report.check(offloaded)


def test_a_frozen_encoder_that_is_offloaded_under_a_head_that_trains(source, tmp_path):
    torch.manual_seed(0)
    model = loops.Net()
    device_map = {"encoder.0": "disk", "encoder.1": "cpu", "encoder.2": "cpu", "encoder.3": "disk", "head": "cpu"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / "offload")
    trains_frozen_as_a_plain_one(source, model)


def test_what_moved_on_disk_is_found_at_the_end(source, tmp_path):
    model = loops.Net()
    device_map = {"encoder": "disk", "head": "cpu"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / "offload")
    seen = loops.train(source, model=model, freeze=True)
    with onloaded(model), torch.no_grad():
        model.encoder[0].bias += 1
    with pytest.raises(ValueError, match=r"encoder\.0\.bias"):
        seen.accelerator.end_training()


def test_on_an_error_nothing_is_written_and_the_placeholders_are_back(offloaded, source):
    with onloaded(offloaded):
        before = loops.weights(offloaded)
    with pytest.raises(MappingError, match="nothing matched"):
        warm_start(Accelerator(cpu=True), offloaded, source, into="head")
    assert any(p.is_meta for p in offloaded.parameters())
    with onloaded(offloaded):
        assert loops.equal(loops.weights(offloaded), before)


def test_a_safetensors_file_that_a_hook_reads_from_stays_as_it_is(source, tmp_path):
    model = loops.Net().eval()
    path, folder = tmp_path / "own.safetensors", tmp_path / "offload"
    save_file(model.encoder[0].state_dict(), path)
    content = path.read_bytes()
    folder.mkdir()
    index = {
        f"encoder.0.{name}": {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"}
        for name in ("weight", "bias")
    }
    (folder / "index.json").write_text(json.dumps(index))

    def attach(loader):
        weights = PrefixedDataset(loader, "encoder.0.")
        hook = AlignDevicesHook(execution_device=CPU, offload=True, weights_map=weights)
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(model.encoder[0], hook)

    attach(OffloadedWeightsLoader(index=dict(index)))
    with pytest.raises(CheckpointError, match="offload_folder="):
        warm_start(Accelerator(cpu=True), model, source, into="encoder")
    attach(OffloadedWeightsLoader(save_folder=folder))
    warm_start(Accelerator(cpu=True), model, source, into="encoder")
    expected = loaded_by_hand(source, torch.float32).encoder
    x = torch.randn(3, 4)
    assert torch.equal(model.encoder(x), expected(x))
    assert path.read_bytes() == content


def test_field_note_23_a_model_of_empty_weights_gets_memory(source):
    with init_empty_weights():
        model = loops.Net()
    report = warm_start(Accelerator(cpu=True), model, source, into="encoder", freeze=True)
    assert not any(t.is_meta for t in model.encoder.state_dict().values())
    assert loops.equal(loops.weights(model.encoder), torch.load(source))
    assert report.status == "applied"


def test_empty_weights_a_device_map_and_a_disk_under_a_head_that_trains(source, tmp_path):
    """As models larger than memory are made: no process ever has it whole."""
    torch.manual_seed(0)
    whole = loops.Net()
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    with init_empty_weights():
        model = loops.Net()
    device_map = {"encoder.0": "disk", "encoder.1": "cpu", "encoder.2": "cpu", "encoder.3": "disk", "head": "cpu"}
    model = load_checkpoint_and_dispatch(
        model, str(tmp_path / "whole.pt"), device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert {n for n, p in model.named_parameters() if p.is_meta} == {
        f"encoder.{i}.{leaf}" for i in (0, 3) for leaf in ("weight", "bias")
    }
    trains_frozen_as_a_plain_one(source, model)
    with onloaded(model):
        assert loops.equal(loops.weights(model.encoder), torch.load(source))
