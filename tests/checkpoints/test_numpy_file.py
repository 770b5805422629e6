from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

CODES = "?b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".replace("?", "? ").split()


def array(code: str, shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    return (np.arange(24).reshape(shape) % 7).astype(code)


def as_tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("=")))).reshape(value.shape)


def save(path: Path, value: object, **options: bool) -> Path:
    with path.open("wb") as file:
        np.save(file, value, **options)  # type: ignore[call-overload]
    return path


def objects(value: object) -> np.ndarray:
    holder = np.empty((), dtype=object)
    holder[()] = value
    return holder


@pytest.mark.parametrize("packed", [None, False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_dtype_byte_order_and_layout(packed: bool | None, order: str, tmp_path: Path) -> None:
    for code in CODES:
        for layout in "CF":
            value = np.array(array(code).astype(np.dtype(code).newbyteorder(order)), order=layout)
            path = tmp_path / "weights"
            with path.open("wb") as file:
                if packed is None:
                    np.save(file, value)
                else:
                    (np.savez_compressed if packed else np.savez)(file, weights=value)
            checkpoint = open_checkpoint(path)
            assert checkpoint.keys() == ("weights",)
            expected = as_tensor(value)
            assert same_bits(checkpoint.read("weights").contiguous(), expected)
            index = (1, slice(0, 2), slice(1, 4, 2))
            assert same_bits(checkpoint.read("weights", index).contiguous(), expected[index].contiguous())


def test_an_array_is_named_by_its_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "conv.weight.npy", np.ones(3, dtype=np.float32)))
    assert checkpoint.keys() == ("conv.weight",)
    assert checkpoint.format == "numpy npy"
    with pytest.raises(CheckpointError, match="holds one array and no trees"):
        open_checkpoint(tmp_path / "conv.weight.npy", checkpoint_key="model")


def test_stored_arrays_are_mapped_and_compressed_ones_unpacked(tmp_path: Path) -> None:
    value = np.arange(1000, dtype=np.float32)
    for name, write in (("stored", np.savez), ("packed", np.savez_compressed)):
        with (tmp_path / name).open("wb") as file:
            write(file, w=value)
    for name in ("stored", "packed"):
        checkpoint = open_checkpoint(tmp_path / name)
        tensor = checkpoint.read("w", slice(10, 20))
        assert torch.equal(tensor, torch.arange(10.0, 20.0))
        assert checkpoint.bytes_read == 40


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("V2", "numpy spells bfloat16 and float8 arrays of ml_dtypes as raw void"),
        (np.longdouble, "torch has no such dtype"),
        ("S3", "strings are no weights"),
        ("M8[s]", "dates and times are no weights"),
        ([("a", "f4"), ("b", "i4")], "a structured array"),
    ],
)
def test_a_dtype_that_torch_lacks_is_refused_with_the_reason(dtype: object, message: str, tmp_path: Path) -> None:
    save(tmp_path / "w.npy", np.zeros(2, dtype=dtype))  # type: ignore[call-overload]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "w.npy")


def test_strings_beside_weights_are_left_out_with_a_note(tmp_path: Path) -> None:
    for write in (np.savez, np.savez_compressed):
        with (tmp_path / "w.npz").open("wb") as file:
            write(file, w=np.ones(2), labels=np.array(["a", "b"]), when=np.zeros(1, dtype="M8[s]"))
        checkpoint = open_checkpoint(tmp_path / "w.npz")
        assert checkpoint.keys() == ("w",)
        assert checkpoint.notes == ("strings or dates were left out: 'labels', 'when'",)


def test_an_object_array_holds_a_dict_of_arrays(tmp_path: Path) -> None:
    content = {
        "conv": {"weight": array("f4"), "bias": np.float32(0.5)},
        "layer": [np.ones(2), np.zeros(3), {"w": np.arange(4)}],
        1: array("i8"),
        "big": array(">f4"),
        "fortran": np.asfortranarray(array("f8")),
        "label": "cat",
        "words": np.array(["a", "b"]),
    }
    checkpoint = open_checkpoint(save(tmp_path / "w.npy", content))
    expected = {
        "conv.weight": as_tensor(array("f4")),
        "conv.bias": torch.tensor(0.5),
        "layer.0": torch.ones(2, dtype=torch.float64),
        "layer.1": torch.zeros(3, dtype=torch.float64),
        "layer.2.w": torch.arange(4),
        "1": as_tensor(array("i8")),
        "big": as_tensor(array(">f4")),
        "fortran": as_tensor(array("f8")),
    }
    assert set(checkpoint.keys()) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(checkpoint.read(key).contiguous(), tensor)
    assert checkpoint.notes == (
        "1 entry is not a tensor and was left out: 'label'",
        "strings or dates were left out: 'words'",
    )


def test_a_list_of_arrays_is_spelled_by_number(tmp_path: Path) -> None:
    arrays = [np.ones((2, 2)), np.zeros(3)]
    for holder in (objects(arrays), np.array([*arrays, None], dtype=object)[:2]):
        checkpoint = open_checkpoint(save(tmp_path / "w.npy", holder))
        assert checkpoint.keys() == ("0", "1")
        assert torch.equal(checkpoint.read("1"), torch.zeros(3, dtype=torch.float64))


def test_objects_within_an_npz(tmp_path: Path) -> None:
    for write in (np.savez, np.savez_compressed):
        with (tmp_path / "w.npz").open("wb") as file:
            write(file, params=objects({"a": np.ones(2)}), w=np.zeros(3))
        assert set(open_checkpoint(tmp_path / "w.npz").keys()) == {"params.a", "w"}
        with (tmp_path / "w.npz").open("wb") as file:
            write(file, arr_0=objects(OrderedDict(a=np.ones(2))))
        assert open_checkpoint(tmp_path / "w.npz").keys() == ("a",)


@pytest.mark.parametrize("value", [3, "text", None, {1, 2}, np.ones(2)])
def test_any_other_object_is_refused(value: object, tmp_path: Path) -> None:
    save(tmp_path / "w.npy", objects(value))
    with pytest.raises(CheckpointError, match=r"neither a dict nor a list of arrays; save one: numpy.savez"):
        open_checkpoint(tmp_path / "w.npy")


def test_a_bfloat16_array_inside_a_pickle_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "w.npy", objects({"w": np.zeros(2, dtype="V2")}))
    with pytest.raises(CheckpointError, match="'w' has numpy dtype 'V2': numpy spells bfloat16"):
        open_checkpoint(tmp_path / "w.npy")


def test_a_pickle_of_arrays_as_detectron_writes_it(tmp_path: Path) -> None:
    content = {"model": {"conv.weight": array("f4"), "bn.mean": np.float64(3)}, "__author__": "someone"}
    for protocol in (2, 3, 4, 5):
        (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        checkpoint = open_checkpoint(tmp_path / "R-50.pkl")
        assert checkpoint.checkpoint_key == "model"
        assert same_bits(checkpoint.read("conv.weight"), as_tensor(array("f4")))
        assert same_bits(checkpoint.read("bn.mean"), torch.tensor(3.0, dtype=torch.float64))


def test_arrays_that_python_2_pickled(tmp_path: Path) -> None:
    # numpy.core.multiarray._reconstruct with the raw bytes as a Python 2 string, which need not be valid UTF-8.
    raw = struct.pack("<3f", 1.0, -2.5, 3e38)
    stream = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x0c" + raw + b"tbs."
    )
    (tmp_path / "w.pkl").write_bytes(stream)
    assert same_bits(open_checkpoint(tmp_path / "w.pkl").read("w"), torch.tensor([1.0, -2.5, 3e38]))


def test_truncation_says_expected_and_actual(tmp_path: Path) -> None:
    raw = save(tmp_path / "w.npy", np.zeros(100)).read_bytes()
    (tmp_path / "w.npy").write_bytes(raw[:-8])
    with pytest.raises(
        CheckpointError, match=f"truncated: expected {len(raw)} bytes for shape .* there are {len(raw) - 8}"
    ):
        open_checkpoint(tmp_path / "w.npy")
    (tmp_path / "w.npy").write_bytes(raw + b"x")
    with pytest.raises(CheckpointError, match=f"damaged: expected {len(raw)} bytes"):
        open_checkpoint(tmp_path / "w.npy")
    (tmp_path / "w.npy").write_bytes(raw[:50])
    with pytest.raises(CheckpointError, match="truncated: expected 128 bytes of npy header, there are 50"):
        open_checkpoint(tmp_path / "w.npy")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False}", "it does not have exactly descr, fortran_order and shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "its shape is not a tuple of possible sizes"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': [1]}", "its shape is not a tuple of possible sizes"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (10**3,)}", "no dictionary"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000000,)}", "truncated: expected 400,000,000"),
        ("{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}", "an order that is neither True nor False"),
        ("{'descr': 'f4,f4', 'fortran_order': False, 'shape': (1,)}", "not one plain type"),
        ("{'descr': 'f3', 'fortran_order': False, 'shape': (1,)}", "torch has no such dtype"),
        ("__import__('os').getcwd()", "no dictionary"),
        ("(" * 5000, "no dictionary"),
        ("", "no dictionary"),
    ],
)
def test_a_damaged_header(header: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(4))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(path)


def test_a_damaged_version_or_length(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    path.write_bytes(b"\x93NUMPY\x09\x00" + bytes(100))
    with pytest.raises(CheckpointError, match=r"version 9.0 is none that numpy writes"):
        open_checkpoint(path)
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + bytes(100))
    with pytest.raises(CheckpointError, match="it claims 2,147,483,648 bytes; at most 10,000 are read"):
        open_checkpoint(path)
    path.write_bytes(b"\x93NUM")
    with pytest.raises(CheckpointError, match="an unknown format"):
        open_checkpoint(path)


def test_damaged_compression_is_found(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    generator = np.random.default_rng(0)
    np.savez_compressed(buffer, w=generator.standard_normal(20_000))
    raw = bytearray(buffer.getvalue())
    raw[len(raw) // 2] ^= 0xFF
    (tmp_path / "w.npz").write_bytes(raw)
    checkpoint = open_checkpoint(tmp_path / "w.npz")
    with pytest.raises(CheckpointError, match=r"member 'w.npy' (has another checksum|cannot be unpacked|unpacks to)"):
        checkpoint.read("w")


def test_an_npz_must_hold_arrays_only(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", b"no array")
    with pytest.raises(CheckpointError, match=r"'a.npy': damaged npy header"):
        open_checkpoint(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.txt", b"no array")
    with pytest.raises(CheckpointError, match=r"a zip archive of neither torch nor numpy: it holds 'a.txt'"):
        open_checkpoint(tmp_path / "w.npz")
