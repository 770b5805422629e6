"""Truncated and damaged files of every format: they open, or are refused with `CheckpointError`; nothing else happens."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import warmstart
from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.hdf5 import keras_file
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.checkpoints.windows import Window
from warmstart.errors import CheckpointError

MUTANTS = 2_000

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


def index_json() -> bytes:
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(WEIGHTS)}
    return json.dumps({"metadata": {"total_size": 90}, "weight_map": weight_map}, indent=1).encode()


def beside_index() -> dict[str, bytes]:
    weight_map = json.loads(index_json())["weight_map"]
    return {
        shard: safetensors.torch.save(
            {name: WEIGHTS[name].contiguous() for name in weight_map if weight_map[name] == shard}
        )
        for shard in set(weight_map.values())
    }


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
    "index": index_json,
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One of ten thousand ways to damage a file: bits, bytes, numbers, parts that are missing or there twice."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        position = rng.randrange(len(damaged))
        kind = rng.randrange(6)
        if kind == 0:
            damaged[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[position] = rng.randrange(256)
        elif kind == 2:
            damaged[position : position + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
        elif kind == 3:
            del damaged[position : position + rng.randrange(1, 9)]
        elif kind == 4:
            other = rng.randrange(len(damaged))
            damaged[position:position] = damaged[other : other + rng.randrange(1, 40)]
        else:
            number = re.compile(rb"\d+").search(damaged, position)
            if number is not None:
                damaged[number.start() : number.end()] = rng.choice(
                    (b"-1", b"0", b"1", b"18446744073709551616", b"1e9", b"[]")
                )
        if not damaged:
            break
    return bytes(damaged)


def read_all(checkpoint: Checkpoint) -> None:
    for key in checkpoint.keys():
        tensor = checkpoint.read(key)
        assert tensor.shape == checkpoint.info(key).shape
        if tensor.ndim:
            checkpoint.read(key, slice(0, 1))


def try_source(source: Path, opening: Callable[[Path], Checkpoint] = open_checkpoint) -> bool:
    """Open and read everything; whether that worked. Anything but `CheckpointError` is the test's failure."""
    try:
        read_all(opening(source))
    except CheckpointError as error:
        message = str(error)
        folder = source if source.is_dir() else source.parent
        assert str(folder) in message
        assert len(message) < 5000
        assert all(c.isprintable() or c == "\n" for c in message)
        return False
    return True


def try_all(data: bytes, path: Path) -> bool:
    path.write_bytes(data)
    return try_source(path)


def place(name: str, folder: Path) -> Path:
    """Where a file of this format goes, with what belongs beside it already there."""
    if name != "index":
        return folder / "w"
    for shard, data in beside_index().items():
        (folder / shard).write_bytes(data)
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_never_opens(name: str, tmp_path: Path) -> None:
    data = FORMATS[name]()
    path = place(name, tmp_path)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_opens_or_is_refused(name: str, tmp_path: Path) -> None:
    data = FORMATS[name]()
    path = place(name, tmp_path)
    rng = random.Random(name)
    refused = sum(not try_all(mutated(data, rng), path) for _ in range(MUTANTS))
    assert refused


@pytest.mark.slow
def test_a_damaged_folder_of_dcp_opens_or_is_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "d"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": dict(WEIGHTS), "optim": {"lr": 0.1}}, checkpoint_id=folder, no_dist=True)
    assert try_source(folder)
    rng = random.Random("dcp")
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    refused = 0
    for i in range(MUTANTS):
        path, data = list(files.items())[i % 2]
        path.write_bytes(mutated(data, rng))
        refused += not try_source(folder)
        path.write_bytes(data)
    assert refused


# A fork for each file: the library may crash, and then that is the answer.
WALKS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import hdf5_walk
answers = sys.argv[3]
for i, place in enumerate(sys.argv[4:]):
    start, size = map(int, place.split(":"))
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code)
        continue
    signal.alarm(20)
    os.dup2(os.open(f"{answers}/{i}", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    hdf5_walk.main(sys.argv[2], start, size)
    os._exit(0)
"""


def hdf5(version: str) -> bytes:
    h5py = pytest.importorskip("h5py")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=version) as file:
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"dense", b"conv"]
        layer = group.create_group("dense/dense")
        layer["kernel:0"] = np.arange(12, dtype="f4").reshape(3, 4)
        layer["bias:0"] = np.zeros(4, ">f8")
        packed = {"chunks": (7, 11), "compression": "gzip", "shuffle": True, "fletcher32": True}
        layer.create_dataset("packed", data=np.arange(1000, dtype="i4").reshape(20, 50), **packed)
        layer.create_dataset("growing", data=np.arange(30, dtype="i2"), maxshape=(None,), chunks=(8,))
        layer["scalar"] = np.float32(3)
        layer["empty"] = np.zeros((0, 3), "f4")
        layer["complex"] = np.ones(3, "c8")
        layer["bool"] = np.array([True, False])
        layer["text"] = "hello"
        file["soft"] = h5py.SoftLink("/model_weights")
        file["hard"] = group
    return buffer.getvalue()


def try_hdf5(mutants: list[bytes], folder: Path) -> list[int]:
    """How the walk over each file ended; each that gave an answer is opened and read by it."""
    whole = folder / "all"
    whole.write_bytes(b"".join(mutants))
    (folder / "answers").mkdir()
    starts = np.cumsum([0, *map(len, mutants)]).tolist()
    places = [f"{start}:{len(data)}" for start, data in zip(starts, mutants, strict=False)]
    walk = Path(keras_file.__file__).parent
    command = [sys.executable, "-c", WALKS, str(walk), str(whole), str(folder / "answers"), *places]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=True)
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(mutants)
    file = MappedFile(whole)
    for i, (start, data, code) in enumerate(zip(starts, mutants, codes, strict=False)):
        answer = (folder / "answers" / str(i)).read_bytes()

        def opening(path: Path, start: int = start, size: int = len(data), answer: bytes = answer) -> Checkpoint:
            return keras_file.checkpoint_of(Window(file, start, size), keras_file.read_answer(answer, str(path)))

        if code == 0:
            try_source(whole, opening)
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_a_damaged_hdf5_file_opens_or_is_refused(version: str, tmp_path: Path) -> None:
    data, rng = hdf5(version), random.Random(version)
    codes = try_hdf5([data, *(mutated(data, rng) for _ in range(MUTANTS // 2))], tmp_path)
    assert codes[0] == 0
    assert set(codes) <= {0, -6, -7, -8, -11, -14}  # crashed, or took too long: an error where it is opened


def no_bytes_for_a_chunk() -> bytes:
    # Reading it with h5py kills the process: HDF5 2.0 unpacks a chunk that its tree says has no bytes.
    data = bytearray(hdf5("earliest"))
    tree = data.index(b"TREE\x01\x00\x0f\x00")
    data[tree + 21 : tree + 25] = bytes(4)
    return bytes(data)


# Files on which something crashed once.
CORPUS: dict[str, Callable[[], bytes]] = {
    "a chunk of no bytes": no_bytes_for_a_chunk,
    "a header of no bytes": lambda: bytes(8) + safetensors_file()[8:],
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_file_that_crashed_something_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(CORPUS[name]())
    assert not try_source(path)


def pickle_of_archive(data: bytes) -> tuple[int, int]:
    start = data.index(b"\x80\x02")
    return start, data.index(b"PK", start)


def test_every_byte_of_a_structure_may_be_anything(tmp_path: Path) -> None:
    """The pickle of a torch archive and the header of a safetensors file, byte for byte."""
    path = tmp_path / "w"
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


def npz_of(names: list[bytes]) -> bytes:
    """An archive whose member names are these bytes, whatever they are."""
    plain = [b"n" * (len(name) - 1) + b"%d" % i for i, name in enumerate(names)]
    buffer = io.BytesIO()
    np.savez(buffer, **{name.decode(): np.ones(2) for name in plain})
    data = buffer.getvalue()
    for old, new in zip(plain, names, strict=True):
        data = data.replace(old + b".npy", new + b".npy")
    return data


def header(entries: bytes, body: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(entries)) + entries + body


def test_names_that_are_no_text_are_refused_or_kept_exactly(tmp_path: Path) -> None:
    path = tmp_path / "w"
    assert not try_all(header(b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), path)
    path.write_bytes(npz_of([b"\xff\xfe\xfd", b"\xc3\x28\x80"]))
    checkpoint = open_checkpoint(path)
    assert checkpoint.keys() == ("\udcff\udcfe\udcfd", "\udcc3(\udc80")
    assert len(checkpoint.header_digest()) == 64
    assert torch.equal(checkpoint.read("\udcff\udcfe\udcfd"), torch.ones(2, dtype=torch.float64))
    assert not try_all(npz_of([b"same", b"same"]), path)
    # A string of Python 2 need not be text in any encoding.
    raw = pickle.dumps({"\xffw": np.ones(2)}, protocol=2).replace(b"X\x03\0\0\0\xc3\xbfw", b"U\x02\xffw")
    path.write_bytes(raw)
    assert open_checkpoint(path).keys() == ("\udcffw",)


def test_a_name_of_an_hdf5_file_that_is_no_text(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file[b"\xff\xfe"] = np.ones(2)
        file["<script>\x1b[31m"] = np.ones(2)
    assert try_source(tmp_path / "w.h5")
    assert set(open_checkpoint(tmp_path / "w.h5").keys()) == {"\udcff\udcfe", "<script>\x1b[31m"}


@pytest.mark.parametrize(
    "numbers", [(-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)), (10**18, (2,), (1,)), (0, (2,), (10**18,))]
)
def test_a_tensor_of_a_pickle_that_lies_elsewhere(numbers: tuple[int, ...], tmp_path: Path) -> None:
    offset, shape, stride = numbers

    class Lying:
        def __reduce__(self) -> tuple[object, ...]:
            storage = torch.ones(8).untyped_storage()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, offset, shape, stride, False, OrderedDict())

    for new in (True, False):
        torch.save({"w": Lying()}, tmp_path / "w", _use_new_zipfile_serialization=new)
        assert not try_source(tmp_path / "w")
    assert re.search("negative|beyond|needs", refusal(tmp_path / "w"))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_hostile_names_stay_harmless(tmp_path: Path) -> None:
    names = [
        "<script>alert(1)</script>",
        "\x1b[31mred\x1b]0;title\x07",
        "a" * (1 << 20),
        "../../etc/passwd",
        "",
        ".",
        "\u202etxt",
    ]
    path = tmp_path / "w"
    for write in (torch.save, safetensors.torch.save_file):
        write({name: torch.ones(2) for name in names}, path)
        assert try_source(path)
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.keys()) == set(names)
        # The whole way to a message: every name is unexpected for this model.
        plan = warmstart.plan(torch.nn.Linear(2, 2), path)
        for text in (str(plan), str(plan.errors), repr(checkpoint)):
            assert "\x1b" not in text
            assert "\u202e" not in text
            assert len(text) < 20_000
