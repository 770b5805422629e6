"""What the table of cells does not show: stories that one engine's processes play in the same launch, each with its asserts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cells
import pytest
import torch
from cells import CASES
from torch import nn

import warmstart
from warmstart import CheckpointError, MappingError, MapRows, TimingError, VerificationError
from warmstart.loading import materialising
from warmstart.shards import local_of
from warmstart.tensors import same_bits

TOKENS = torch.arange(6).reshape(2, 3)


def each_rank_reads_its_own_bytes(folder: Path) -> None:
    """field_note_25."""
    case = cells.Case({"width": 64, "hidden": 256, "words": 500})
    path = cells.path_of(folder, "wide", "safetensors")
    size = sum(t.numel() * t.element_size() for t in cells.trained(case).values())
    off = warmstart.load(cells.fsdp2(case), path, verify="off")
    assert 0.45 * size <= off.bytes_read <= 0.55 * size
    full = warmstart.load(cells.fsdp2_meta(case), path)
    assert full.bytes_read <= 0.55 * size  # compared while it is written


def between_forward_and_backward(folder: Path) -> None:
    """FSDP2 leaves the root's parameters whole then: what is loaded has to reach the next forward all the same."""
    path = cells.path_of(folder, "frozen", "safetensors")
    model, plain = cells.fsdp2(CASES["frozen"]), cells.fresh(CASES["frozen"])
    before = model.embed.weight
    model(TOKENS)
    assert model.embed.weight is not before  # the whole one
    report = warmstart.load(model, path, **CASES["frozen"].fields)
    warmstart.load(plain, path)
    assert torch.allclose(model(TOKENS), plain(TOKENS))
    assert model.embed.weight is not before
    report.check(model)
    report.frozen.check()
    with torch.no_grad():
        local_of(before).add_(1)
    with pytest.raises(warmstart.FrozenChangedError, match=r"embed\.weight"):
        report.frozen.check()


def a_source_in_memory_is_remembered(folder: Path) -> None:
    tensors = cells.trained(CASES["uneven"])
    model = cells.fsdp2(CASES["uneven"])
    report = warmstart.load(model, tensors)
    for tensor in tensors.values():
        tensor.zero_()
    report.check(model)
    local = local_of(model.blocks[0].q.weight)
    with torch.no_grad():
        local.add_(1)
    with pytest.raises(VerificationError, match=r"blocks\.0\.q\.weight"):
        report.check(model)


def rows_are_kept_and_held(folder: Path) -> None:
    """More words than the file: old rows come from it and stay, new ones keep their own values and train."""
    sizes = CASES["uneven"].sizes
    wider = cells.Case({**sizes, "words": 14})
    rows = MapRows(old=[f"w{i}" for i in range(11)], new=[f"w{i}" for i in range(14)], new_rows="keep", freeze_old=True)
    model, plain = cells.fsdp2(wider), cells.fresh(wider)
    path = cells.path_of(folder, "uneven", "safetensors")
    for net in (model, plain):
        warmstart.load(net, path, adapt={"embed": rows, "head": rows})
    expected = cells.whole(plain)
    assert all(same_bits(value, expected[name]) for name, value in cells.whole(model).items())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(torch.arange(14).reshape(2, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = cells.whole(model)
    for name in ("embed.weight", "head.weight"):
        assert same_bits(after[name][:11], expected[name][:11])
        assert not (after[name][11:] == expected[name][11:]).any()


def an_adapter_without_effect_is_known_to_all_by_what_one_holds(folder: Path) -> None:
    """field_note_31: of its last factor each rank has a part, which may be zero alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q"])
    tensors = peft.get_peft_model_state_dict(peft.get_peft_model(cells.fresh(CASES["full"]), config))
    for touched in (False, True):
        if touched:
            tensors["base_model.model.blocks.1.q.lora_B.weight"][-1] = 1  # the last rank's
        model = peft.get_peft_model(cells.fresh(CASES["full"]), config)
        report = warmstart.load(cells.fully_sharded(model, CASES["full"]), tensors)
        assert any("adapter 'default' has no effect" in note for note in report.notes) is not touched


def there_and_back_through_dcp(folder: Path) -> None:
    """A DCP folder under another codebase's names is loaded, trained on, and written in that layout again."""
    import torch.distributed.checkpoint as dcp

    case = CASES["renamed"]
    model, back = cells.fsdp2(case), cells.fresh(case)
    plan = warmstart.load(model, cells.path_of(folder, "renamed", "dcp"), **case.fields).plan
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    reverse = plan.reverse()
    dcp.save({key: reverse.read(key) for key in reverse.keys()}, checkpoint_id=folder / "again")
    warmstart.load(back, folder / "again", **case.fields)
    expected = cells.whole(model)
    assert set(reverse.keys()) == set(cells.trained(case))
    assert all(same_bits(value, expected[name]) for name, value in cells.whole(back).items())


def another_dtype_is_refused(folder: Path) -> None:
    model = cells.fsdp2(CASES["bf16"])
    before = cells.whole(model)
    with pytest.raises(MappingError, match=r"float32 \(12, 8\) would become bfloat16"):
        warmstart.load(model, cells.path_of(folder, "bf16", "torch"), dtype="checkpoint")
    assert all(same_bits(value, before[name]) for name, value in cells.whole(model).items())


def flattened_parameters_are_refused(folder: Path) -> None:
    """FSDP1: before the wrap everything works; after it names and shapes are gone."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = cells.fresh(CASES["full"])
    warmstart.load(net, cells.path_of(folder, "full", "safetensors"))
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    with pytest.raises(TimingError, match="FullyShardedDataParallel"):
        warmstart.plan(wrapped, cells.path_of(folder, "full", "safetensors"))


def _engine(model: nn.Module, dtype: str, stage: int = 3) -> nn.Module:
    import deepspeed

    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        dtype: {"enabled": True},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def deepspeed_trains_on_from_it(folder: Path) -> None:
    """field_note_8: the optimizer's fp32 copies are made from what was loaded, and the first step goes on from there."""
    path = cells.path_of(folder, "uneven", "safetensors")
    model = cells.zero3(CASES["uneven"])
    report = warmstart.load(model, path)
    engine = _engine(model, "bf16")
    report.check(model)
    expected = cells.trained(CASES["uneven"])
    now = cells.whole(model)
    assert all(same_bits(now[k], v.to(torch.bfloat16)) for k, v in expected.items() if now[k].dtype == torch.bfloat16)
    engine.backward(engine(TOKENS).float().square().mean() * 1e-3)
    engine.step()
    moved = cells.whole(model)
    for name, value in expected.items():
        if moved[name].dtype == torch.bfloat16:
            assert torch.allclose(moved[name].float(), value, rtol=0.05, atol=0.05), name
    with pytest.raises(VerificationError):
        report.check(model)  # it trained
    with pytest.raises(TimingError, match=r"deepspeed\.initialize"):
        warmstart.load(model, path)


def stale_masters_are_found(folder: Path) -> None:
    """field_note_8: right 16-bit values over an optimizer's old fp32 copies."""
    path = cells.path_of(folder, "uneven", "safetensors")
    model = cells.zero3(CASES["uneven"])
    report = warmstart.load(model, path)
    right = {name: local_of(parameter).clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        local_of(parameter).zero_()
    _engine(model, "bf16")
    for name, parameter in model.named_parameters():
        local_of(parameter).copy_(right[name])
    with pytest.raises(VerificationError, match="fp32 copy"):
        report.check(model)


def stale_masters_of_whole_parameters_are_found(folder: Path) -> None:
    """field_note_8, under ZeRO-1 and 2: each rank has the copies of its part of the parameters, which are whole."""
    path = cells.path_of(folder, "uneven", "safetensors")
    for stage in (1, 2):
        model = cells.fresh(CASES["uneven"])
        report = warmstart.load(model, path)
        right = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        _engine(model, "bf16", stage)
        report.check(model)
        with pytest.raises(TimingError, match=r"deepspeed\.initialize"):
            warmstart.load(model, path)
        model = cells.fresh(CASES["uneven"])
        report = warmstart.load(model, path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            _engine(model, "bf16", stage)
            for name, parameter in model.named_parameters():
                parameter.copy_(right[name])
        with pytest.raises(VerificationError, match="fp32 copy"):
            report.check(model)


def an_initialisation_that_fails_on_one_rank_fails_on_all(folder: Path) -> None:
    """Before the next owner is asked to draw what all ranks draw alike: nobody waits for the rank that left."""
    model = cells.fsdp2_meta(CASES["partial"])
    left, rank = model.blocks[1].up, torch.distributed.get_rank()
    tried = []

    def failing() -> None:
        tried.append(rank)
        if rank == 1 and len(tried) == 2:  # the first time is a trial, on a copy
            raise MemoryError("no memory left")
        nn.Linear.reset_parameters(left)

    left.reset_parameters = failing
    path = cells.path_of(folder, "partial", "safetensors")
    with pytest.raises(CheckpointError, match=r"on rank 1 of 2: (.|\n)*no memory left(.|\n)*the model is half loaded"):
        warmstart.load(model, path, **CASES["partial"].fields)


def shards_that_are_offloaded_to_the_cpu(folder: Path) -> None:
    """They get memory there, also where the mesh computes on another device: meta stands for one that is not here."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    case = CASES["full"]
    with torch.device("meta"):
        model = cells.fresh(case)
    cells.fully_sharded(model, case, offload_policy=CPUOffloadPolicy(pin_memory=False))
    plain = cells.fresh(case)
    path = cells.path_of(folder, "full", "safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materialising, "mesh_device", lambda tensor: torch.device("meta"))
        warmstart.load(model, path)
    warmstart.load(plain, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert torch.allclose(model(TOKENS), plain(TOKENS))
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert all(local_of(parameter).device.type == "cpu" for parameter in model.parameters())
    assert not torch.equal(cells.whole(model)["head.weight"], plain.head.weight)


STORIES: dict[str, list[Callable[[Path], None]]] = {
    "ddp": [flattened_parameters_are_refused],
    "fsdp2": [
        each_rank_reads_its_own_bytes,
        between_forward_and_backward,
        a_source_in_memory_is_remembered,
        rows_are_kept_and_held,
        an_adapter_without_effect_is_known_to_all_by_what_one_holds,
        there_and_back_through_dcp,
        another_dtype_is_refused,
    ],
    "fsdp2-meta": [an_initialisation_that_fails_on_one_rank_fails_on_all, shards_that_are_offloaded_to_the_cpu],
    "zero3": [deepspeed_trains_on_from_it, stale_masters_are_found, stale_masters_of_whole_parameters_are_found],
}
