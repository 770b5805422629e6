from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

A = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
B = {"b.weight": torch.full((3,), 2.0)}


def fails(source: Path, *fragments: str, **fields: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        warmstart.open_checkpoint(source, **fields)  # type: ignore[arg-type]
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    return message


def shard(folder: Path, tensors: dict[str, torch.Tensor], stem: str = "model") -> None:
    for number, (key, tensor) in enumerate(tensors.items(), 1):
        save_file({key: tensor}, folder / f"{stem}-{number:05d}-of-{len(tensors):05d}.safetensors")
    weight_map = {
        key: f"{stem}-{number:05d}-of-{len(tensors):05d}.safetensors" for number, key in enumerate(tensors, 1)
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_ti_4_safetensors_come_before_bin_and_strays_are_named(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    torch.save({key: tensor + 1 for key, tensor in A.items()}, tmp_path / "pytorch_model.bin")
    save_file(B, tmp_path / "model.safetensors.notused.bin")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = warmstart.open_checkpoint(tmp_path)
    assert set(checkpoint.keys()) == set(A)
    for key, tensor in A.items():
        assert same_bits(checkpoint.read(key), tensor)
    assert checkpoint.location == str(tmp_path / "model.safetensors")
    taken = "model.safetensors was taken and pytorch_model.bin beside it was not: they hold the same names and shapes"
    assert checkpoint.notes == (
        f"{taken}; their values were not compared",
        "1 file beside model.safetensors was left aside: 'model.safetensors.notused.bin'",
    )


def test_ti_4_two_files_that_may_be_meant_are_an_error_naming_both(tmp_path: Path) -> None:
    torch.save(A, tmp_path / "b.pth")
    torch.save(A, tmp_path / "a.pth")
    fails(
        tmp_path,
        "holds 2 files of weights and nothing that says which one is the model",
        f"give one of:\n  '{tmp_path / 'a.pth'}'\n  '{tmp_path / 'b.pth'}'",
    )


def test_ti_4_only_a_config_lists_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    fails(
        tmp_path,
        "holds no weights: there is 'config.json'; its folders are 'tokenizer'; give the file of weights itself, or the "
        "folder that save_pretrained() wrote",
    )
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no weights: there are no files in it; give the file")


@pytest.mark.parametrize("name", ["weights.pt", "last.ckpt", "anything.safetensors", "w.npz"])
def test_the_only_file_of_weights_is_taken(name: str, tmp_path: Path) -> None:
    if name.endswith("safetensors"):
        save_file(A, tmp_path / name)
    elif name.endswith("npz"):
        np.savez(tmp_path / name, **{key: tensor.numpy() for key, tensor in A.items()})
    else:
        torch.save({"state_dict": A} if name.endswith("ckpt") else A, tmp_path / name)
    for beside in (
        "README.md",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "trainer_state.json",
    ):
        (tmp_path / beside).write_bytes(b"x")
    checkpoint = warmstart.open_checkpoint(tmp_path)
    for key, tensor in A.items():
        assert same_bits(checkpoint.read(key), tensor)
    assert not any("aside" in note for note in checkpoint.notes)


def test_checkpoint_key_goes_to_the_file_of_the_folder(tmp_path: Path) -> None:
    torch.save({"model": A, "ema": B}, tmp_path / "last.ckpt")
    fails(tmp_path, "holds 2 trees of tensors")
    assert warmstart.open_checkpoint(tmp_path, checkpoint_key="ema").keys() == ("b.weight",)


def test_field_note_30_two_complete_formats_that_disagree(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    torch.save({"a.weight": A["a.weight"], **B}, tmp_path / "pytorch_model.bin")
    fails(
        tmp_path,
        "model.safetensors and pytorch_model.bin are both complete and hold different tensors ('a.bias' only in "
        "model.safetensors; 'b.weight' only in pytorch_model.bin)",
        f"say which one to take, with one of:\n  '{tmp_path / 'model.safetensors'}'\n  '{tmp_path / 'pytorch_model.bin'}'",
    )
    assert set(warmstart.open_checkpoint(tmp_path / "model.safetensors").keys()) == set(A)


def test_a_name_that_safetensors_leaves_out_for_a_tied_tensor_is_no_disagreement(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_file({"embed.weight": shared}, tmp_path / "model.safetensors")
    torch.save({"embed.weight": shared, "head.weight": shared}, tmp_path / "pytorch_model.bin")
    assert warmstart.open_checkpoint(tmp_path).keys() == ("embed.weight",)


def test_field_note_30_a_format_that_is_not_complete_is_left_aside(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    torch.save(B, tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    (note,) = warmstart.open_checkpoint(tmp_path).notes
    assert note.startswith("pytorch_model.bin beside model.safetensors was left aside, it is not complete: ")

    # the preferred one is never passed over for another
    torch.save(A, tmp_path / "pytorch_model.bin")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-4])
    fails(tmp_path, "model.safetensors: truncated")


def test_field_note_30_a_single_file_beside_stale_shards(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    shard(tmp_path, {**A, **B})
    fails(tmp_path, "model.safetensors and model.safetensors.index.json are both complete", "'b.weight' only in")
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    checkpoint = warmstart.open_checkpoint(tmp_path)
    assert set(checkpoint.keys()) == set(A)
    assert (
        "model.safetensors.index.json beside model.safetensors was left aside, it is not complete"
        in checkpoint.notes[0]
    )
    # an index of the one file itself says nothing new
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(A, "model.safetensors")})
    )
    assert not any("index" in note for note in warmstart.open_checkpoint(tmp_path).notes)


def test_field_note_30_a_shard_of_an_older_save_is_a_stray(tmp_path: Path) -> None:
    shard(tmp_path, A)
    save_file(B, tmp_path / "model-00003-of-00003.safetensors")
    checkpoint = warmstart.open_checkpoint(tmp_path)
    assert set(checkpoint.keys()) == set(A)
    assert checkpoint.notes == (
        "1 file beside model.safetensors.index.json was left aside: 'model-00003-of-00003.safetensors'",
    )


def test_ac_1_shards_without_an_index_are_listed(tmp_path: Path) -> None:
    shard(tmp_path, A)
    (tmp_path / "model.safetensors.index.json").unlink()
    fails(tmp_path, "holds 2 files of weights", "to load several into one model, give them as a list")
    model = nn.Module()
    model.a = nn.Linear(3, 2)
    warmstart.load(model, sorted(str(path) for path in tmp_path.glob("*.safetensors")))
    assert same_bits(model.a.weight.detach(), A["a.weight"])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapter_keeps_its_names(suffix: str, tmp_path: Path) -> None:
    # As PEFT writes them.
    tensors = {
        "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight": torch.ones(2, 4),
        "base_model.model.encoder.layer.0.attention.self.query.lora_B.weight": torch.zeros(4, 2),
    }
    path = tmp_path / f"adapter_model.{suffix}"
    if suffix == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    checkpoint = warmstart.open_checkpoint(tmp_path)
    assert set(checkpoint.keys()) == set(tensors)
    for key, tensor in tensors.items():
        assert same_bits(checkpoint.read(key), tensor)


def test_a_model_and_an_adapter_in_one_folder_are_two_things(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    save_file(B, tmp_path / "adapter_model.safetensors")
    fails(
        tmp_path,
        "holds a model and an adapter; say which one to take, with one of:",
        f"'{tmp_path / 'model.safetensors'}'",
        f"'{tmp_path / 'adapter_model.safetensors'}'",
    )


def test_a_part_of_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for name, tensors in (("unet", A), ("vae", B)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "diffusion_pytorch_model.safetensors")
    fails(
        tmp_path,
        "holds no weights: there is 'model_index.json'; give the part to take: subfolder=\"vae\" (of 'unet', 'vae')",
    )
    assert warmstart.open_checkpoint(tmp_path, subfolder="vae").keys() == ("b.weight",)
    assert warmstart.open_checkpoint(tmp_path / "vae").keys() == ("b.weight",)
    fails(tmp_path, "has no folder 'vea' (did you mean 'vae'?)", subfolder="vea")
    fails(tmp_path / "unet", "subfolder='../vae' leads out of it", subfolder="../vae")
    fails(tmp_path / "unet", "leads out of it", subfolder=str(tmp_path / "vae"))

    model = nn.Module()
    model.b = nn.Module()
    model.b.weight = nn.Parameter(torch.zeros(3))
    report = warmstart.load(model, tmp_path, subfolder="vae")
    assert torch.equal(model.b.weight, B["b.weight"])
    assert report.lineage["sources"][0]["rules"] == {"subfolder": "vae"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_torch_distributed_checkpoint_is_read_as_one(tmp_path: Path) -> None:
    torch.distributed.checkpoint.save(dict(A), checkpoint_id=tmp_path / "run" / "pytorch_model_fsdp_0", no_dist=True)
    (tmp_path / "run" / "optimizer.bin").write_bytes(b"x")
    fails(tmp_path / "run", 'give the part to take: subfolder="pytorch_model_fsdp_0"')
    checkpoint = warmstart.open_checkpoint(tmp_path / "run", subfolder="pytorch_model_fsdp_0")
    for key, tensor in A.items():
        assert same_bits(checkpoint.read(key), tensor)


def test_sharded_diffusion_models(tmp_path: Path) -> None:
    shard(tmp_path, {**A, **B}, stem="diffusion_pytorch_model")
    assert set(warmstart.open_checkpoint(tmp_path).keys()) == {*A, *B}


def test_a_folder_of_npy_files(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "scale": np.array([2.5], dtype=np.float32),
        "encoder.weight": np.arange(6, dtype=np.float64).reshape(2, 3),
        "encoder.layer.0.bias": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "encoder.norm.weight": np.arange(4, dtype=">f4"),
        "count": np.array(7),
        "empty": np.zeros((0, 3), dtype=np.float16),
    }
    (tmp_path / "encoder" / "layer" / "0").mkdir(parents=True)
    for key in ("scale", "count", "empty"):
        np.save(tmp_path / f"{key}.npy", arrays[key])
    np.save(tmp_path / "encoder" / "weight.npy", arrays["encoder.weight"])
    np.save(tmp_path / "encoder" / "layer" / "0" / "bias.npy", arrays["encoder.layer.0.bias"])
    np.save(tmp_path / "encoder" / "norm.weight.npy", arrays["encoder.norm.weight"])
    (tmp_path / "README.txt").write_text("not an array")

    checkpoint = warmstart.open_checkpoint(tmp_path)
    assert set(checkpoint.keys()) == set(arrays)
    for place, key in enumerate(checkpoint.keys()):
        tensor = torch.from_numpy(arrays[key].astype(arrays[key].dtype.newbyteorder("=")))
        assert checkpoint.info(key).file == place
        assert checkpoint.info(key).shape == tuple(tensor.shape)
        assert same_bits(checkpoint.read(key).contiguous(), tensor.contiguous())
    assert same_bits(checkpoint.read("encoder.weight", 1), torch.arange(3.0, 6.0, dtype=torch.float64))

    np.save(tmp_path / "scale.npy", np.array([2.5, 1.0], dtype=np.float32))
    assert checkpoint.changed() is not None
    with pytest.raises(CheckpointError, match=r"scale.npy: was written to after it was opened; open the folder again"):
        checkpoint.read("scale")


def test_a_folder_with_npy_files_only_in_its_folders(tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    np.save(tmp_path / "layer" / "kernel.npy", np.ones(3))
    assert warmstart.open_checkpoint(tmp_path).keys() == ("layer.kernel",)


def test_arrays_beside_the_checkpoints_of_a_run_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "checkpoint-500").mkdir()
    np.save(tmp_path / "data" / "features.npy", np.ones(3))
    save_file(A, tmp_path / "checkpoint-500" / "model.safetensors")
    fails(tmp_path, "holds no weights", 'give the part to take: subfolder="checkpoint-500"')


def test_more_npy_files_than_can_be_open_at_once(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(300):
        np.save(tmp_path / f"w{number:03d}.npy", np.full(2, number))
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        checkpoint = warmstart.open_checkpoint(tmp_path)
        assert [int(checkpoint.read(key)[0]) for key in checkpoint.keys()] == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_npy_folders_that_cannot_be_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "b.npy", np.ones(1))
    np.save(tmp_path / "a.b.npy", np.ones(1))
    fails(tmp_path, "two files are both the key 'a.b'", "rename one")
    (tmp_path / "a.b.npy").unlink()
    with pytest.raises(CheckpointError, match="a folder of npy files holds one tree, so checkpoint_key='a'"):
        warmstart.open_checkpoint(tmp_path, checkpoint_key="a")
    np.save(tmp_path / "o.npy", np.array({"w": np.ones(1)}, dtype=object), allow_pickle=True)
    fails(tmp_path, "o.npy: holds Python objects, not one plain array; give this file itself as the source")
    (tmp_path / "o.npy").write_bytes(b"text")
    fails(tmp_path, "o.npy: is named as a numpy file and is none")
    (tmp_path / "o.npy").write_bytes(b"")
    fails(tmp_path, "o.npy: the file is empty (0 bytes)")


def test_a_folder_saved_by_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    source = BertModel(config)
    source.save_pretrained(tmp_path)
    model = BertModel(config)
    report = warmstart.load(model, tmp_path)
    assert report.coverage == 1
    for (name, ours), theirs in zip(model.named_parameters(), source.parameters(), strict=True):
        assert same_bits(ours.detach(), theirs.detach()), name
