from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import warmstart
from warmstart.errors import CheckpointError

WHOLE = {"layer.weight": torch.ones(3, 2), "layer.bias": torch.ones(3)}


def fails(source: Path | Mapping[str, torch.Tensor], *fragments: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        warmstart.open_checkpoint(source)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    return message


@pytest.mark.parametrize("key", ["blocks.0._fsdp_wrapped_module._flat_param", "_flat_param", "blocks.0.flat_param"])
def test_field_note_36_flat_parameters_of_fsdp(key: str, tmp_path: Path) -> None:
    tensors = {key: torch.ones(10), "norm.weight": torch.ones(2)}
    torch.save({"model": tensors}, tmp_path / "rank0.pth")
    save_file(tensors, tmp_path / "rank0.safetensors")
    for source in (tmp_path / "rank0.pth", tmp_path / "rank0.safetensors", tensors):
        fails(
            source,
            f"1 of its 2 tensors are flat parameters of FSDP ('{key}')",
            "with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT): state = model.state_dict()",
        )


def test_field_note_36_placeholders_of_zero_3(tmp_path: Path) -> None:
    tensors = {"layer.weight": torch.empty(0), "layer.bias": torch.ones(3), "norm.running_mean": torch.ones(3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for source in (tmp_path / "pytorch_model.bin", tmp_path, tensors):
        fails(
            source,
            "1 of its 2 weights have size 0 ('layer.weight'): the placeholders that DeepSpeed ZeRO-3 leaves",
            "python -m deepspeed.utils.zero_to_fp32 . out",
            '"stage3_gather_16bit_weights_on_model_save": true',
        )
    # all of them, as when none was small enough to stay whole
    fails({"layer.weight": torch.empty(0), "layer.bias": torch.empty(0)}, "2 of its 2 weights have size 0")


def test_empty_tensors_that_are_what_they_are_pass() -> None:
    observer = {"observer.min_val": torch.empty(0), "observer.eps": torch.ones(1), "layer.weight": torch.ones(2)}
    assert len(warmstart.open_checkpoint(observer)) == 3
    for shapes in ((3, 0), (3,)), ((0, 3), (0,)):  # a linear layer without inputs, and one without outputs
        layer = {"empty.weight": torch.empty(shapes[0]), "empty.bias": torch.empty(shapes[1])}
        assert len(warmstart.open_checkpoint({"layer.weight": torch.ones(2, 2), **layer})) == 3


def zero_folder(root: Path, *, stage: int) -> Path:
    """Checkpoints as DeepSpeed leaves them: `latest` names a folder of one part for each rank."""
    folder = root / "global_step10"
    folder.mkdir(parents=True)
    (root / "latest").write_text("global_step10")
    (root / "zero_to_fp32.py").write_text("# joins the parts\n")
    for rank in range(2):
        optimizer = {
            "optimizer_state_dict": {"zero_stage": stage, "fp32_flat_groups": [torch.ones(5)]},
            "ds_version": "0.14",
        }
        prefix = "zero_pp_rank" if stage == 3 else "bf16_zero_pp_rank"
        torch.save(optimizer, folder / f"{prefix}_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            part = {"module": {"layer.weight": torch.empty(0)}, "ds_version": "0.14"}
            torch.save(part, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage < 3:
        torch.save({"module": WHOLE, "optimizer": None, "ds_version": "0.14"}, folder / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_field_note_36_folders_of_zero(stage: int, tmp_path: Path) -> None:
    folder = zero_folder(tmp_path / "run", stage=stage)
    for source in (folder, tmp_path / "run"):
        message = fails(
            source,
            f"{source}: a DeepSpeed checkpoint (",
            f"join them once: cd {tmp_path / 'run'} && python zero_to_fp32.py . out, and give {tmp_path / 'run' / 'out'}",
        )
    for part in folder.glob("*zero_pp_rank_*"):
        message = fails(part, "one rank's part of a DeepSpeed ZeRO checkpoint", "&& python zero_to_fp32.py . out")
    message = fails(folder)
    assert ('checkpoint_key="module"' in message) is (stage == 2)
    if stage == 2:
        whole = warmstart.open_checkpoint(folder / "mp_rank_00_model_states.pt", checkpoint_key="module")
        assert set(whole.keys()) == set(WHOLE)


def test_field_note_36_without_the_script_the_module_is_named(tmp_path: Path) -> None:
    zero_folder(tmp_path, stage=3)
    (tmp_path / "zero_to_fp32.py").unlink()
    fails(tmp_path, f"cd {tmp_path} && python -m deepspeed.utils.zero_to_fp32 . out")


def test_a_file_called_latest_makes_no_deepspeed_checkpoint(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "model.safetensors")
    for content in (b"whatever", b"../..", b"a\0b", b"\xff"):
        (tmp_path / "latest").write_bytes(content)
        assert set(warmstart.open_checkpoint(tmp_path).keys()) == set(WHOLE)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert set(warmstart.open_checkpoint(tmp_path).keys()) == set(WHOLE)


def test_gguf_says_what_to_take(tmp_path: Path) -> None:
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    fails(tmp_path / "model-Q4.gguf", "a GGUF file, whose tensors are quantized blocks; use the original weights")
    fails(tmp_path, "holds no weights: only 'model-Q4.gguf', GGUF files", "use the original weights")
