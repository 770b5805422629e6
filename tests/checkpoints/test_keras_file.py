"""HDF5: files that Keras itself wrote, and files with every layout, filter and dtype that h5py can write."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.hdf5 import hdf5_chunks, keras_file
from warmstart.checkpoints.hdf5.keras_file import open_h5
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

h5py = pytest.importorskip("h5py")

KERAS = """
import sys, warnings
warnings.simplefilter("ignore")
import keras, numpy as np
folder = sys.argv[1]
model = keras.Sequential([
    keras.Input((4, 4, 1)), keras.layers.Conv2D(3, 2, name="conv"), keras.layers.BatchNormalization(name="norm"),
    keras.layers.Flatten(), keras.layers.Dense(2, name="model"),
])
model.compile("adam", "mse")
model.fit(np.ones((8, 4, 4, 1), "f4"), np.ones((8, 2), "f4"), verbose=0)
model.save(f"{folder}/m.keras"); model.save_weights(f"{folder}/m.weights.h5"); model.save(f"{folder}/m.h5")
np.savez(f"{folder}/values.npz", **{f"{w.path}": np.asarray(w.numpy()) for w in model.weights})
"""


def as_tensor(value: object) -> Tensor:
    array = np.asarray(value)
    return torch.from_numpy(np.array(array.astype(array.dtype.newbyteorder("="))))


def writing(path: Path, fill: Callable[[object], None]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file)
    return path


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("needs keras")
    folder = tmp_path_factory.mktemp("keras")
    done = subprocess.run(
        [sys.executable, "-c", KERAS, str(folder)],
        env={**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_files_that_keras_3_wrote(name: str, keras_files: Path) -> None:
    checkpoint = open_checkpoint(keras_files / name)
    values = np.load(keras_files / "values.npz")
    order = {"conv": ["kernel", "bias"], "norm": ["gamma", "beta", "moving_mean", "moving_variance"]}
    layers = {"conv2d": order["conv"], "batch_normalization": order["norm"], "dense": ["kernel", "bias"]}
    names = dict(zip(layers, ("conv", "norm", "model"), strict=True))
    assert set(checkpoint.keys()) == {f"layers.{x}.vars.{i}" for x, parts in layers.items() for i in range(len(parts))}
    assert checkpoint.notes == ("an optimizer's state was left out: 'optimizer'",)
    assert checkpoint.format == ("Keras archive" if name == "m.keras" else "HDF5")
    for layer, parts in layers.items():
        for i, part in enumerate(parts):
            (value,) = (values[k] for k in values if k.endswith(f"{names[layer]}/{part}"))
            assert same_bits(checkpoint.read(f"layers.{layer}.vars.{i}").contiguous(), as_tensor(value))
    assert torch.equal(
        checkpoint.read("layers.dense.vars.0", (slice(1, 3), 0)), checkpoint.read("layers.dense.vars.0")[1:3, 0]
    )


def test_a_file_of_keras_2_s_layout(keras_files: Path) -> None:
    checkpoint = open_checkpoint(keras_files / "m.h5")
    values = np.load(keras_files / "values.npz")
    assert len(checkpoint) == len(values.files)
    assert checkpoint.notes == ("an optimizer's state was left out: 'optimizer_weights'",)
    kernel = next(key for key in checkpoint.keys() if key.startswith("model_weights.conv.") and key.endswith("kernel"))
    (value,) = (values[k] for k in values if k.endswith("conv/kernel"))
    assert same_bits(checkpoint.read(kernel), as_tensor(value))
    inside = open_checkpoint(keras_files / "m.h5", checkpoint_key="model_weights")
    assert [f"model_weights.{key}" for key in inside.keys()] == list(checkpoint.keys())
    with pytest.raises(CheckpointError, match="'optimizer_weights' is an optimizer's state"):
        open_checkpoint(keras_files / "m.h5", checkpoint_key="optimizer_weights")
    with pytest.raises(CheckpointError, match=r"there is no tree 'model_weight'.*did you mean 'model_weights'"):
        open_checkpoint(keras_files / "m.h5", checkpoint_key="model_weight")


PACKINGS: dict[str, dict[str, object]] = {
    "in one place": {},
    "in chunks": {"chunks": (3, 4)},
    "packed": {"chunks": (3, 4), "compression": "gzip"},
    "packed by bytes": {"chunks": (3, 4), "compression": "gzip", "shuffle": True},
    "summed": {"chunks": (3, 4), "fletcher32": True},
    "all of it": {"chunks": (3, 4), "compression": "gzip", "shuffle": True, "fletcher32": True},
    "one chunk": {"chunks": (7, 9), "compression": "gzip"},
    "growing": {"chunks": (2, 5), "maxshape": (None, 9)},
}


@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_layout_and_number_reads_the_same(packing: str, version: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    codes = ["<f4", ">f4", ">f8", "<f2", "i1", "u1", ">u2", "<i8", "<c8", ">c16", "?"]
    arrays = {code: (generator.standard_normal((7, 9)) * 50).astype(code) for code in codes}
    with h5py.File(tmp_path / "w.h5", "w", libver=version) as file:
        for i, array in enumerate(arrays.values()):
            file.create_dataset(f"g{i}/w:0", data=array, **PACKINGS[packing])
    checkpoint = open_h5(tmp_path / "w.h5")
    for i, array in enumerate(arrays.values()):
        key, expected = f"g{i}.w:0", as_tensor(array)
        assert checkpoint.info(key).shape == (7, 9)
        assert same_bits(checkpoint.read(key).contiguous(), expected)
        for index in [(slice(1, 5), slice(2, 8, 3)), 3, (..., -1), (slice(6, None), 0), slice(2, 2), ...]:
            before = checkpoint.bytes_read
            assert torch.equal(checkpoint.read(key, index), expected[index])
            assert checkpoint.bytes_read - before == expected[index].numel() * expected.itemsize


def test_small_empty_single_and_unwritten_datasets(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        file["single"] = np.float32(3)
        file["none"] = np.zeros((0, 3), ">f4")
        file.create_dataset("unwritten", (2, 3), ">f4", fillvalue=2.5)
        sparse = file.create_dataset("sparse", (10, 10), "i4", chunks=(4, 4), fillvalue=-1)
        sparse[3:5, 8] = 7
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((5,))
        compact = h5py.h5d.create(file.id, b"compact", h5py.h5t.STD_I32BE, space, plist)
        compact.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(5, dtype=">i4"))

    checkpoint = open_h5(writing(tmp_path / "w.h5", fill))
    sparse = torch.full((10, 10), -1, dtype=torch.int32)
    sparse[3:5, 8] = 7
    expected = {
        "single": torch.tensor(3.0),
        "none": torch.zeros(0, 3),
        "unwritten": torch.full((2, 3), 2.5),
        "sparse": sparse,
        "compact": torch.arange(5, dtype=torch.int32),
    }
    assert set(checkpoint.keys()) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(checkpoint.read(key), tensor)
    assert torch.equal(checkpoint.read("sparse", (slice(None), 8)), sparse[:, 8])


def test_links_within_the_file_are_names_and_loops_end(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        file["a/w"] = np.arange(3.0)
        file["a/loop"] = file["a"]
        file["soft"] = h5py.SoftLink("/a")
        file["a/near"] = h5py.SoftLink("w")
        file["hard"] = file["a/w"]

    checkpoint = open_h5(writing(tmp_path / "w.h5", fill))
    assert set(checkpoint.keys()) == {"a.w", "a.near", "soft.w", "hard"}
    assert torch.equal(checkpoint.read("soft.w"), checkpoint.read("a.near"))


def test_strings_are_left_out_and_nothing_else_is(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        file["w"] = np.ones(2)
        file["label"] = "cat"
        file["labels"] = np.array([b"a", b"bc"])
        file["nothing"] = h5py.Empty("f4")

    checkpoint = open_h5(writing(tmp_path / "w.h5", fill))
    assert checkpoint.keys() == ("w",)
    assert checkpoint.notes == ("3 entries are not tensors and were left out: 'label', 'labels', 'nothing'",)


def other_float(file: object) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 23, 8, 16, 7)
    kind.set_size(4)
    h5py.h5d.create(file.id, b"w", kind, h5py.h5s.create_simple((3,)))


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda f: f.__setitem__("w", np.ones(2, dtype="V2")), "'w' is of an opaque type: numpy spells bfloat16"),
        (lambda f: f.__setitem__("w", np.ones(2, dtype=[("a", "f4"), ("b", "i4")])), "no plain numbers"),
        (lambda f: f.__setitem__("w", np.ones(2, dtype=np.longdouble)), "torch has no such dtype"),
        (other_float, "'w' is of a number type of its own, which h5py reads as float32"),
        (lambda f: f.create_dataset("w", (2,), dtype=h5py.vlen_dtype("f4")), "no plain numbers"),
        (lambda f: f.create_dataset("w", data=np.ones((4, 4)), compression="lzf"), r"\(filter 32000\).*h5repack"),
        (lambda f: f.create_dataset("w", data=np.ones((4, 4), "i4"), scaleoffset=0), r"\(filter 6\)"),
        (lambda f: f.__setitem__("w", h5py.ExternalLink("other.h5", "/w")), "link to another file, 'other.h5'"),
        (lambda f: f.__setitem__("w", h5py.SoftLink("/gone")), "link to '/gone', which does not lie in the file"),
        (lambda f: f.create_dataset("w", (2,), "f4", external=[("/etc/passwd", 0, 8)]), "layout 'external'"),
        (lambda f: f.create_group("w"), "an HDF5 file without datasets"),
        (
            lambda f: f.create_dataset("w", (10**9, 10**9), "f4", chunks=(10, 10)),
            "a dataset whose sizes are beyond all use",
        ),
        (lambda f: f.create_dataset("w", (10**12,), "f4"), "claims 4,000,000,000,000 bytes"),
        (lambda f: (f.__setitem__("a/b", np.ones(1)), f.__setitem__("a.b", np.ones(1))), "both spelled 'a.b'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    fill: Callable[[object], None], message: str, tmp_path: Path
) -> None:
    path = writing(tmp_path / "w.h5", fill)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_h5(path)
    assert str(path) in str(caught.value)


def test_virtual_datasets_are_refused(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource("other.h5", "w", (4,))
        file.create_virtual_dataset("w", layout)

    with pytest.raises(CheckpointError, match="layout 'virtual', whose data lies elsewhere"):
        open_h5(writing(tmp_path / "w.h5", fill))


def test_the_optimizer_s_part_may_hold_anything(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        file["w"] = np.ones(2)
        file["optimizer/m"] = np.ones(2, dtype="V2")

    assert open_h5(writing(tmp_path / "w.h5", fill)).keys() == ("w",)


@pytest.mark.parametrize("packing", ["packed", "summed", "all of it"])
def test_damaged_chunks_are_found_when_they_are_read(packing: str, tmp_path: Path) -> None:
    value = np.random.default_rng(0).standard_normal((30, 30))
    kw = {**PACKINGS[packing], "chunks": (30, 30)}
    path = writing(tmp_path / "w.h5", lambda file: file.create_dataset("w", data=value, **kw))
    place = open_h5(path).info("w").offset
    raw = bytearray(path.read_bytes())
    raw[place + 1000] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"damaged HDF5 file: the chunk at \(0, 0\) .*(unpacked|checksum)"):
        open_h5(path).read("w")


def test_the_checksum_is_the_library_s(tmp_path: Path) -> None:
    # Sums modulo 65535 of ones: the words that fold to zero are where implementations differ.
    for value in (np.full(64, -1, "i2"), np.zeros(64, "i2"), np.arange(65, dtype="i1")):
        path = tmp_path / "w.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("w", data=value, chunks=value.shape, fletcher32=True)
        assert torch.equal(open_h5(path).read("w"), torch.from_numpy(value))
    assert hdf5_chunks.fletcher32(b"\x01\x00\x00\x02") == (0x102, 0x202)


def test_truncated_and_shrinking_files(tmp_path: Path) -> None:
    path = writing(tmp_path / "w.h5", lambda file: file.__setitem__("w", np.ones(100_000)))
    raw = path.read_bytes()
    checkpoint = open_h5(path)
    os.truncate(path, 3000)
    with pytest.raises(CheckpointError, match="something is rewriting it"):
        checkpoint.read("w")
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match=r"the HDF5 library says.*truncated"):
        open_h5(path)


def test_the_library_crashing_or_hanging_is_an_error_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = writing(tmp_path / "w.h5", lambda file: file.__setitem__("w", np.ones(3)))
    program = tmp_path / "walk.py"
    monkeypatch.setattr(keras_file, "_WALK", program)
    monkeypatch.setattr(keras_file, "SECONDS", 1)
    for text, message in {
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "crashes over it (signal 11)",
        "import time; time.sleep(60)": "did not come to an end within 1 s",
        "print('no json')": "cannot be told",
        'print(\'{"error": "OSError: no"}\')': "the HDF5 library says 'OSError: no'",
        "raise ImportError('libhdf5.so')": "h5py does not run ('ImportError: libhdf5.so'); install it anew: pip install",
    }.items():
        program.write_text(text)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            open_h5(path)


def test_without_h5py_the_line_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = writing(tmp_path / "w.h5", lambda file: file.__setitem__("w", np.ones(3)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=re.escape("install it: pip install 'warmstart[keras]'")):
        open_checkpoint(path)


def test_h5py_is_not_imported_here() -> None:
    program = (
        "import sys, warmstart\nfrom warmstart.checkpoints.hdf5.keras_file import open_h5\n"
        "print([m for m in ('h5py', 'torch.distributed.checkpoint') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_an_archive_of_keras_that_is_packed_or_damaged(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["layers/dense/vars/0"] = np.arange(6, dtype="f4").reshape(2, 3)
        file["layers/dense/vars/1"] = np.arange(3, dtype="f4")
    path = tmp_path / "m.keras"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("config.json", "{}")
            archive.writestr("model.weights.h5", buffer.getvalue())
        if method == zipfile.ZIP_STORED:
            checkpoint = open_checkpoint(path)
            assert torch.equal(checkpoint.read("layers.dense.vars.0", 1), torch.tensor([3.0, 4.0, 5.0]))
            place = checkpoint.info("layers.dense.vars.1").offset
            assert np.frombuffer(path.read_bytes()[place : place + 12], "f4").tolist() == [0, 1, 2]
        else:
            with pytest.raises(CheckpointError, match=re.escape("unzip m.keras model.weights.h5")):
                open_checkpoint(path)


def test_the_answer_is_checked_against_the_file(tmp_path: Path) -> None:
    path = writing(tmp_path / "w.h5", lambda file: file.create_dataset("w", data=np.ones((4, 4)), chunks=(2, 2)))
    file = MappedFile(path)
    answer = keras_file.inventory(file)
    (dataset,) = answer["datasets"]
    for change in (
        {"stored": [0, 0, 0, file.size - 8, 32]},
        {"stored": [0, 0, 0, 64, 32] * 2},
        {"stored": [1, 0, 0, 64, 32]},
        {"stored": [8, 0, 0, 64, 32]},
        {"stored": [0, 0, 0, 64, 16]},
        {"stored": [0, 0, 0, -64, 32]},
        {"stored": [0, 0]},
        {"chunk": [0, 2]},
        {"layout": "contiguous", "at": file.size - 8, "size": 128},
        {"layout": "contiguous", "at": 64, "size": 120},
        {"layout": "compact", "data": "AAAA"},
    ):
        with pytest.raises(CheckpointError, match="damaged HDF5 file"):
            keras_file.checkpoint_of(file, {**answer, "datasets": [{**dataset, **change}]})


def test_tensorflow_s_own_checkpoints_say_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt.index").write_bytes(bytes(40) + bytes.fromhex("57fb808b247547db"))
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(b"\x01\x02" * 100)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    prefix = str(tmp_path / "model.ckpt")
    for path in (prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001", tmp_path / "checkpoint", tmp_path):
        with pytest.raises(CheckpointError, match="a TensorFlow checkpoint") as caught:
            open_checkpoint(path)
        assert f"load_checkpoint({prefix!r})" in str(caught.value)
