from __future__ import annotations

import gzip
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def fails(path: object, *fragments: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)  # type: ignore[arg-type]
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    return message


def test_a_path_may_be_text_or_path_or_start_with_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(WEIGHTS, tmp_path / "w.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (str(tmp_path / "w.pt"), tmp_path / "w.pt", "~/w.pt"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.keys() == ("a.weight", "a.bias")
        assert checkpoint.files[0].size == (tmp_path / "w.pt").stat().st_size


def test_an_open_checkpoint_is_returned_as_it_is() -> None:
    checkpoint = open_checkpoint(WEIGHTS)
    assert open_checkpoint(checkpoint) is checkpoint
    with pytest.raises(CheckpointError, match="whose tree was taken when it was opened"):
        open_checkpoint(checkpoint, checkpoint_key="model")


@pytest.mark.parametrize("source", [3, None, [torch.zeros(2)], torch.zeros(2)])
def test_other_types_are_a_type_error(source: object) -> None:
    with pytest.raises(TypeError, match="a checkpoint is opened from a path, a mapping"):
        open_checkpoint(source)  # type: ignore[arg-type]


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "weights.pt")
    fails(tmp_path / "weigths.pt", "weigths.pt: there is no such file", "did you mean 'weights.pt'?")
    fails(tmp_path / "no" / "w.pt", "nor a folder")
    fails("org/name.pt", "there is no such file")


def test_a_link_to_nothing_names_what_it_leads_to(tmp_path: Path) -> None:
    """A copied hub cache often has the links of its snapshots without their blobs."""
    (tmp_path / "weights.pt").symlink_to(tmp_path / "blobs" / "abc")
    message = fails(tmp_path / "weights.pt", "weights.pt: a link to ", "blobs/abc', which is not there")
    assert "did you mean" not in message
    (tmp_path / "round").symlink_to("round")
    fails(tmp_path / "round", "round: a link to ", "which is not there")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"")
    fails(tmp_path / "w.pt", "w.pt: the file is empty (0 bytes); copy or download it again")


def test_a_path_with_a_null_byte() -> None:
    fails("a\0b", "is no path")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "w.pt")
    (tmp_path / "w.pt").chmod(0)
    fails(tmp_path / "w.pt", "check the path and its permissions")


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "is not a regular file")


@pytest.mark.parametrize(
    ("head", "fragment"),
    [
        (b"epoch,loss\n1,0.5\n", "a text file that starts with 'epoch,loss\\\\n1,0.5"),
        (b"hello", "a text file"),
        (b"x" * 600, "a text file"),
        (b"<!DOCTYPE html><html>", "an HTML page, not weights"),
        (b"\n <html lang='en'>", "an HTML page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "damaged HDF5 file"),
        (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
        (b"\x28\xb5\x2f\xfd" + bytes(10), "zstd"),
        (bytes(range(128, 255)), "an unknown format (its 127 bytes start with 80 81 82 83 84 85 86 87)"),
        (b"\0" * 2000, "an unknown format"),
        (b"PK\x03\x04" + bytes(200), "truncated at 204 bytes"),
        (b"PK\x05\x06" + bytes(18), "it holds nothing"),
    ],
)
def test_what_is_no_checkpoint_is_named(head: bytes, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(head)
    message = fails(path, "weights.pt: ", fragment.replace("\\\\", "\\"))
    assert re.search(r"[;:]", message)


def test_compressed_and_packed_files_say_how_to_unpack(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "w.pt")
    (tmp_path / "w.pt.gz").write_bytes(gzip.compress((tmp_path / "w.pt").read_bytes()))
    fails(tmp_path / "w.pt.gz", "a gzip file; unpack it first: gunzip")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(tmp_path / "w.pt", "w.pt")
    fails(tmp_path / "w.tar", "a tar archive; unpack it first: tar xf")


def test_the_name_of_a_file_says_nothing(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "w.safetensors")
    assert open_checkpoint(tmp_path / "w.safetensors").format == "torch zip"


def test_a_keras_file_without_weights_in_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
        archive.writestr("config.json", b"{}")
        archive.writestr("model.weights.h5", b"x")
    fails(tmp_path / "w.keras", "'model.weights.h5' is no HDF5 file")
