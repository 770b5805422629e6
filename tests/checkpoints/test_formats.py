"""One table of tensors through every format that can hold them: names, shapes, dtypes and bits come back as they were."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.tensors import same_bits

FLOATS = [torch.float64, torch.float32, torch.float16]
NUMPY_DTYPES = [
    *FLOATS,
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
ALL_DTYPES = [*NUMPY_DTYPES, torch.bfloat16, *FLOAT8]


def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + dtype.itemsize)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def table(dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    tensors = {f"layer.{str(dtype).removeprefix('torch.')}.weight": bits((3, 5), dtype) for dtype in dtypes}
    tensors["scalar"] = torch.tensor(-0.0)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["nan"] = torch.tensor([float("nan"), float("-inf")])
    tensors["name with \u00e9 and \n"] = torch.arange(3)
    tensors["deep"] = bits((2, 3, 4), torch.float32)
    return tensors


def save_zip(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path)


def save_legacy(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(pickle.dumps(tensors, protocol=4))


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(tensors, path)


def save_npz(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})


def save_packed_npz(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: tensor.numpy() for name, tensor in tensors.items()})


def save_object_npy(tensors: dict[str, Tensor], path: Path) -> None:
    content = np.array({name: tensor.numpy() for name, tensor in tensors.items()}, dtype=object)
    with path.open("wb") as file:
        np.save(file, content, allow_pickle=True)


def save_numpy_pickle(tensors: dict[str, Tensor], path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in tensors.items()}, protocol=protocol))


WITHOUT_C128 = [dtype for dtype in ALL_DTYPES if dtype != torch.complex128]

FORMATS: dict[str, tuple[Callable[[dict[str, Tensor], Path], None], list[torch.dtype], str]] = {
    "zip": (save_zip, ALL_DTYPES, "torch zip"),
    "legacy": (save_legacy, ALL_DTYPES, "torch legacy"),
    "pickled tensors": (save_pickle, ALL_DTYPES, "pickle"),
    "safetensors": (save_safetensors, WITHOUT_C128, "safetensors"),
    "npz": (save_npz, NUMPY_DTYPES, "numpy npz"),
    "packed npz": (save_packed_npz, NUMPY_DTYPES, "numpy npz"),
    "object npy": (save_object_npy, NUMPY_DTYPES, "numpy npy"),
    "pickle 2": (save_numpy_pickle, NUMPY_DTYPES, "pickle"),
    "pickle 5": (lambda tensors, path: save_numpy_pickle(tensors, path, 5), NUMPY_DTYPES, "pickle"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    save, dtypes, format_name = FORMATS[name]
    tensors = table(dtypes)
    path = tmp_path / "weights.any"
    save(tensors, path)

    checkpoint = open_checkpoint(path)

    assert checkpoint.format == format_name
    assert sorted(checkpoint.keys()) == sorted(tensors)
    assert checkpoint.checkpoint_key is None
    assert checkpoint.notes == ()
    assert checkpoint.location == str(path)
    assert checkpoint.bytes_read == 0
    for key, tensor in tensors.items():
        info = checkpoint.info(key)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.nbytes == tensor.numel() * tensor.element_size()
        assert same_bits(checkpoint.read(key), tensor)
    assert checkpoint.bytes_read == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_is_the_slice_and_costs_its_own_bytes(name: str, tmp_path: Path) -> None:
    save, dtypes, _ = FORMATS[name]
    tensors = table(dtypes)
    path = tmp_path / "weights.any"
    save(tensors, path)
    checkpoint = open_checkpoint(path)

    for index in [(slice(1, 2), slice(0, 3)), 1, ..., (..., 2), slice(2, 2), (slice(None), 1, slice(0, 4, 2))]:
        before = checkpoint.bytes_read
        got = checkpoint.read("deep", index)
        assert same_bits(got.contiguous(), tensors["deep"][index].contiguous())
        assert checkpoint.bytes_read - before == got.numel() * 4


@pytest.mark.parametrize("name", FORMATS)
def test_reading_never_writes_to_the_file_and_ignores_the_default_device(name: str, tmp_path: Path) -> None:
    save, _, _ = FORMATS[name]
    path = tmp_path / "weights.any"
    save({"a.weight": torch.arange(8.0), "a.bias": torch.ones(2)}, path)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)

    with torch.device("meta"):
        tensor = checkpoint.read("a.weight")
    assert tensor.device.type == "cpu"
    tensor.fill_(7)

    assert path.read_bytes() == before
    assert checkpoint.changed() is None


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
def test_views_of_one_storage_keep_their_values(
    save: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    base = torch.arange(24.0)
    tensors = {
        "base": base,
        "transposed": base.view(4, 6).t(),
        "every third": base[1::3],
        "expanded": base[3:5].expand(4, 2),
        "part": base[10:12],
        "same": base,
    }
    path = tmp_path / "views.pt"
    save(tensors, path)
    checkpoint = open_checkpoint(path)

    for key, tensor in tensors.items():
        assert same_bits(checkpoint.read(key).contiguous(), tensor.contiguous())
    assert torch.equal(checkpoint.read("transposed", (slice(1, 3), 2)), base.view(4, 6).t()[1:3, 2])


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_lazy_conjugates_and_negatives_are_resolved(
    save: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    path = tmp_path / "lazy.pt"
    save({"conj": value.conj(), "neg": value.clone().conj().imag, "plain": value}, path)
    checkpoint = open_checkpoint(path)

    assert torch.equal(checkpoint.read("conj"), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(checkpoint.read("neg"), torch.tensor([-2.0, 4.0]))
    assert torch.equal(checkpoint.read("plain"), value)


def test_two_files_are_told_apart_by_their_header(tmp_path: Path) -> None:
    save_safetensors({"w": torch.zeros(2)}, tmp_path / "a")
    save_safetensors({"w": torch.ones(2)}, tmp_path / "b")
    save_safetensors({"w": torch.zeros(3)}, tmp_path / "c")
    a, b, c = (open_checkpoint(tmp_path / name).header_digest() for name in "abc")
    assert a == b
    assert a != c


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_safetensors({"w": torch.zeros(100_000)}, path)
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="something is rewriting it"):
        checkpoint.read("w")
    assert "has 100 now" in (checkpoint.changed() or "")
