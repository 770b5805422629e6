"""Folders of torch.distributed.checkpoint: what two processes sharded, what one wrote, and what is damaged."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import warmstart
from warmstart.checkpoints.torch_files import boxes
from warmstart.checkpoints.torch_files.dcp import open_dcp
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

SCRIPT = Path(__file__).with_name("dcp_script.py")
TENSORS = {
    "net.weight": torch.arange(12.0).reshape(3, 4),
    "net.bias": torch.ones(4, dtype=torch.bfloat16),
    "net.transposed": torch.arange(6.0).reshape(2, 3).t(),
    "count": torch.tensor(3),
    "empty": torch.zeros(0, 2),
    "quarter": torch.ones(3).to(torch.float8_e4m3fn),
}


def save(tensors: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def put_metadata(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outs = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outs
    return folder


def expected() -> dict[str, Tensor]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import dcp_script
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return dcp_script.model().state_dict()


def test_what_two_processes_sharded_is_read_as_one(sharded: Path) -> None:
    assert len(list((sharded / "nested").glob("*.distcp"))) == 2
    checkpoint = open_dcp(sharded / "nested")
    assert checkpoint.checkpoint_key == "model"
    assert checkpoint.format == "torch DCP"
    assert checkpoint.notes == ("an optimizer's state was left out: 'optim'",)
    assert {stamp.path.name for stamp in checkpoint.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    tensors = expected()
    assert set(checkpoint.keys()) == set(tensors)
    for key, tensor in tensors.items():
        assert checkpoint.info(key).shape == tensor.shape
        assert same_bits(checkpoint.read(key), tensor)
    weight = tensors["0.weight"]
    for index in [0, slice(3, 5), (slice(None), 2), (slice(1, 7, 3), slice(0, 5, 2)), (..., -1), (6, 4), slice(2, 2)]:
        before = checkpoint.bytes_read
        assert torch.equal(checkpoint.read("0.weight", index), weight[index])
        assert checkpoint.bytes_read - before == weight[index].numel() * 4
    assert set(open_dcp(sharded / "plain").keys()) == set(tensors)
    for path in (sharded / "nested", sharded / "plain"):
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
        assert warmstart.load(model, path).verified
        assert same_bits(model[0].weight.detach(), weight)


def test_a_slice_reads_only_the_shards_it_meets(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded / "nested", tmp_path / "copy")
    tensor = expected()["0.weight"]
    checkpoint = open_dcp(folder)
    os.truncate(folder / "__1_0.distcp", 10)
    assert torch.equal(checkpoint.read("0.weight", slice(0, 4)), tensor[:4])
    with pytest.raises(CheckpointError, match=r"__1_0.distcp: had [\d,]+ bytes when it was opened and has 10 now"):
        checkpoint.read("0.weight", slice(3, 5))
    assert "__1_0.distcp had" in (checkpoint.changed() or "")


def test_plain_and_nested_trees(tmp_path: Path) -> None:
    flat = open_dcp(save(TENSORS, tmp_path / "flat"))
    assert flat.checkpoint_key is None
    nested = open_dcp(save({"app": {"model": TENSORS, "optim": {"state": {"m": torch.ones(3)}}}}, tmp_path / "nested"))
    assert nested.checkpoint_key == "app.model"
    for checkpoint in (flat, nested):
        assert set(checkpoint.keys()) == set(TENSORS)
        for key, tensor in TENSORS.items():
            assert same_bits(checkpoint.read(key), tensor.contiguous())
    save({"model": TENSORS, "ema": TENSORS}, tmp_path / "two")
    with pytest.raises(CheckpointError, match='checkpoint_key="ema"'):
        open_dcp(tmp_path / "two")
    assert len(open_dcp(tmp_path / "two", checkpoint_key="ema")) == len(TENSORS)
    with pytest.raises(CheckpointError, match=r"'app.optim' is an optimizer's state"):
        open_dcp(tmp_path / "nested", checkpoint_key="app.optim")


def test_flat_names_without_a_plan_keep_the_optimizer_apart(tmp_path: Path) -> None:
    folder = save(
        {"model.w": torch.ones(2), "app.optim.state.w": torch.ones(2), "optim.m": torch.ones(2)}, tmp_path / "d"
    )
    metadata = metadata_of(folder)
    metadata.planner_data = None
    put_metadata(folder, metadata)
    assert open_dcp(folder).keys() == ("model.w",)


def test_numbers_and_objects_beside_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "fired",))

    checkpoint = open_dcp(save({"w": torch.ones(2), "lr": 0.1, "bomb": Bomb()}, tmp_path / "d"))
    assert checkpoint.keys() == ("w",)
    assert checkpoint.notes == ("2 entries are not tensors and were left out: 'lr', 'bomb'",)
    metadata = metadata_of(tmp_path / "d")
    metadata.planner_data = Bomb()
    put_metadata(tmp_path / "d", metadata)
    open_dcp(tmp_path / "d")
    data = bytearray((tmp_path / "d" / "__0_0.distcp").read_bytes())
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    (index, info) = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == "w")
    metadata.storage_data[index] = type(info)(info.relative_path, len(data), len(buffer.getvalue()))
    put_metadata(tmp_path / "d", metadata)
    (tmp_path / "d" / "__0_0.distcp").write_bytes(data + buffer.getvalue())
    with pytest.raises(CheckpointError, match="holds something that is no tensor"):
        open_dcp(tmp_path / "d").read("w")
    assert not (tmp_path / "fired").exists()


def boxed(folder: Path, shape: tuple[int, ...], boxed: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """A folder with one tensor in boxes, as any mix of shardings leaves it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir()
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    chunks, storage, data = [], {}, b""
    for i, (offsets, sizes) in enumerate(boxed):
        part = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
        buffer = io.BytesIO()
        torch.save(part, buffer)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        storage[MetadataIndex("w", torch.Size(offsets), i)] = _StorageInfo("__0_0.distcp", len(data), buffer.tell())
        data += buffer.getvalue()
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)
    (folder / "__0_0.distcp").write_bytes(data)
    put_metadata(folder, Metadata({"w": entry}, {}, storage))
    return tensor


TILINGS = {
    "rows": ((6, 5), [((0, 0), (2, 5)), ((2, 0), (2, 5)), ((4, 0), (2, 5))]),
    "uneven rows": ((7, 5), [((0, 0), (4, 5)), ((4, 0), (3, 5))]),
    "a grid": ((4, 6), [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))]),
    "no grid": ((4, 4), [((0, 0), (4, 1)), ((0, 1), (1, 3)), ((1, 1), (3, 2)), ((1, 3), (3, 1))]),
    "an empty box": ((2, 2), [((0, 0), (2, 2)), ((2, 0), (0, 2))]),
    "one box": ((2, 2), [((0, 0), (2, 2))]),
    "a cube": ((2, 2, 2), [((0, 0, i), (2, 2, 1)) for i in range(2)]),
}


@pytest.mark.parametrize("name", TILINGS)
def test_boxes_of_any_sharding_are_joined(name: str, tmp_path: Path) -> None:
    shape, tiling = TILINGS[name]
    tensor = boxed(tmp_path / "d", shape, tiling)
    checkpoint = open_dcp(tmp_path / "d")
    assert same_bits(checkpoint.read("w"), tensor)
    for index in [1, slice(1, 2), (..., slice(0, None, 2)), (0, ..., 1), (slice(None), slice(1, 4)), (-1, -1)]:
        assert torch.equal(checkpoint.read("w", index), tensor[index])


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ([((0, 0), (2, 4))], r"8 elements and it has 16: some are missing"),
        ([((0, 0), (4, 4)), ((2, 0), (2, 4))], r"24 elements and it has 16: some are there twice"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], "some of its pieces overlap"),
    ],
)
def test_shards_that_do_not_cover_a_tensor_are_refused(tiling: list[Any], message: str, tmp_path: Path) -> None:
    boxed(tmp_path / "d", (4, 4), tiling)
    with pytest.raises(CheckpointError, match=f"'w': .*{message}; the save did not finish on every rank"):
        open_dcp(tmp_path / "d")


def test_many_loose_pieces_are_refused_and_a_piece_outside() -> None:
    loose = [((i, 0), (1, 1)) for i in range(1500)] + [((0, 1), (1500, 1))]
    assert "form no grid" in (boxes.not_a_tiling((1500, 2), loose) or "")
    assert "does not lie inside" in (boxes.not_a_tiling((2,), [((1,), (2,))]) or "")
    assert "a piece of 1 dimensions" in (boxes.not_a_tiling((2, 2), [((1,), (2,))]) or "")


def test_a_missing_or_truncated_file(tmp_path: Path) -> None:
    folder = save(TENSORS, tmp_path / "d")
    file = folder / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(
        CheckpointError, match=r"__0_0.distcp: truncated: .* should end at byte [\d,]+ and the file has"
    ):
        open_dcp(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: is missing, and .metadata says"):
        open_dcp(folder)
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        open_dcp(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="the save did not finish"):
        open_dcp(folder)


@pytest.mark.parametrize("name", ["../w", "/etc/passwd", "a/../b", "..", "", "a\\b", "a\0b", 3])
def test_a_file_outside_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2)}, tmp_path / "d")
    metadata = metadata_of(folder)
    for info in metadata.storage_data.values():
        info.relative_path = name
    put_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match="which is no file in the folder and may be an attack"):
        open_dcp(folder)


def test_metadata_that_says_what_cannot_be(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2, 2)}, tmp_path / "d")

    def changed(change: Any, message: str) -> None:
        metadata = metadata_of(folder)
        change(metadata)
        original = (folder / ".metadata").read_bytes()
        put_metadata(folder, metadata)
        try:
            with pytest.raises(CheckpointError, match=message):
                open_dcp(folder).read("w")
        finally:
            (folder / ".metadata").write_bytes(original)

    def info(metadata: Any) -> Any:
        return next(iter(metadata.storage_data.values()))

    changed(lambda m: setattr(m, "storage_data", {}), r"does not say where the shard of 'w' at \(0, 0\) lies")
    changed(lambda m: setattr(m, "storage_data", None), "which tensors there are and where they lie")
    changed(lambda m: setattr(info(m), "offset", -4), "not two positions")
    changed(lambda m: setattr(info(m), "offset", 10**18), "truncated")
    changed(lambda m: setattr(info(m), "length", 8), "needs 16 bytes and has 8")
    changed(lambda m: setattr(info(m), "length", 200), "without the directory at its end")
    changed(lambda m: setattr(info(m), "offset", 1), "truncated|nothing that torch.save writes")
    changed(lambda m: setattr(info(m), "transform_descriptors", ["stream.zstd"]), r"compressed, mostly.*dcp_to_torch")
    changed(lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([4])), "a piece of 2 dimensions")
    changed(lambda m: setattr(m.state_dict_metadata["w"], "size", "x"), "a size or offset that is none")
    changed(lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.float64), "needs 32|the item is")
    changed(lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", None), "a dtype that this torch")
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"pickle.*dcp_to_torch FOLDER weights.pt"):
        open_dcp(folder)


def test_files_in_safetensors_s_format_say_how_to_convert(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    writer = dcp.FileSystemWriter(tmp_path / "d", serialization_format=SerializationFormat.SAFETENSORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(4)}, storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointError, match=re.escape("there is safetensors")):
        open_dcp(tmp_path / "d").read("w")


def test_any_index_takes_what_torch_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.arange(4 * 5 * 6).reshape(4, 5, 6)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(500):
        parts: list[Any] = []
        for size in tensor.shape[: number(0, 4)]:
            start, stop = number(-size - 2, size + 2), number(-size - 2, size + 2)
            parts.append(number(-size, size) if number(0, 2) else slice(start, stop, number(1, 4)))
        if number(0, 2):
            parts.append(...)
        selection = boxes.Selection.of(tensor.shape, tuple(parts))
        want = tensor[tuple(parts)]
        assert selection.shape == want.shape
        assert torch.equal(
            tensor[tuple(slice(r.start, r.stop, r.step) for r in selection.ranges)].reshape(want.shape), want
        )
    for wrong in [4, (0, 0, 0, 0), (..., ...), -5]:
        with pytest.raises(IndexError):
            boxes.Selection.of(tensor.shape, wrong)
    with pytest.raises(ValueError, match="positive"):
        boxes.Selection.of(tensor.shape, slice(3, 0, -1))
