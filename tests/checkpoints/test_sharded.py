from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import real_weights
import warmstart
from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

A = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "a.step": torch.tensor(3)}
B = {"b.weight": torch.arange(8, dtype=torch.bfloat16).reshape(2, 4)}
ALL = {**A, **B}


def write(folder: Path, *, kind: str = "safetensors", shards: Mapping[str, Mapping[str, Tensor]] | None = None) -> Path:
    """Shards and their index, named as save_pretrained names them; returns the index."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    folder.mkdir(exist_ok=True)
    shards = shards or {f"{stem}-00001-of-00002.{kind}": A, f"{stem}-00002-of-00002.{kind}": B}
    for name, tensors in shards.items():
        if kind == "safetensors":
            save_file(dict(tensors), folder / name)
        else:
            torch.save(dict(tensors), folder / name)
    index = folder / f"{stem}.{kind}.index.json"
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def edit(index: Path, **changes: str | None) -> None:
    content = json.loads(index.read_text())
    for key, name in changes.items():
        if name is None:
            del content["weight_map"][key]
        else:
            content["weight_map"][key] = name
    index.write_text(json.dumps(content))


def holds(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    assert set(checkpoint.keys()) == set(tensors)
    for key, tensor in tensors.items():
        assert checkpoint.info(key).shape == tuple(tensor.shape)
        assert checkpoint.info(key).dtype == tensor.dtype
        assert same_bits(checkpoint.read(key), tensor)


def fails(source: Path, *fragments: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        warmstart.open_checkpoint(source)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    return message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_ac_1_an_index_or_its_folder_is_one_checkpoint(kind: str, tmp_path: Path) -> None:
    index = write(tmp_path / "m", kind=kind)
    for source in (index, tmp_path / "m", str(index)):
        checkpoint = warmstart.open_checkpoint(source)
        holds(checkpoint, ALL)
        assert checkpoint.notes == ()
        assert checkpoint.location == str(index)
        assert checkpoint.format == f"{'safetensors' if kind == 'safetensors' else 'torch zip'}, 2 shards"


def test_ac_1_an_index_of_another_name(tmp_path: Path) -> None:
    index = write(tmp_path / "m").rename(tmp_path / "m" / "weight_map.index.json")
    holds(warmstart.open_checkpoint(index), ALL)
    holds(warmstart.open_checkpoint(tmp_path / "m"), ALL)
    index = index.rename(tmp_path / "m" / "model.safetensors.index.fp16.json")
    holds(warmstart.open_checkpoint(index), ALL)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_each_tensor_knows_its_shard(kind: str, tmp_path: Path) -> None:
    index = write(tmp_path / "m", kind=kind)
    checkpoint = warmstart.open_checkpoint(index)
    first, second, last = checkpoint.files
    assert (first.path.name[-16:-5], second.path.name[-16:-5]) != (second.path.name, first.path.name)
    assert last.path == index
    for key in A:
        assert checkpoint.files[checkpoint.info(key).file] == first
    raw = second.path.read_bytes()
    info = checkpoint.info("b.weight")
    assert checkpoint.files[info.file] == second
    assert raw[info.offset : info.offset + info.nbytes] == B["b.weight"].view(torch.uint8).numpy().tobytes()

    assert same_bits(checkpoint.read("b.weight", (1, slice(1, 3))), B["b.weight"][1, 1:3])
    assert checkpoint.bytes_read == 4
    checkpoint.read("a.weight")
    assert checkpoint.bytes_read == 4 + 24


def test_the_digest_tells_two_ways_to_shard_apart_and_no_others(tmp_path: Path) -> None:
    one = warmstart.open_checkpoint(write(tmp_path / "one"))
    same = warmstart.open_checkpoint(write(tmp_path / "same"))
    other = {"model-00001-of-00002.safetensors": B, "model-00002-of-00002.safetensors": A}
    assert one.header_digest() == same.header_digest()
    assert one.header_digest() != warmstart.open_checkpoint(write(tmp_path / "other", shards=other)).header_digest()


def test_a_shard_or_index_that_changes_is_noticed(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    checkpoint = warmstart.open_checkpoint(index)
    assert checkpoint.changed() is None
    for path in (tmp_path / "m" / "model-00002-of-00002.safetensors", index):
        checkpoint = warmstart.open_checkpoint(index)
        os.utime(path, ns=(1, 1))
        assert checkpoint.changed() == f"{path} was written to after it was opened"


def test_sha256_needs_one_file(tmp_path: Path) -> None:
    checkpoint = warmstart.open_checkpoint(write(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="sha256= needs a source of exactly one file, not 3"):
        checkpoint.sha256()


def test_field_note_30_a_tensor_beside_the_index_is_never_read_nor_listed(tmp_path: Path) -> None:
    stale = torch.full((2, 3), -1.0)
    shards = {
        "model-00001-of-00002.safetensors": A,
        "model-00002-of-00002.safetensors": {**B, "a.weight": stale, "extra": torch.ones(1)},
    }
    index = write(tmp_path / "m", shards=shards)
    edit(index, **{"a.weight": "model-00001-of-00002.safetensors", "extra": None})
    checkpoint = warmstart.open_checkpoint(index)
    holds(checkpoint, ALL)
    assert checkpoint.notes == (
        "2 tensors that lie in the shards but not where model.safetensors.index.json says were left out: 'a.weight', 'extra'",
    )
    assert "extra" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint.read("extra")


def test_field_note_30_a_shard_that_is_missing(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    for source in (index, tmp_path / "m"):
        fails(
            source,
            "model.safetensors.index.json: names 2 shards, of which 1 is not there: 'model-00002-of-00002.safetensors'",
            f"copy or download it into {tmp_path / 'm'}, beside the index",
        )


def test_field_note_30_a_stale_index(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    edit(index, **{"b.weight": "model-00001-of-00002.safetensors", "a.bias": "model-00002-of-00002.safetensors"})
    fails(
        index,
        "'model-00001-of-00002.safetensors' should hold 3 tensors and lacks 1 of them: 'b.weight' "
        "('b.weight' lies in 'model-00002-of-00002.safetensors' instead)",
        "get all of them again",
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_shard_is_found_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    index = write(tmp_path / "m", kind=kind)
    shard = sorted((tmp_path / "m").glob(f"*-00002-of-00002.{kind}"))[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    model = torch.nn.Module()
    model.a = torch.nn.Linear(3, 2)
    before = model.a.weight.detach().clone()
    with pytest.raises(CheckpointError, match=f"{shard.name}.*truncated"):
        warmstart.load(model, index)
    assert torch.equal(model.a.weight, before)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x",
        "C:\\x",
        "C:x",
        "..\\x",
        "sub\\x",
        "",
        ".",
        "x\0y",
        "//host/share/x",
        "./..",
    ],
)
def test_a_shard_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    save_file(B, tmp_path / "x.safetensors")
    edit(index, **{"b.weight": name})
    fails(index, "is not a file within the folder of the index", "put every shard beside the index")


def test_a_shard_in_a_folder_within_is_fine(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    (tmp_path / "m" / "part").mkdir()
    (tmp_path / "m" / "model-00002-of-00002.safetensors").rename(tmp_path / "m" / "part" / "two.safetensors")
    edit(index, **{"b.weight": "part/two.safetensors"})
    holds(warmstart.open_checkpoint(index), ALL)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "secret")
    shard.symlink_to(tmp_path / "secret")
    fails(index, "is a link that leads out of the folder", f"copy the file itself into {tmp_path / 'm'}")
    # a folder that only looks like the hub's cache gives no way out either
    fake = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    fake.parent.mkdir(parents=True)
    (tmp_path / "m").rename(fake)
    fails(fake / index.name, "is a link that leads out of the folder")


def test_a_link_to_the_folder_and_links_within_are_fine(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "m" / "real.safetensors")
    shard.symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    holds(warmstart.open_checkpoint(tmp_path / "link" / index.name), ALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "it has no object 'weight_map'"),
        (b'{"weight_map": {}}', "its 'weight_map' is empty"),
        (b'{"weight_map": []}', "it has no object 'weight_map'"),
        (b'{"weight_map": {"a": 3}}', "the shard of 'a' is a JSON int, not a file name"),
        (b'{"weight_map": {"a": null}}', "the shard of 'a' is a JSON NoneType"),
        (b'{"weight_map": {"a": ["x"]}}', "the shard of 'a' is a JSON list"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' is there twice"),
        (b'{"weight_map": {"a": "x"}, "weight_map": {}}', "the key 'weight_map' is there twice"),
        (b'{"weight_map": {"a": NaN}}', "NaN is no number of JSON"),
        (b'{"weight_map": {"a": "x"}', "it is not valid JSON"),
        (b'{"weight_map": "\xff"}', "it is not valid JSON"),
        (b'{"weight_map": ' + b"[" * 200_000, "it is nested too deeply"),
        (b'{"weight_map": {"a": ' + b"9" * 10_000 + b"}}", "it is not valid JSON"),
        (b'{"weight_map": [' + b'"",' * 3_000_000, "too many parts"),
        (b'{"weight_map"' + bytes(100), "it is not valid JSON"),
    ],
)
def test_a_hostile_index(content: bytes, message: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    fails(index, f"{index}: damaged index of shards: ", message, "get the file again from where it came")


def test_damaged_indexes_end_in_one_type_of_error(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    whole = index.read_bytes()
    random = Random(7)
    opened = 0
    messages: list[str] = []
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 1, 2, 8))):
            at = random.randrange(len(damaged))
            damaged[at : at + random.randrange(3)] = random.randbytes(random.randrange(3))
        index.write_bytes(damaged)
        try:
            checkpoint = warmstart.open_checkpoint(index)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            opened += 1
            assert set(checkpoint.keys()) <= set(ALL)
    assert all(str(index.parent) in message for message in messages)
    assert 0 < opened < 1500


def test_an_index_beyond_all_measure(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    with index.open("r+b") as file:
        file.truncate(100_000_001)
    fails(index, "it has 100,000,001 bytes; at most 100,000,000 are read")


def test_json_that_is_no_index_is_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    fails(tmp_path / "config.json", "a text file that starts with")


def test_shards_hold_one_tree(tmp_path: Path) -> None:
    index = write(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"an index describes one tree, so checkpoint_key='a'.*select=\"a\""):
        warmstart.open_checkpoint(index, checkpoint_key="a")


def test_versions_and_metadata_of_shards_are_joined(tmp_path: Path) -> None:
    index = write(tmp_path / "m", kind="bin")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model-00002-of-00002.bin")
    edit(index, **{"b.weight": None, **dict.fromkeys(model.state_dict(), "pytorch_model-00002-of-00002.bin")})
    checkpoint = warmstart.open_checkpoint(index)
    assert checkpoint.versions["0"] == {"version": 2}
    holds(checkpoint, {**A, **model.state_dict()})

    index = write(tmp_path / "s")
    save_file(A, tmp_path / "s" / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    assert warmstart.open_checkpoint(index).metadata == {"format": "pt"}


def test_a_model_is_loaded_from_shards(tmp_path: Path) -> None:
    index = write(
        tmp_path / "m", shards={"one.safetensors": {"weight": A["a.weight"]}, "two.safetensors": {"bias": A["a.bias"]}}
    )
    model = torch.nn.Linear(3, 2)
    report = warmstart.load(model, index)
    assert same_bits(model.weight.detach(), A["a.weight"])
    assert same_bits(model.bias.detach(), A["a.bias"])
    names = [file["name"] for file in report.lineage["sources"][0]["files"]]
    assert names == ["one.safetensors", "two.safetensors", "model.safetensors.index.json"]


@pytest.mark.slow
def test_minilm_resharded_by_transformers_is_value_equal(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    source = load_file(real_weights.MINILM.fetch())
    config = BertConfig(**json.loads(real_weights.MINILM.fetch("config.json").read_text()))
    model = BertModel(config)
    model.load_state_dict(source, strict=False)
    model.save_pretrained(tmp_path, max_shard_size="10MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3

    checkpoint = warmstart.open_checkpoint(tmp_path)
    holds(checkpoint, {key: source[key] for key in source if key != "embeddings.position_ids"})
    fresh = BertModel(config)
    report = warmstart.load(fresh, tmp_path)
    assert report.coverage == 1
    assert report.missing == report.unexpected == ()
    for name, parameter in fresh.named_parameters():
        assert same_bits(parameter.detach(), source[name]), name
