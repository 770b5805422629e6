"""One table of tensors through every format that can hold them: names, shapes, dtypes and bits come back as they were.

The same measurement makes the table of `docs/formats.md`: `python tests/checkpoints/test_parity.py` writes it anew.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]

OLD = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
}

Tensors = dict[str, Tensor]
Write = Callable[[Tensors, Path], Path]


def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + dtype.itemsize)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def of(*dtypes: torch.dtype) -> Tensors:
    return {f"layer.{str(dtype).removeprefix('torch.')}.weight": bits((3, 5), dtype) for dtype in dtypes}


def shared() -> Tensors:
    base = torch.arange(24.0)
    return {"whole": base, "same": base, "part": base[10:12], "third": base[1::3], "grid": base.view(4, 6)}


# What a model may hold; each is written by itself, so that one that a format lacks does not hide another.
KINDS: dict[str, Callable[[], Tensors]] = {
    "float16, 32, 64": lambda: of(torch.float16, torch.float32, torch.float64),
    "bfloat16": lambda: of(torch.bfloat16),
    "float8": lambda: of(*FLOAT8),
    "complex64": lambda: of(torch.complex64),
    "complex128": lambda: of(torch.complex128),
    "int8 to 64, uint8": lambda: of(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
    "uint16, 32, 64": lambda: of(torch.uint16, torch.uint32, torch.uint64),
    "bool": lambda: of(torch.bool),
    "0-dim": lambda: {"scale": torch.tensor(-0.0), "count": torch.tensor(7)},
    "empty": lambda: {"rows": torch.zeros(0, 4), "columns": torch.zeros(4, 0), "flat": torch.zeros(0)},
    "non-contiguous": lambda: {
        "turned": bits((4, 6), torch.float32).t(),
        "skipped": bits((4, 6), torch.float32)[:, ::2],
    },
    "shared storage": shared,
    "NaN and inf": lambda: {
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "bits": bits((64,), torch.float32),
    },
    "any name": lambda: {
        "name with \u00e9 and \n": torch.arange(3),
        "<b>": torch.ones(2),
        "a.b.c.0": torch.zeros(2, 2),
    },
}


def write_safetensors(tensors: Tensors, path: Path) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


def write_shards(tensors: Tensors, path: Path) -> Path:
    path.mkdir()
    names = list(tensors)
    half = (len(names) + 1) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        if part:
            shard = f"model-0000{number}-of-00002.safetensors"
            safetensors.torch.save_file({name: tensors[name] for name in part}, path / shard)
            weight_map.update(dict.fromkeys(part, shard))
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def write_zip(tensors: Tensors, path: Path) -> Path:
    torch.save(tensors, path)
    return path


def write_legacy(tensors: Tensors, path: Path) -> Path:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def write_pickle(tensors: Tensors, path: Path) -> Path:
    path.write_bytes(pickle.dumps(tensors, protocol=4))
    return path


def write_tar(tensors: Tensors, path: Path) -> Path:
    """As torch wrote it before 0.2, which this torch cannot do any more."""
    storages, described = io.BytesIO(), io.BytesIO()
    keys = {tensor.untyped_storage().data_ptr() or id(tensor): tensor for tensor in tensors.values()}
    storages.write(pickle.dumps(len(keys), 2))
    for key, tensor in keys.items():
        if tensor.dtype not in OLD:
            raise TypeError("not in torch 0.1")
        raw = bytes(tensor.untyped_storage())
        storages.write(pickle.dumps((key, "cpu", OLD[tensor.dtype]), 2))
        storages.write(struct.pack("<q", len(raw) // tensor.itemsize) + raw)
    described.write(pickle.dumps(len(tensors), 2))
    for number, tensor in enumerate(tensors.values()):
        if not tensor.ndim:
            raise TypeError("not in torch 0.1")
        key = tensor.untyped_storage().data_ptr() or id(tensor)
        described.write(pickle.dumps((number, key, OLD[tensor.dtype]), 2))
        numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        described.write(struct.pack(f"<ii{len(numbers)}q", tensor.ndim, 0, *numbers))
    structure = io.BytesIO()

    class Old(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return str(obj.number) if isinstance(obj, Numbered) else None

    Old(structure, 2).dump({name: Numbered(number) for number, name in enumerate(tensors)})
    parts = {
        "sys_info": pickle.dumps({}, 2),
        "pickle": structure.getvalue(),
        "tensors": described.getvalue(),
        "storages": storages.getvalue() + pickle.dumps([], 2),
    }
    with tarfile.open(path, mode="w") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


class Numbered:
    """A tensor of a tar archive, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    name = str(tensor.dtype).removeprefix("torch.")
    if hasattr(ml_dtypes, name):
        return tensor.contiguous().view(torch.uint8).numpy().view(getattr(ml_dtypes, name))
    return tensor.resolve_conj().numpy()


def arrays(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array(tensor) for name, tensor in tensors.items()}


def write_npz(tensors: Tensors, path: Path) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays(tensors))
    return path


def write_packed_npz(tensors: Tensors, path: Path) -> Path:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays(tensors))
    return path


def write_object_npy(tensors: Tensors, path: Path) -> Path:
    with path.open("wb") as file:
        np.save(file, np.array(arrays(tensors), dtype=object), allow_pickle=True)
    return path


def write_npy_folder(tensors: Tensors, path: Path) -> Path:
    path.mkdir()
    for name, value in arrays(tensors).items():
        np.save(path / f"{name}.npy", value)
    return path


def write_numpy_pickle(tensors: Tensors, path: Path, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(arrays(tensors), protocol=protocol))
    return path


def write_numpy_pickle_5(tensors: Tensors, path: Path) -> Path:
    return write_numpy_pickle(tensors, path, 5)


def write_h5(tensors: Tensors, path: Path, **options: object) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, value in arrays(tensors).items():
            fits = options if value.ndim and value.size else {}
            file.create_dataset(name.replace(".", "/"), data=value, **fits)
    return path


def write_packed_h5(tensors: Tensors, path: Path) -> Path:
    return write_h5(tensors, path, chunks=True, compression="gzip", shuffle=True)


def write_dcp(tensors: Tensors, path: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), checkpoint_id=path, no_dist=True)
    return path


# The writer, what the checkpoint says it is, and the files as people know them.
FORMATS: dict[str, tuple[Write, str, str]] = {
    "safetensors": (write_safetensors, "safetensors", "`.safetensors`"),
    "safetensors, sharded": (write_shards, "safetensors, ", "`model.safetensors.index.json` and its shards"),
    "torch zip": (write_zip, "torch zip", "`.pt` `.pth` `.bin` `.ckpt` since torch 1.6"),
    "torch legacy": (write_legacy, "torch legacy", "the same before torch 1.6"),
    "torch tar": (write_tar, "torch tar", "the same before torch 0.2"),
    "torch DCP": (write_dcp, "torch DCP", "a folder with `.metadata` and `.distcp` files"),
    "pickled tensors": (write_pickle, "pickle", "`.pkl` of `pickle.dump`"),
    "numpy npz": (write_npz, "numpy npz", "`.npz` of `savez`"),
    "numpy npz, packed": (write_packed_npz, "numpy npz", "`.npz` of `savez_compressed`"),
    "numpy npy, a dict": (write_object_npy, "numpy npy", "`.npy` that holds a dict of arrays"),
    "numpy npy, a folder": (write_npy_folder, "folder of numpy npy, ", "a folder of `.npy` files"),
    "pickled arrays": (write_numpy_pickle, "pickle", "`.pkl`, protocol 2"),
    "pickled arrays, 5": (write_numpy_pickle_5, "pickle", "`.pkl`, protocol 5"),
    "HDF5": (write_h5, "HDF5", "`.h5` `.weights.h5`, and the one inside a `.keras`"),
    "HDF5, packed": (write_packed_h5, "HDF5", "the same in gzip chunks"),
    "memory": (lambda tensors, path: path, "memory", "a state dict, a module"),
}
INDEXES: list[Any] = [
    (slice(1, 2), slice(0, 3)),
    1,
    ...,
    (..., 2),
    slice(2, 2),
    (slice(None), slice(0, 4, 2)),
    (-1, -1),
]


def written(name: str, tensors: Tensors, folder: Path) -> Checkpoint | str:
    """The checkpoint, or why there is none: "no" if the format cannot hold them, "refused" if it does not say what it holds."""
    write, _, _ = FORMATS[name]
    if name == "memory":
        return open_checkpoint(tensors)
    try:
        path = write(tensors, folder / "weights.any")
    except (TypeError, ValueError, RuntimeError, KeyError, OSError, AttributeError):
        return "no"
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        if "numpy spells bfloat16" not in str(error):
            raise
        return "refused"


def check(checkpoint: Checkpoint, tensors: Tensors, name: str) -> None:
    """The protocol of a checkpoint, the same for all of them."""
    assert checkpoint.format.startswith(FORMATS[name][1])
    assert sorted(checkpoint.keys()) == sorted(tensors)
    assert len(checkpoint) == len(tensors)
    assert checkpoint.checkpoint_key is None
    assert checkpoint.notes == ()
    assert checkpoint.changed() is None
    assert checkpoint.bytes_read == 0
    digest = checkpoint.header_digest()
    for key, tensor in tensors.items():
        info = checkpoint.info(key)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.nbytes == tensor.numel() * tensor.element_size()
        assert same_bits(checkpoint.read(key).contiguous(), tensor.contiguous())
        if name not in {"memory"} and info.file >= 0 and info.nbytes:
            assert 0 <= info.offset < checkpoint.files[info.file].size
    assert checkpoint.bytes_read == sum(t.numel() * t.element_size() for t in tensors.values())
    for key, tensor in tensors.items():
        for index in INDEXES if tensor.ndim == 2 and tensor.numel() and min(tensor.shape) > 2 else [...]:
            before = checkpoint.bytes_read
            got = checkpoint.read(key, index)
            assert same_bits(got.contiguous(), tensor[index].contiguous())
            assert checkpoint.bytes_read - before == got.numel() * got.element_size()
    assert checkpoint.header_digest() == digest
    with pytest.raises(KeyError):
        checkpoint.read("no such key")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_holds_comes_back_bit_for_bit(name: str, kind: str, tmp_path: Path) -> None:
    tensors = KINDS[kind]()
    checkpoint = written(name, tensors, tmp_path)
    if isinstance(checkpoint, Checkpoint):
        check(checkpoint, tensors, name)


def measured() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for name in FORMATS:
        table[name] = {}
        for kind, make in KINDS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = written(name, make(), Path(folder))
                table[name][kind] = "yes" if isinstance(found, Checkpoint) else found
    return table


def page(table: dict[str, dict[str, str]]) -> str:
    lines = [
        "# Formats",
        "",
        "`open_checkpoint` and `load` tell a format by what is in the file, never by its name, and read names, shapes and",
        "dtypes without the tensors. No pickle is executed. What a format holds is measured by",
        "`tests/checkpoints/test_parity.py`, which writes tensors with the format's usual writer, reads them back and compares",
        "every bit; run as a program it makes this page: `python tests/checkpoints/test_parity.py`.",
        "",
        "| format | files |",
        "| --- | --- |",
        *(f"| {name} | {files} |" for name, (_, _, files) in FORMATS.items()),
        "",
        "*yes*: comes back bit for bit. *no*: the usual writer cannot write it. *refused*: it can be written, but the file",
        "does not say what it holds (numpy spells bfloat16 and float8 as raw bytes): an error, never a guess.",
        "",
        f"| format | {' | '.join(KINDS)} |",
        f"| --- | {' | '.join('---' for _ in KINDS)} |",
        *(f"| {name} | {' | '.join(cells[kind] for kind in KINDS)} |" for name, cells in table.items()),
        "",
        "safetensors writes only contiguous tensors that share no memory: `{k: v.contiguous().clone() for k, v in ...}`.",
        "torch 0.1 had neither booleans nor single numbers. HDF5 names tensors by groups: `a.b` and `a/b` are one key in it.",
    ]
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_the_measured_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(measured()), "run: python tests/checkpoints/test_parity.py"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "memory"])
def test_reading_never_writes_to_the_file_and_ignores_the_default_device(name: str, tmp_path: Path) -> None:
    checkpoint = written(name, {"a.weight": torch.arange(8.0), "a.bias": torch.ones(2)}, tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    before = [stamp.path.read_bytes() for stamp in checkpoint.files]

    with torch.device("meta"):
        tensor = checkpoint.read("a.weight")
    assert tensor.device.type == "cpu"
    tensor.fill_(7)

    assert [stamp.path.read_bytes() for stamp in checkpoint.files] == before
    assert checkpoint.changed() is None


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle])
def test_views_of_one_storage_keep_their_values(write: Write, tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "base": base,
        "transposed": base.view(4, 6).t(),
        "every third": base[1::3],
        "expanded": base[3:5].expand(4, 2),
        "part": base[10:12],
        "same": base,
    }
    checkpoint = open_checkpoint(write(tensors, tmp_path / "views.pt"))

    for key, tensor in tensors.items():
        assert same_bits(checkpoint.read(key).contiguous(), tensor.contiguous())
    assert torch.equal(checkpoint.read("transposed", (slice(1, 3), 2)), base.view(4, 6).t()[1:3, 2])


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_lazy_conjugates_and_negatives_are_resolved(write: Write, tmp_path: Path) -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    tensors = {"conj": value.conj(), "neg": value.clone().conj().imag, "plain": value}
    checkpoint = open_checkpoint(write(tensors, tmp_path / "lazy.pt"))

    assert torch.equal(checkpoint.read("conj"), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(checkpoint.read("neg"), torch.tensor([-2.0, 4.0]))
    assert torch.equal(checkpoint.read("plain"), value)


def test_two_files_are_told_apart_by_their_header(tmp_path: Path) -> None:
    write_safetensors({"w": torch.zeros(2)}, tmp_path / "a")
    write_safetensors({"w": torch.ones(2)}, tmp_path / "b")
    write_safetensors({"w": torch.zeros(3)}, tmp_path / "c")
    a, b, c = (open_checkpoint(tmp_path / name).header_digest() for name in "abc")
    assert a == b
    assert a != c


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = write_safetensors({"w": torch.zeros(100_000)}, tmp_path / "w.safetensors")
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="something is rewriting it"):
        checkpoint.read("w")
    assert "has 100 now" in (checkpoint.changed() or "")


if __name__ == "__main__":
    PAGE.write_text(page(measured()), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
