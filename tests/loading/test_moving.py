"""Copying from mapped files by threads: the same bits, the same findings and the same errors as one tensor at a time."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import warmstart
from warmstart.checkpoints.files import MappedFile
from warmstart.errors import CheckpointError
from warmstart.loading import moving, verifying, writing
from warmstart.loading.moving import Mover
from warmstart.tensors import same_bits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip


class Entries(nn.Module):
    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name, torch.zeros_like(tensor))


def odd_sizes(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Sizes around a chunk and a batch, at offsets that are no multiples of eight."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 1, "b": 3, "c": moving._CHUNK - 1, "d": moving._CHUNK + 1, "e": 70_001, "f": 0, "g": 5}
    return {
        name: torch.randint(0, 2, (size,), generator=generator).to(torch.float32).to(dtype)
        for name, size in sizes.items()
    }


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(moving, "_BATCH", 1 << 16)
    monkeypatch.setattr(moving, "_CHUNK", 5_000)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("verify", ["full", "sample", "off"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_size_arrives_bit_for_bit(tmp_path, dtype, verify):
    state = odd_sizes(dtype)
    save_file(state, tmp_path / "w.safetensors")
    model = Entries(state)
    report = warmstart.load(model, tmp_path / "w.safetensors", verify=verify)
    assert all(same_bits(getattr(model, name), tensor) for name, tensor in state.items())
    assert not any("non-finite" in note for note in report.notes)
    report.check(model)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("most", [None, 1_000])
def test_a_copy_without_a_comparison_is_read_as_the_system_can(tmp_path, monkeypatch, most):
    """Past the mapping, a part at a time if it gives no more, and from the mapping where there is no such call."""
    state = odd_sizes(torch.bfloat16)
    save_file(state, tmp_path / "w.safetensors")
    read, asked = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], start: int) -> int:
        asked.append(len(buffers[0]))
        return read(descriptor, [buffers[0][:most]], start)

    if most is None:
        monkeypatch.delattr(os, "preadv")
    else:
        monkeypatch.setattr(os, "preadv", short)
    model = Entries(state)
    warmstart.load(model, tmp_path / "w.safetensors", verify="off")
    assert all(same_bits(getattr(model, name), tensor) for name, tensor in state.items())
    assert (len(asked) > len(state)) == (most is not None)


@pytest.mark.parametrize("verify", ["full", "sample", "off"])
def test_a_backward_that_has_saved_a_parameter_is_told_of_the_load(tmp_path, verify):
    model = nn.Linear(3, 3)
    save_file({"weight": torch.ones(3, 3), "bias": torch.ones(3)}, tmp_path / "w.safetensors")
    value = torch.ones(1, 3, requires_grad=True)
    loss = model(value).sum()
    warmstart.load(model, tmp_path / "w.safetensors", verify=verify)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_file_that_shrinks_or_is_replaced_under_the_reader_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(4)}, path)
    model = Entries({"a": torch.ones(4)})
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(warmstart.CheckpointError, match="has become shorter while it was read"):
            warmstart.load(model, path, verify="off")
    file = MappedFile(path)
    path.unlink()
    save_file({"a": torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match="was replaced or written to after it was opened"):
        file.opened()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_nan_equals_itself_and_is_counted(tmp_path, dtype):
    state = odd_sizes(dtype)
    for name in ("b", "e"):
        wide = state[name].to(torch.complex64 if dtype.is_complex else torch.float32, copy=True)
        wide[-1] = float("nan")
        state[name] = wide.to(dtype)
    save_file(state, tmp_path / "w.safetensors")
    model = Entries(state)
    report = warmstart.load(model, tmp_path / "w.safetensors")
    assert "2 loaded tensors hold non-finite values: b, e" in report.notes
    report.check(model)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-nan", "largest", "-largest"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_infinite_is_told_from_the_largest_by_its_bits(tmp_path, dtype, value):
    number = torch.tensor(torch.finfo(dtype).max if "largest" in value else float(value.strip("-")), dtype=dtype)
    state = odd_sizes(dtype)
    state["e"][-2] = number.neg() if value[0] == "-" else number
    save_file(state, tmp_path / "w.safetensors")
    report = warmstart.load(Entries(state), tmp_path / "w.safetensors")
    assert ("1 loaded tensors hold non-finite values: e" in report.notes) == ("largest" not in value)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_sample_finds_other_values_and_other_ends(tmp_path, dtype):
    state = odd_sizes(dtype)
    save_file(state, tmp_path / "w.safetensors")
    model = Entries(state)
    report = warmstart.load(model, tmp_path / "w.safetensors", verify="sample")
    report.check(model, verify="sample")
    for name in "be":
        getattr(model, name)[-1] += 1
    model.d.add_(1)
    with pytest.raises(warmstart.VerificationError) as caught:
        report.check(model, verify="sample")
    assert set(caught.value.tensors) == {"b", "d", "e"}


@pytest.mark.usefixtures("threads")
def test_one_bit_in_the_last_chunk_is_found_at_the_check(tmp_path):
    state = odd_sizes(torch.float32)
    save_file(state, tmp_path / "w.safetensors")
    model = Entries(state)
    report = warmstart.load(model, tmp_path / "w.safetensors")
    model.e.view(torch.int32)[-1] ^= 1
    model.a.neg_()
    with pytest.raises(warmstart.VerificationError) as caught:
        report.check(model)
    assert set(caught.value.tensors) == {"a", "e"}


@pytest.mark.usefixtures("threads")
def test_a_write_that_went_wrong_is_found_right_after_it(tmp_path, monkeypatch):
    state = odd_sizes(torch.float32) | {"g": torch.ones(5)}
    save_file(state, tmp_path / "w.safetensors")
    copy = moving.memmove

    def stuck(to: int, source: int, count: int) -> None:
        """Memory that keeps what it holds, whatever is copied to it."""
        if count != 20:
            copy(to, source, count)

    monkeypatch.setattr(moving, "memmove", stuck)
    with pytest.raises(warmstart.VerificationError, match=r"g +was written and reads back differently"):
        warmstart.load(Entries(state), tmp_path / "w.safetensors")


def test_a_file_that_shrinks_is_an_error_that_names_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(moving, "_BATCH", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    model = Entries(state)
    plan = warmstart.plan(model, path)
    add = Mover.add

    def then_shrink(self, *args, **options):
        add(self, *args, **options)
        with path.open("r+b") as opened:
            opened.truncate(8)

    monkeypatch.setattr(Mover, "add", then_shrink)
    with pytest.raises(warmstart.CheckpointError, match="1 of 2 entries had been written by then") as caught:
        plan.apply()
    assert caught.value.written == ("a",)
    assert caught.value.report.status == "failed"


def test_an_entry_of_which_only_a_part_was_written_is_no_untouched_model(tmp_path, monkeypatch):
    monkeypatch.setattr(moving, "_BATCH", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    save_file({"a": torch.ones(4)}, tmp_path / "w.safetensors")
    model = Entries({"a": torch.ones(4)})
    pieces = moving._pieces

    def then_gone(*args):
        first, second = pieces(*args)
        yield first
        place = second.entry.place._replace(file=Gone())
        yield second._replace(entry=dataclasses.replace(second.entry, place=place))

    class Gone:
        def check(self) -> None:
            raise warmstart.CheckpointError("the file is shorter now")

    monkeypatch.setattr(moving, "_pieces", then_gone)
    with pytest.raises(warmstart.CheckpointError, match=r"the file is shorter now\n0 of 1 entries .* half loaded"):
        warmstart.load(model, tmp_path / "w.safetensors")
    assert model.a.tolist() == [1.0, 1.0, 0.0, 0.0]


def _on_meta(make):
    with torch.device("meta"):
        return make()


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


@pytest.mark.parametrize("verify", ["full", "off"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_meta_model_has_the_file_s_pages_until_it_writes_to_them(tmp_path, suffix, verify):
    """Assigned from a mapping of its own: no memory at first, training does not reach the file, the check still sees it."""
    source = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048)).state_dict()
    path = tmp_path / f"model.{suffix}"
    save_file(source, path) if suffix == "safetensors" else torch.save(source, path)
    before = path.read_bytes()
    model = _on_meta(lambda: nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048)))
    first, held = model[0].weight, _anonymous()
    report = warmstart.load(model, path, verify=verify)
    assert _anonymous() - held < 12 << 20  # the weights are 32 MiB
    assert model[0].weight is first
    assert isinstance(first, nn.Parameter)
    assert first.requires_grad
    assert all(same_bits(value, source[name]) for name, value in model.state_dict().items())
    report.check(model)

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 2048)).sum().backward()
    optimizer.step()
    assert not same_bits(model[0].weight, source["0.weight"])
    assert path.read_bytes() == before
    with pytest.raises(warmstart.VerificationError) as caught:
        report.check(model)
    assert caught.value.tensors == tuple(source)
    assert path.read_bytes() == before


def test_a_meta_model_s_entries_never_share_bytes_of_the_file(tmp_path):
    """Two keys on one storage of a .pt go to two entries that are not tied: one's training must not reach the other."""
    shared = torch.arange(12.0)
    path = tmp_path / "shared.pt"
    torch.save({"a": shared[:8], "b": shared[4:], "c": shared}, path)
    model = _on_meta(lambda: Entries({"a": torch.zeros(8), "b": torch.zeros(8), "c": torch.zeros(12)}))
    warmstart.load(model, path)
    for name in "abc":
        getattr(model, name).fill_(float(ord(name)))
    assert [getattr(model, name).unique().tolist() for name in "abc"] == [[97.0], [98.0], [99.0]]


def test_a_meta_model_takes_a_cast_entry_as_a_copy(tmp_path):
    save_file(
        {"a": torch.full((4,), 1.5, dtype=torch.bfloat16), "b": torch.full((4,), 2.5)}, tmp_path / "m.safetensors"
    )
    model = _on_meta(lambda: Entries({"a": torch.zeros(4), "b": torch.zeros(4)}))
    warmstart.load(model, tmp_path / "m.safetensors")
    assert (model.a.dtype, model.a.tolist(), model.b.tolist()) == (torch.float32, [1.5] * 4, [2.5] * 4)


def test_a_meta_model_loads_inside_its_device_context_and_saves(tmp_path):
    state = odd_sizes(torch.float32)
    save_file(state, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Entries(state)
        warmstart.load(model, tmp_path / "m.safetensors", verify="full")
    torch.save(model.state_dict(), tmp_path / "again.pt")
    assert (tmp_path / "again.pt").stat().st_size < 2 * (tmp_path / "m.safetensors").stat().st_size
    again = torch.load(tmp_path / "again.pt")
    assert all(same_bits(again[name], value) for name, value in state.items())


def test_a_file_that_was_replaced_is_not_mapped_again(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4)}, path)
    file = MappedFile(path)
    save_file({"a": torch.ones(400)}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(path)
    with pytest.raises(CheckpointError, match="was replaced or written to"):
        file.again()


def test_a_meta_load_imports_no_more_than_another():
    """torch's Python kernels for meta tensors bring sympy with them: half a second for the first load of a process."""
    program = (
        "import sys, torch, warmstart\n"
        "with torch.device('meta'): model = torch.nn.Linear(3, 2)\n"
        "warmstart.load(model, torch.nn.Linear(3, 2).state_dict())\n"
        "assert not model.weight.is_meta\n"
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


@pytest.mark.parametrize("verify", ["full", "sample", "off"])
@pytest.mark.parametrize("lazily", [torch.Tensor.conj, torch._neg_view])
def test_a_lazy_conjugate_or_negative_gets_values_not_bytes(tmp_path, lazily, verify):
    value = torch.randn(4, 5, dtype=torch.complex64)
    torch.save({"x": value}, tmp_path / "w.pt")
    model = nn.Module()
    model.register_buffer("x", lazily(torch.zeros(4, 5, dtype=torch.complex64)))
    report = warmstart.load(model, tmp_path / "w.pt", verify=verify)
    assert torch.equal(model.x, value)
    report.check(model)


@pytest.mark.parametrize("verify", ["sample", "off"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_that_is_gone_by_the_time_of_the_first_write_is_an_error_of_ours(tmp_path, monkeypatch, device, verify):
    path = tmp_path / "m.safetensors"
    save_file({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, path)
    checked = writing.preflight

    def then_gone(*args):
        checked(*args)
        path.unlink()

    monkeypatch.setattr(writing, "preflight", then_gone)
    model = nn.Linear(4, 4, device=device)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: cannot be opened again: No such file") as caught:
        warmstart.load(model, path, verify=verify)
    assert caught.value.written == ()


def test_bytes_that_the_system_cannot_read_are_an_error_that_names_file_and_entry(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4)}, path)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: cannot read 'a': .*Input/output error"):
        warmstart.load(Entries({"a": torch.ones(4)}), path, verify="off")


def test_a_check_that_cannot_read_on_leaves_no_threads_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(moving, "_BATCH", 16)
    torch.save({"a": torch.ones(40), "b": torch.ones(4, 4).t()[:, :3]}, tmp_path / "w.pt")
    model = Entries({"a": torch.ones(40), "b": torch.ones(4, 3)})
    report = warmstart.load(model, tmp_path / "w.pt")

    def broken(*_: object) -> torch.Tensor:
        raise CheckpointError("cannot be read")

    monkeypatch.setattr(verifying.Values, "planned", broken)
    with pytest.raises(CheckpointError, match="cannot be read"):
        report.check(model)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warmstart")]
