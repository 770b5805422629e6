"""Truncated and damaged files of every format: they open, or are refused with `CheckpointError`; nothing else happens."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError

FLIPS = 400

WEIGHTS = OrderedDict(
    (
        ("layer.weight", torch.arange(12.0).reshape(3, 4).t()),
        ("layer.bias", torch.ones(4, dtype=torch.bfloat16)),
        ("count", torch.tensor(3)),
        ("mask", torch.tensor([True, False])),
        ("empty", torch.zeros(0, 2)),
    )
)
ARRAYS = {name: tensor.float().numpy() for name, tensor in WEIGHTS.items()}


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS, "epoch": 3, "args": {"lr": 0.1}}, buffer)
    return buffer.getvalue()


def torch_legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def torch_tar() -> bytes:
    class Old(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return "1" if obj is ... else None

    storages = pickle.dumps(1, 2) + pickle.dumps((11, "cpu", torch.FloatStorage), 2) + struct.pack("<q6f", 6, *range(6))
    tensors = (
        pickle.dumps(1, 2) + pickle.dumps((1, 11, torch.FloatTensor), 2) + struct.pack("<ii5q", 2, 0, 2, 3, 3, 1, 0)
    )
    content = io.BytesIO()
    Old(content, 2).dump({"layer.weight": ...})
    parts = {
        "sys_info": pickle.dumps({}, 2),
        "pickle": content.getvalue(),
        "tensors": tensors,
        "storages": storages + pickle.dumps([], 2),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def safetensors_file() -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in WEIGHTS.items()}, {"format": "pt"})


def npz(packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, **ARRAYS)
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, ARRAYS["layer.weight"])
    return buffer.getvalue()


def object_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(ARRAYS, dtype=object), allow_pickle=True)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "torch zip": torch_zip,
    "torch legacy": torch_legacy,
    "torch tar": torch_tar,
    "safetensors": safetensors_file,
    "npz": npz,
    "packed npz": lambda: npz(packed=True),
    "npy": npy,
    "object npy": object_npy,
    "pickled arrays": lambda: pickle.dumps(ARRAYS, protocol=2),
    "pickled arrays 5": lambda: pickle.dumps(ARRAYS, protocol=5),
    "pickled tensors": lambda: pickle.dumps(dict(WEIGHTS), protocol=4),
}


def try_all(data: bytes, path: object) -> bool:
    """Open and read everything; whether that worked. Anything but `CheckpointError` is the test's failure."""
    with open(path, "wb") as file:  # type: ignore[call-overload]
        file.write(data)
    message = None
    try:
        checkpoint = open_checkpoint(path)  # type: ignore[arg-type]
        for key in checkpoint.keys():
            tensor = checkpoint.read(key)
            assert tensor.shape == checkpoint.info(key).shape
            if tensor.ndim:
                checkpoint.read(key, slice(0, 1))
    except CheckpointError as error:
        message = str(error)
    assert message is None or (str(path) in message and len(message) < 5000)
    return message is None


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_never_opens(name: str, tmp_path: object) -> None:
    data = FORMATS[name]()
    path = f"{tmp_path}/w"
    assert try_all(data, path)
    rng = random.Random(name)
    cuts = {
        *range(min(64, len(data))),
        *(rng.randrange(len(data)) for _ in range(150)),
        *range(len(data) - 24, len(data)),
    }
    # A tar archive ends in blocks of zeros that nobody needs.
    needed = len(data.rstrip(b"\0")) if name == "torch tar" else len(data)
    for cut in sorted(cuts):
        assert not try_all(data[:cut], path) or cut >= needed, cut


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_opens_or_is_refused(name: str, tmp_path: object) -> None:
    data = FORMATS[name]()
    rng = random.Random(name)
    refused = 0
    for _ in range(FLIPS):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            position = rng.randrange(len(damaged))
            kind = rng.randrange(5)
            if kind == 0:
                damaged[position] ^= 1 << rng.randrange(8)
            elif kind == 1:
                damaged[position] = rng.randrange(256)
            elif kind == 2:
                damaged[position : position + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
            elif kind == 3:
                del damaged[position : position + rng.randrange(1, 9)]
            else:
                other = rng.randrange(len(damaged))
                damaged[position:position] = damaged[other : other + rng.randrange(1, 40)]
        refused += not try_all(bytes(damaged), f"{tmp_path}/w")
    assert refused


def pickle_of_archive(data: bytes) -> tuple[int, int]:
    start = data.index(b"\x80\x02")
    return start, data.index(b"PK", start)


def test_every_byte_of_a_structure_may_be_anything(tmp_path: object) -> None:
    """The pickle of a torch archive and the header of a safetensors file, byte for byte."""
    path = f"{tmp_path}/w"
    rng = random.Random(0)
    data = torch_zip()
    for position in range(*pickle_of_archive(data)):
        damaged = bytearray(data)
        damaged[position] = rng.randrange(256)
        try_all(bytes(damaged), path)
    data = safetensors_file()
    for position in range(8 + int.from_bytes(data[:8], "little")):
        damaged = bytearray(data)
        damaged[position] = rng.randrange(256)
        try_all(bytes(damaged), path)
