from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

import warmstart
from warmstart.checkpoints.torch_files import torchscript
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("transient", torch.ones(3), persistent=False)
        self.plain = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.kept + self.transient + self.plain


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Block()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.tied = nn.ModuleList([self.layers[0]])
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        self.nothing = None
        self.several = [torch.ones(2)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(self.model(x)) * self.scale + self.shift.float() + self.several[0].sum()
        for layer in self.tied:
            y = layer(y)
        return y


def save(path: Path, *, traced: bool = False) -> dict[str, Tensor]:
    net = Net().eval()
    program = torch.jit.trace(net, torch.ones(1, 2)) if traced else torch.jit.script(net)
    program.save(str(path))
    return dict(torch.jit.load(str(path)).state_dict())


def rewrite(path: Path, changes: dict[str, bytes | None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    folder = path.stem
    for name, data in changes.items():
        if data is None:
            del members[f"{folder}/{name}"]
        else:
            members[f"{folder}/{name}"] = data
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("traced", [False, True])
def test_a_program_is_its_state_dict(traced: bool, tmp_path: Path) -> None:
    expected = save(tmp_path / "net.pt", traced=traced)
    assert "model.linear.weight" in expected
    for trust in (False, True):
        checkpoint = warmstart.open_checkpoint(tmp_path / "net.pt", trust_pickle=trust)
        assert checkpoint.format == "TorchScript"
        assert checkpoint.keys() == tuple(expected)
        assert checkpoint.notes == ()
        for key, tensor in expected.items():
            assert same_bits(checkpoint.read(key), tensor), key


def test_attributes_that_are_no_parameters_are_not_weights(tmp_path: Path) -> None:
    save(tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        names = {arg for _, arg, _ in pickletools.genops(archive.read("net/data.pkl"))}
    assert {"plain", "several"} <= names
    keys = warmstart.open_checkpoint(tmp_path / "net.pt").keys()
    assert not any("plain" in key or "several" in key for key in keys)


def test_a_program_goes_into_its_own_model(tmp_path: Path) -> None:
    expected = save(tmp_path / "net.pt")
    net = Net()
    report = warmstart.load(net, tmp_path / "net.pt")
    assert report.coverage == 1
    for name, tensor in net.state_dict().items():
        assert same_bits(tensor, expected[name]), name


def test_a_frozen_program_says_what_to_take(tmp_path: Path) -> None:
    torch.jit.freeze(torch.jit.script(Net().eval())).save(str(tmp_path / "net.pt"))
    with pytest.raises(CheckpointError, match=r"was frozen.*take the file from before torch.jit.freeze"):
        warmstart.open_checkpoint(tmp_path / "net.pt")


def test_a_program_of_the_first_versions_does_not_declare_its_buffers(tmp_path: Path) -> None:
    expected = save(tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        code = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
    old = {
        name.removeprefix("net/"): b"\n".join(line for line in text.split(b"\n") if b"__buffers__" not in line)
        for name, text in code.items()
    }
    rewrite(tmp_path / "net.pt", {**old})
    checkpoint = warmstart.open_checkpoint(tmp_path / "net.pt")
    assert set(checkpoint.keys()) == {*expected, "model.plain"}
    # the same where a class's code is missing altogether
    rewrite(tmp_path / "net.pt", dict.fromkeys(old))
    assert set(warmstart.open_checkpoint(tmp_path / "net.pt").keys()) == {*expected, "model.plain"}


def test_nothing_of_a_program_is_executed(tmp_path: Path) -> None:
    expected = save(tmp_path / "net.pt")
    ran = tmp_path / "ran"
    bomb = b"cos\nsystem\n(X" + len(f"touch {ran}").to_bytes(4, "little") + f"touch {ran}".encode() + b"tR."
    rewrite(tmp_path / "net.pt", {"constants.pkl": bomb, "code/__torch__/evil.py": f"open({str(ran)!r}, 'w')".encode()})
    assert warmstart.open_checkpoint(tmp_path / "net.pt", trust_pickle=True).keys() == tuple(expected)
    rewrite(tmp_path / "net.pt", {"data.pkl": b"\x80\x02" + bomb})
    with pytest.raises(CheckpointError, match=r"a TorchScript archive of .*, not of a module"):
        warmstart.open_checkpoint(tmp_path / "net.pt", trust_pickle=True)
    assert not ran.exists()


def module(name: bytes, entries: bytes) -> bytes:
    return b"c__torch__\n" + name + b"\n)\x81}(" + entries + b"ub"


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def hostile(path: Path, pickled: bytes, code: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("m/data.pkl"), b"\x80\x02" + pickled + b".")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/code/__torch__.py", code)
    return path


def test_modules_that_hold_themselves_end(tmp_path: Path) -> None:
    # memo 0 is the module itself
    looped = b"c__torch__\nA\n)\x81q\0}(" + text("a") + b"h\0ub"
    with pytest.raises(CheckpointError, match="without parameters"):
        warmstart.open_checkpoint(hostile(tmp_path / "loop.pt", looped))


def test_modules_shared_without_end_are_refused(tmp_path: Path) -> None:
    pickled = module(b"A", b"") + b"q\0"
    for memo in range(1, 60):
        shared = b"h" + bytes([memo - 1])
        pickled += b"0" + module(b"A", text("a") + shared + text("b") + shared) + b"q" + bytes([memo])
    with pytest.raises(CheckpointError, match=r"deep.pt: a TorchScript module that is nested without end"):
        warmstart.open_checkpoint(hostile(tmp_path / "deep.pt", pickled))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"class A(Module):\n" * 300_000, "more than 200,000 classes and names of parameters"),
        (
            b"class A(Module):\n  __parameters__ = [" + b'"",' * 300_000 + b"]\n  __buffers__ = []\n",
            "more than 200,000",
        ),
        (b"#" * (torchscript.MAX_SOURCE + 1), "more than 16 MiB of code"),
    ],
)
def test_code_beyond_all_measure_is_refused(code: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        warmstart.open_checkpoint(hostile(tmp_path / "m.pt", module(b"A", text("x") + b"K\x01"), code))


@pytest.mark.parametrize("change", [{"data/0": b""}, {"data/0": None}])
def test_a_damaged_program_names_the_record(change: dict[str, bytes | None], tmp_path: Path) -> None:
    save(tmp_path / "net.pt")
    rewrite(tmp_path / "net.pt", change)
    with pytest.raises(CheckpointError, match=r"'net/data/0'.*get the file again"):
        warmstart.open_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("part", ["pickle", "code"])
def test_damaged_programs_end_in_one_type_of_error(part: str, tmp_path: Path) -> None:
    save(tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    code = sorted(name for name in members if name.endswith(".py"))
    random = Random(7)
    opened = 0
    messages: list[str] = []
    for _ in range(1000):
        name = "net/data.pkl" if part == "pickle" else random.choice(code)
        damaged = bytearray(members[name])
        for _ in range(random.choice((1, 1, 2, 8))):
            at = random.randrange(len(damaged))
            damaged[at : at + random.randrange(3)] = random.randbytes(random.randrange(3))
        with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
            for other, data in {**members, name: bytes(damaged)}.items():
                archive.writestr(other, data)
        try:
            checkpoint = warmstart.open_checkpoint(tmp_path / "net.pt")
            for key in checkpoint.keys():
                checkpoint.read(key)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            opened += 1
    assert all("net.pt" in message for message in messages)
    assert 0 < opened <= 1000
