from __future__ import annotations

import io
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "b.weight": torch.tensor([7, 8])}


def same(path: Path, weights: dict[str, torch.Tensor], key: str | None = None) -> None:
    checkpoint = open_checkpoint(path, checkpoint_key=key)
    assert list(checkpoint.keys()) == list(weights)
    for name, tensor in weights.items():
        assert same_bits(checkpoint.read(name), tensor)


def rewrite(path: Path, change: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(content)).split("/")[0]
    for name, data in change.items():
        content[f"{folder}/{name}"] = data if data is not None else b""
        if data is None:
            del content[f"{folder}/{name}"]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("legacy", [False, True])
def test_versions_of_a_state_dict_survive(legacy: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert checkpoint.versions == {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 2}}
    assert same_bits(checkpoint.read("1.num_batches_tracked"), torch.tensor(0))


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_are_read_as_tensors(legacy: bool, tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    parameter.tag = "kept"  # type: ignore[attr-defined]
    torch.save(
        {"w": parameter, "v": nn.Buffer(torch.ones(1))}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy
    )
    same(tmp_path / "w.pt", {"w": torch.arange(3.0), "v": torch.ones(1)})


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_module_saved_whole_is_its_state_dict(legacy: bool, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("kept", torch.arange(2))
            self.register_buffer("left_out", torch.arange(5), persistent=False)
            self.nothing = None

    Net.__module__, Net.__qualname__ = "not_installed", "Net"
    sys.modules["not_installed"] = module = types.ModuleType("not_installed")
    module.Net = Net  # type: ignore[attr-defined]
    net = Net()
    try:
        torch.save(net, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
        torch.save({"epoch": 3, "model": net}, tmp_path / "dict.pt", _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules["not_installed"]

    expected = dict(net.state_dict())
    for name, key in (("net.pt", None), ("dict.pt", "model")):
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.checkpoint_key == key
        assert set(checkpoint.keys()) == set(expected)
        for name, tensor in expected.items():
            assert same_bits(checkpoint.read(name), tensor)
        assert checkpoint.notes[0].startswith("4 classes were not built: not_installed.Net, torch.nn.modules.")


def lightning_content() -> dict[str, object]:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    module = types.ModuleType("gone_package")
    config = type("Config", (), {"__module__": "gone_package"})
    module.Config = config  # type: ignore[attr-defined]
    sys.modules["gone_package"] = module
    settings = config()
    settings.width, settings.parent, settings.table = 3, settings, torch.ones(4, 4)
    return {
        "epoch": 4,
        "global_step": 100,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict((f"net.{name}", value.detach().clone()) for name, value in model.named_parameters()),
        "loops": {"fit_loop": {"state_dict": {}, "best": torch.tensor(3)}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "best_k_models": {}}
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [0.1], "last": torch.zeros(2)}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": settings, "weight": torch.ones(3)},
        "best_loss": torch.tensor(0.25),
    }


def test_a_lightning_checkpoint_of_a_package_that_is_not_installed(tmp_path: Path) -> None:
    content = lightning_content()
    try:
        torch.save(content, tmp_path / "last.ckpt")
    finally:
        del sys.modules["gone_package"]

    checkpoint = open_checkpoint(tmp_path / "last.ckpt")

    assert checkpoint.checkpoint_key == "state_dict"
    assert checkpoint.keys() == ("net.weight", "net.bias")
    weights = content["state_dict"]
    assert isinstance(weights, dict)
    for name, tensor in weights.items():
        assert same_bits(checkpoint.read(name), tensor)
    assert checkpoint.notes == (
        "1 class was not built: gone_package.Config",
        "single numbers beside the tree were left out: 'best_loss'",
        "an optimizer's state was left out: 'optimizer_states'",
        "not weights by their name, left out: 'loops', 'callbacks', 'lr_schedulers', ...",
    )
    assert "gone_package" not in sys.modules


def test_storages_saved_on_cuda_are_read_on_the_cpu(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    cuda = raw.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0").replace(b"ctorch\n", b"ctorch.cuda\n")
    assert cuda.count(b"cuda:0") == 1
    (tmp_path / "cuda.pt").write_bytes(cuda)
    same(tmp_path / "cuda.pt", WEIGHTS)

    torch.save(WEIGHTS, tmp_path / "cuda_zip.pt")
    with zipfile.ZipFile(tmp_path / "cuda_zip.pt") as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    rewrite(tmp_path / "cuda_zip.pt", {"data.pkl": data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")})
    same(tmp_path / "cuda_zip.pt", WEIGHTS)


def test_a_big_endian_file_is_swapped(tmp_path: Path) -> None:
    values = {"w": torch.tensor([1.0, -2.5]), "h": torch.tensor([3], dtype=torch.int16), "c": torch.tensor([1 + 2j])}
    torch.save(values, tmp_path / "w.pt")
    swapped = {
        "byteorder": b"big",
        "data/0": struct.pack(">2f", 1.0, -2.5),
        "data/1": struct.pack(">h", 3),
        "data/2": struct.pack(">2f", 1, 2),
    }
    rewrite(tmp_path / "w.pt", swapped)
    same(tmp_path / "w.pt", values)
    rewrite(tmp_path / "w.pt", {"byteorder": b"middle"})
    with pytest.raises(CheckpointError, match="the byte order b'middle' is neither little nor big"):
        open_checkpoint(tmp_path / "w.pt")


def test_a_legacy_big_endian_file_is_swapped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.tensor([1.0, -2.5])}, buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue().replace(struct.pack("<2f", 1.0, -2.5), struct.pack(">2f", 1.0, -2.5))
    at = raw.index(b"little_endian") + len(b"little_endian")
    at = raw.index(b"\x88", at)
    (tmp_path / "w.pt").write_bytes(raw[:at] + b"\x89" + raw[at + 1 :])
    same(tmp_path / "w.pt", {"w": torch.tensor([1.0, -2.5])})


def legacy_storage_views(path: Path) -> None:
    """As torch before 0.4 wrote a storage that is part of another."""

    class Torch04(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            if isinstance(obj, tuple) and obj and obj[0] == "view":
                return ("storage", torch.FloatStorage, "77", "cpu", 6, ("78", 2, 4))
            if isinstance(obj, tuple) and obj and obj[0] == "root":
                return ("storage", torch.FloatStorage, "77", "cpu", 6, None)
            return None

    class Rebuild:
        def __init__(self, *args: object) -> None:
            self.args = args

        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return torch._utils._rebuild_tensor, self.args

    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}):
            pickle.dump(value, file, protocol=2)
        content = {"view": Rebuild(("view",), 1, (3,), (1,)), "root": Rebuild(("root",), 0, (2, 3), (3, 1))}
        Torch04(file, protocol=2).dump(content)
        pickle.dump(["77"], file, protocol=2)
        file.write(struct.pack("<q6f", 6, *range(6)))


def test_storages_that_are_part_of_another(tmp_path: Path) -> None:
    legacy_storage_views(tmp_path / "old.pt")
    same(tmp_path / "old.pt", {"view": torch.arange(3.0, 6.0), "root": torch.arange(6.0).reshape(2, 3)})


def write_tar(path: Path, *, offset: int = 0) -> None:
    """As torch 0.1 wrote files: storages with their bytes, tensors that name them, and a pickle that names those."""

    class Old(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return str(obj[1]) if isinstance(obj, tuple) and obj and obj[0] == "tensor" else None

    def dumps(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)

    storages = dumps(2) + dumps((11, "cpu", torch.FloatStorage)) + struct.pack("<q6f", 6, *range(6))
    storages += dumps((12, "cuda:0", torch.LongStorage)) + struct.pack("<q2q", 2, 7, 8) + dumps([(13, 11, 2, 3)])
    tensors = dumps(3)
    for key, storage, shape, stride, start in (
        (1, 11, (2, 3), (1, 2), 0),
        (2, 12, (2,), (1,), 0),
        (3, 13, (2,), (1,), 1),
    ):
        tensors += dumps((key, storage, torch.FloatTensor)) + struct.pack("<ii", len(shape), 0)
        tensors += struct.pack(f"<{2 * len(shape) + 1}q", *shape, *stride, start + offset)
    stream = io.BytesIO()
    Old(stream, protocol=2).dump(OrderedDict([("w", ("tensor", 1)), ("n", ("tensor", 2)), ("v", ("tensor", 3))]))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        parts = {"sys_info": dumps({"little_endian": True}), "pickle": stream.getvalue(), "tensors": tensors}
        for name, data in {**parts, "storages": storages}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_tar_of_the_first_torch(tmp_path: Path) -> None:
    write_tar(tmp_path / "old.pt")
    w = torch.arange(6.0).as_strided((2, 3), (1, 2)).contiguous()
    checkpoint = open_checkpoint(tmp_path / "old.pt")
    assert checkpoint.format == "torch tar"
    assert checkpoint.keys() == ("w", "n", "v")
    assert same_bits(checkpoint.read("w").contiguous(), w)
    assert same_bits(checkpoint.read("n"), torch.tensor([7, 8]))
    assert same_bits(checkpoint.read("v"), torch.tensor([3.0, 4.0]))

    write_tar(tmp_path / "old.pt", offset=1)
    with pytest.raises(CheckpointError, match=r"'w'.*needs 28 bytes and its storage has 24"):
        open_checkpoint(tmp_path / "old.pt")


def test_a_truncated_file_says_what_it_expected(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    (tmp_path / "w.pt").write_bytes(raw[:-5])
    with pytest.raises(
        CheckpointError, match=f"truncated: expected {len(raw):,} bytes for 3 storages, the file has {len(raw) - 5:,}"
    ):
        open_checkpoint(tmp_path / "w.pt")


def test_damaged_archives_name_the_member(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for change, message in [
        ({"data/0": b"\0" * 8}, "'w/data/0' should have 24 bytes and has 8"),
        ({"data/0": None}, "the record 'w/data/0' is missing"),
        ({"data.pkl": b"\x80\x02}q\0."}, "holds no weights; it is empty"),
        ({"data.pkl": b"\x80\x02K\x01."}, "holds an object of type int, not named tensors"),
    ]:
        torch.save(WEIGHTS, path)
        rewrite(path, change)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_a_compressed_archive_is_refused_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    rewrite(path, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"'.+/data/0' is compressed, which torch.save never does"):
        open_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_without_plain_data_are_an_error_only_when_they_are_taken(legacy: bool, tmp_path: Path) -> None:
    sparse = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    content = {"model": {"a.w": torch.ones(2), "a.s": sparse}, "ema": {"a.w": torch.ones(2)}}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert open_checkpoint(tmp_path / "w.pt", checkpoint_key="ema").keys() == ("a.w",)
    with pytest.raises(CheckpointError, match=r"'a.s' is a sparse tensor; call to_dense\(\)"):
        open_checkpoint(tmp_path / "w.pt", checkpoint_key="model")


def test_a_meta_tensor_in_a_file_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2), "m": torch.zeros(2, device="meta")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="'m' is a meta tensor, which has no data"):
        open_checkpoint(tmp_path / "w.pt")


def test_an_expanded_tensor_may_not_pretend_to_be_huge(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="its elements overlap and would be 4,398,046,511,104 bytes"):
        open_checkpoint(tmp_path / "w.pt")


class Trusted:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_only_trust_pickle_runs_the_code_of_a_file_and_says_so(legacy: bool, tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "extra": Trusted(str(tmp_path / "ran"))}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)

    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()
    assert same_bits(checkpoint.read("a.weight"), WEIGHTS["a.weight"])

    trusted = open_checkpoint(tmp_path / "w.pt", trust_pickle=True)
    assert (tmp_path / "ran").exists()
    assert trusted.keys() == checkpoint.keys()
    assert trusted.notes[0] == "opened with trust_pickle=True: whatever code the file's pickle names was run"
    for key, tensor in WEIGHTS.items():
        assert same_bits(trusted.read(key), tensor)


def test_trusting_a_file_that_raises_is_still_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02cos\nno_such_name\n.")
    with pytest.raises(CheckpointError, match="loading it with trust_pickle=True failed"):
        open_checkpoint(tmp_path / "w.pkl", trust_pickle=True)
