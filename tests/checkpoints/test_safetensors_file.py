from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_metadata_and_an_unaligned_header(tmp_path: Path) -> None:
    path = write(
        tmp_path / "w", {"__metadata__": {"format": "pt"}, "w": entry(0, 8, shape=[2])}, struct.pack("<2f", 1, 2)
    )
    for padding in range(8):
        header = path.read_bytes()[8:-8] + b" " * padding
        write(path, header, struct.pack("<2f", 1, 2))
        checkpoint = open_checkpoint(path)
        assert checkpoint.metadata == {"format": "pt"}
        assert same_bits(checkpoint.read("w"), torch.tensor([1.0, 2.0]))
        assert same_bits(checkpoint.read("w", 1), torch.tensor(2.0))


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50, 0x0A8080])
def test_a_header_whose_length_is_the_magic_of_another_format(tmp_path: Path, length: int) -> None:
    """One header length in 2,048 starts like a pickle; and 0x4B50 like half of a zip archive."""
    text = json.dumps({"w": entry(0, 8, shape=[2])}).encode()
    path = write(tmp_path / "w", text + b" " * (length - len(text)), struct.pack("<2f", 1, 2))
    for trust in (False, True):
        checkpoint = open_checkpoint(path, trust_pickle=trust)
        assert checkpoint.format == "safetensors"
        assert same_bits(checkpoint.read("w"), torch.tensor([1.0, 2.0]))


def test_truncation_says_expected_and_actual(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(100), "v": torch.zeros(10)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(
        CheckpointError, match=f"truncated: expected {len(raw):,} bytes for 2 tensors, the file has {len(raw) - 1:,}"
    ):
        open_checkpoint(path)
    path.write_bytes(raw[:40])
    with pytest.raises(CheckpointError, match=r"truncated: the header alone should end at byte .* and the file has 40"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"{]}", b"", "not valid JSON"),
        (b"{" + b'"a":{' * 10_000, b"", "not valid JSON"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b'{"w": NaN}', b"", "NaN is no number of JSON"),
        (b'{"a": 1, "a": 2}', b"", "the key 'a' is there twice"),
        ({}, b"", "a safetensors file without tensors"),
        ({"__metadata__": {"a": 1}}, b"", "'__metadata__' is not a mapping of strings"),
        ({"__metadata__": 3}, b"", "'__metadata__' is not a mapping of strings"),
        ({"w": []}, b"", "does not have exactly dtype, shape and data_offsets"),
        ({"w": {"dtype": "F32", "shape": []}}, b"", "does not have exactly"),
        ({"w": entry(0, 4, dtype="Q7")}, bytes(4), "has dtype 'Q7', which this torch"),
        ({"w": {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "has dtype 'dict'"),
        ({"w": entry(0, 4, shape=[-1])}, bytes(4), "the shape of 'w' is not a list"),
        ({"w": entry(0, 4, shape=[True])}, bytes(4), "the shape of 'w' is not a list"),
        ({"w": entry(0, 4, shape=[1.0])}, bytes(4), "the shape of 'w' is not a list"),
        ({"w": entry(0, 4, shape=[1] * 65)}, bytes(4), "at most 64 possible sizes"),
        ({"w": entry(0, 4, shape=[10**17])}, bytes(4), "needs 400,000,000,000,000,000 bytes and has 4"),
        ({"w": entry(0, 4, shape=[10**30])}, bytes(4), "the shape of 'w' is not a list"),
        ({"w": entry(-4, 0)}, bytes(4), "are not two rising positions"),
        ({"w": entry(4, 0)}, bytes(4), "are not two rising positions"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "are not two rising positions"),
        ({"w": entry(0, 8)}, bytes(8), r"with shape \(1,\) of F32 needs 4 bytes and has 8"),
        ({"w": entry(4, 8)}, bytes(8), "it leaves a gap before it"),
        ({"w": entry(0, 4), "v": entry(0, 4)}, bytes(4), "it overlaps the tensor before it"),
        ({"w": entry(0, 8, shape=[2]), "v": entry(4, 8)}, bytes(8), "it overlaps the tensor before it"),
        ({"w": entry(0, 4), "v": entry(8, 12)}, bytes(12), "it leaves a gap before it"),
        ({"w": entry(0, 4)}, bytes(9), "5 belong to no tensor"),
    ],
)
def test_a_header_that_breaks_a_rule(header: object, data: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_header_that_claims_too_much(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {"w": entry(0, 4)}, bytes(4), length=200_000_000)
    with pytest.raises(CheckpointError, match="its header claims 200,000,000 bytes; the format allows 100,000,000"):
        open_checkpoint(path)


def test_a_single_tree_has_no_checkpoint_key(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {"w": entry(0, 4)}, bytes(4))
    with pytest.raises(CheckpointError, match="holds one tree, so checkpoint_key='model' names nothing in it"):
        open_checkpoint(path, checkpoint_key="model")


def test_odd_names_are_just_names(tmp_path: Path) -> None:
    names = ["\u001b[31mred", "<script>", "x" * 1_000_000, "", ".", "a..b", "\ud800"]
    header = {name: entry(4 * i, 4 * i + 4) for i, name in enumerate(names)}
    path = write(tmp_path / "w", header, struct.pack(f"<{len(names)}f", *range(len(names))))
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.keys()) == names
    for i, name in enumerate(names):
        assert checkpoint.read(name).item() == i
    assert len(checkpoint.header_digest()) == 64
