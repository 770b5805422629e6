"""No byte of a pickle is ever executed, whatever container it comes in; the plain tensors beside it still load."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from warmstart.checkpoints import opening
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.checkpoints.pickled import pickles, refs
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Call:
    def __init__(self, function: object, *args: object, state: object = None) -> None:
        self.function, self.args, self.state = function, args, state

    def __reduce__(self) -> tuple[object, ...]:
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def attacks(marker: Path) -> dict[str, object]:
    import os
    import runpy
    import shutil

    touch = Call(Path.touch, marker)
    return {
        "touch": touch,
        "system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w').close()"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w').close()"),
        "open": Call(open, str(marker), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "copy": Call(shutil.copy, __file__, str(marker)),
        "run_path": Call(runpy.run_path, str(marker)),
        "getattr": Call(getattr, touch, "x"),
        "map": Call(map, eval, [f"open({str(marker)!r}, 'w')"]),
        "torch.load": Call(torch.load, str(marker)),
        "torch.save": Call(torch.save, WEIGHTS, str(marker)),
        "torch.hub": Call(torch.hub.load, "someone/something", "model"),
        "jit": Call(torch.jit.load, str(marker)),
        "numpy.load": Call(np.save, str(marker), np.ones(1)),
        "range": Call(range, 1 << 40),
        "bytearray": Call(bytearray, 1 << 40),
        "bytes": Call(bytes, 1 << 40),
        "list": Call(list, "abc"),
        "nested": {"deep": [{"er": (touch, [touch])}]},
        "key": {touch: 1},
        "state": Call(collections.OrderedDict, state={"__class__": touch}),
        "set": {1, 2},
    }


def save_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_pickle_5(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=5))


def save_npy(content: object, path: Path) -> None:
    holder = np.empty((), dtype=object)
    holder[()] = content
    with path.open("wb") as file:
        np.save(file, holder, allow_pickle=True)


def save_npz(content: object, path: Path) -> None:
    holder = np.empty((), dtype=object)
    holder[()] = content
    with path.open("wb") as file:
        np.savez_compressed(file, content=holder)


CONTAINERS = [save_zip, save_legacy, save_pickle, save_pickle_5, save_npy, save_npz]


@pytest.mark.parametrize("save", CONTAINERS)
def test_nothing_runs_and_the_tensors_still_load(save: Callable[[object, Path], None], tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for name, attack in attacks(marker).items():
        save({"first": attack, "state_dict": WEIGHTS, "last": [attack]}, tmp_path / "w")
        assert not marker.exists()
        checkpoint = open_checkpoint(tmp_path / "w")
        assert checkpoint.checkpoint_key == "state_dict", name
        for key, tensor in WEIGHTS.items():
            assert same_bits(checkpoint.read(key), tensor)
        assert not marker.exists(), name


@pytest.mark.parametrize("save", CONTAINERS)
def test_an_attack_instead_of_weights_is_an_error(save: Callable[[object, Path], None], tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for name, attack in attacks(marker).items():
        save(attack, tmp_path / "w")
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "w")
        assert not marker.exists(), name


def test_what_was_not_built_is_noted(tmp_path: Path) -> None:
    save_zip({"x": Call(eval, "1"), "y": Call(tarfile.open, "ls"), "state_dict": WEIGHTS}, tmp_path / "w")
    assert open_checkpoint(tmp_path / "w").notes == ("1 class was not built: tarfile.TarFile",)


def stream(*parts: bytes, tail: bytes = b".") -> bytes:
    return b"\x80\x02" + b"".join(parts) + tail


def dict_of(value: bytes, prefix: bytes = b"") -> bytes:
    return stream(prefix, b"}X\x01\0\0\0x", value, b"s")


ORDERED = b"ccollections\nOrderedDict\n"
DTYPE = b"cnumpy\ndtype\nX\x02\0\0\0f4K\0K\x01\x87R"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = RECONSTRUCT + b"cnumpy\nndarray\nK\0\x85X\x01\0\0\0b\x87R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "payload",
    [
        # BUILD on a global: it would set attributes of whatever the name stands for.
        REBUILD + b"}X\x04\0\0\0makeNsb",
        REBUILD + b"N}X\x04\0\0\0makeNs\x86b",
        ORDERED + b"}X\x06\0\0\0updateNsb",
        ORDERED + b"N}X\x06\0\0\0updateNs\x86b",
        b"csome\nclass\n}X\x04\0\0\0nameNsb",
        b"csome\nclass\nN}X\x08\0\0\0__call__Ns\x86b",
        b"ctorch\nfloat32\nN}X\x05\0\0\0valueNs\x86b",
        b"ctorch\nFloatStorage\nN}X\x05\0\0\0dtypeNs\x86b",
        # BUILD on what a global made.
        ARRAY + b"N}X\x05\0\0\0shapeNs\x86b",
        ARRAY + b"(K\x01K\x03\x85NNNtb",
        DTYPE + b"(K\x03X\x01\0\0\0zNNNK\0K\0K\0tb",
        DTYPE + b"Nb",
        # Globals that are called in ways that nobody calls them.
        ORDERED + b"K\x05\x85R",
        ORDERED + b"X\x02\0\0\0ab\x85R",
        b"c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0utf-8\x86R",
        b"c_codecs\nencode\nX\x02\0\0\0\xc4\x80X\x06\0\0\0latin1\x86R",
        b"ctorch\nSize\nX\x01\0\0\0a\x85R",
        b"ctorch\nSize\n(K\x01M\xff\xffN\x87t\x85R",
        b"cnumpy\ndtype\nK\x05\x85R",
        b"cnumpy\ndtype\n)R",
        b"cnumpy.core.multiarray\nscalar\n)R",
        b"cnumpy.core.numeric\n_frombuffer\n)R",
        REBUILD + b")R",
        REBUILD + b"(K\x01K\x00K\x01\x85K\x01\x85\x89NtR",
        b"ctorch._utils\n_rebuild_tensor_v3\n(NNNNNNNNtR",
        b"ctorch.storage\n_load_from_bytes\nX\x01\0\0\0a\x85R",
        b"ctorch.storage\n_load_from_bytes\nc_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0latin1\x86R\x85R",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN(NN)ttR",
        # Opcodes at odds with the stack.
        b"(((",
        b"0000",
        b"K\x01K\x02s",
        b"K\x01a",
        b"h\x05",
        b"Q",
        b"X\x01\0\0\0aQ",
        b"\x97",
        b"\x98",
        b"\x80\x63",
        b"}]Ns",
        b"I" + b"9" * 5000 + b"\n",
        b"cno newline",
        b"c\xff\xfe\n\xff\n",
        b"ca\0b\nc\n)\x81",
    ],
)
def test_tricks_of_single_opcodes(payload: bytes, tmp_path: Path) -> None:
    for name, data in (("bare", stream(payload)), ("in a dict", dict_of(payload)), ("twice", dict_of(payload * 2))):
        (tmp_path / "w.pkl").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"w\.pkl"):
            open_checkpoint(tmp_path / "w.pkl")
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr("w/data.pkl", data)
        with pytest.raises(CheckpointError, match=r"w\.pt"):
            open_checkpoint(tmp_path / "w.pt")
        assert name


def test_no_pickle_changes_what_the_next_one_sees(tmp_path: Path) -> None:
    before = {name: dict(vars(module)) for name, module in (("pickles", pickles), ("refs", refs), ("opening", opening))}
    stubs = vars(refs.Stub).copy()
    for target in (b"cwarmstart.checkpoints.pickled.refs\nStub\n", b"cbuiltins\nsetattr\n", ORDERED, REBUILD):
        for state in (b"}X\x04\0\0\0evilNsb", b"N}X\x04\0\0\0evilNs\x86b"):
            (tmp_path / "w.pkl").write_bytes(dict_of(target + state))
            with pytest.raises(CheckpointError):
                open_checkpoint(tmp_path / "w.pkl")
    assert dict(vars(pickles)) == before["pickles"]
    assert dict(vars(refs)) == before["refs"]
    assert vars(refs.Stub) == stubs
    assert not hasattr(collections.OrderedDict, "evil")


def test_every_name_resolves_to_something_inert() -> None:
    names = pickles.Globals(1 << 20, None)
    inert = (refs.Inert, refs.StorageType, refs.TorchConstant)
    for module, name in [
        ("torch", "FloatStorage"),
        ("torch", "float32"),
        ("torch", "strided"),
        ("torch", "load"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "set"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("os", "system"),
        ("posix", "system"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch", "_utils._rebuild_tensor"),
        ("torch", "nn.Module"),
    ]:
        found = names.resolve(module, name)
        stub = isinstance(found, type) and issubclass(found, refs.Stub)
        assert isinstance(found, inert) or stub, (module, name)


def test_code_in_the_side_pickles_of_a_legacy_file_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    magic = raw[: raw.index(b".") + 1]
    attack = pickle.dumps(Call(Path.touch, marker), protocol=2)
    protocol = pickle.dumps(1001, protocol=2)
    for data in (magic + attack, magic + protocol + attack, magic + protocol + attack + raw[40:]):
        (tmp_path / "w.pt").write_bytes(data)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "w.pt")
        assert not marker.exists()


def test_code_in_the_parts_of_a_tar_file_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    attack = pickle.dumps(Call(Path.touch, marker), protocol=2)
    none = pickle.dumps(0, protocol=2)
    for hostile in ("storages", "tensors", "pickle", "sys_info"):
        parts = {
            "sys_info": none,
            "storages": none + pickle.dumps([], 2),
            "tensors": none,
            "pickle": pickle.dumps({}, 2),
        }
        parts[hostile] = attack
        with tarfile.open(tmp_path / "w.pt", "w") as archive:
            for name, data in parts.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "w.pt")
        assert not marker.exists()


def test_a_storage_pickled_by_itself_may_not_hide_a_pickle_that_runs(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    inner = pickle.dumps(Call(Path.touch, marker), protocol=2)
    tensor = Call(
        torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, inner), 0, (1,), (1,), False, {}
    )
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": tensor}, protocol=4))
    with pytest.raises(CheckpointError, match="a storage that is not in torch's own format"):
        open_checkpoint(tmp_path / "w.pkl")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (7,), (1,)),
        (-1, (1,), (1,)),
        (6, (1,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (2,), (-1,)),
        (0, (-1,), (1,)),
        (1 << 61, (1,), (1,)),
        (0, (1 << 61,), (1,)),
        (0, (1 << 40, 1 << 40), (0, 0)),
        (0, (0, 1 << 60), (1, 1)),
        (0, (2,), (1, 1)),
        (0, (1,) * 65, (1,) * 65),
        (0, (1 << 40,), (0,)),
        (0, (2,), (1 << 61,)),
    ],
)
def test_no_tensor_reaches_outside_its_storage(
    offset: int, shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 6) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Call(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, {})})
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", buffer.getvalue())
        archive.writestr("w/data/0", struct.pack("<6f", *range(6)))
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        open_checkpoint(tmp_path / "w.pt")


def test_the_whole_corpus_opens_without_importing_anything(tmp_path: Path) -> None:
    save_zip({"x": Call(subprocess.Popen, "ls"), "state_dict": WEIGHTS}, tmp_path / "w")
    with zipfile.ZipFile(tmp_path / "w") as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"Popen" in data
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}(X\x01\0\0\0acthis\nimport_me\nX\x01\0\0\0bcantigravity\nfly\nu.")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path / "w.pkl")
    assert "this" not in sys.modules
    assert "antigravity" not in sys.modules
