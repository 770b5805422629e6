from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import warmstart
from warmstart.checkpoints.opening import open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.tensors import same_bits

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(5, 7, generator=generator).to(dtype),
        "layer.bias": torch.randn(7, generator=generator).to(dtype),
        "count": torch.tensor(seed),
        "mask": torch.tensor([True, False]) ^ bool(seed % 2),
    }


def files(folder: Path, *seeds: int) -> list[Path]:
    paths = [folder / f"step-{seed}.safetensors" for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        safetensors.torch.save_file(weights(seed), path)
    return paths


def test_the_mean_of_files(tmp_path: Path) -> None:
    averaged = warmstart.average(files(tmp_path, 1, 2, 3))
    assert averaged.location == "average of 3: step-1.safetensors, step-2.safetensors, step-3.safetensors"
    assert averaged.format == "safetensors"
    assert averaged.bytes_read == 0
    expected = torch.stack([weights(seed)["layer.weight"].double() for seed in (1, 2, 3)]).mean(0).float()
    assert torch.allclose(averaged.read("layer.weight"), expected, rtol=0, atol=1e-7)
    assert averaged.bytes_read == 3 * 5 * 7 * 4
    assert torch.equal(averaged.read("layer.weight", (slice(1, 3), 2)), averaged.read("layer.weight")[1:3, 2])
    assert torch.equal(averaged.read("count"), torch.tensor(1))
    assert torch.equal(averaged.read("mask"), weights(1)["mask"])
    assert averaged.notes == ("integers were taken from step-1.safetensors: 'count', 'mask'",)
    assert [stamp.path.name for stamp in averaged.files] == [f"step-{n}.safetensors" for n in (1, 2, 3)]


@pytest.mark.parametrize("shares", [[1, 3], [0.25, 0.75], [1e-3, 3e-3]])
def test_weights_are_divided_by_their_sum(shares: list[float]) -> None:
    averaged = warmstart.average([{"w": torch.zeros(2)}, {"w": torch.full((2,), 8.0)}], shares)
    assert torch.equal(averaged.read("w"), torch.full((2,), 6.0))
    assert "x 0.25, " in averaged.location


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_what_is_equal_everywhere_keeps_its_bits(dtype: torch.dtype, count: int) -> None:
    same = {**weights(0, dtype), "odd": torch.tensor([float("-inf"), float("nan"), -0.0]).to(dtype)}
    averaged = warmstart.average([same] * count, [1.0 + i for i in range(count)])
    for key, tensor in same.items():
        assert same_bits(averaged.read(key), tensor)


def test_an_infinity_that_masks_stays_one() -> None:
    a, b = {"mask": torch.tensor([0.0, float("-inf")])}, {"mask": torch.tensor([1.0, float("-inf")])}
    assert torch.equal(warmstart.average([a, b]).read("mask"), torch.tensor([0.5, float("-inf")]))


def test_nan_stays_visible_and_half_precision_does_not_overflow() -> None:
    a, b = {"w": torch.tensor([60000.0, float("nan")]).half()}, {"w": torch.tensor([50016.0, 1.0]).half()}
    out = warmstart.average([a, b]).read("w")
    assert out[0] == 55008.0
    assert out[1].isnan()


def test_the_first_gives_the_dtype_and_the_sum_is_wide() -> None:
    a, b = {"w": torch.ones(3, dtype=torch.bfloat16)}, {"w": torch.full((3,), 1.0078125, dtype=torch.float64)}
    assert warmstart.average([a, b]).read("w").dtype == torch.bfloat16
    assert torch.equal(warmstart.average([b, a]).read("w"), torch.full((3,), 1.00390625, dtype=torch.float64))


def test_large_and_transposed_tensors() -> None:
    a, b = torch.rand(1500, 1001), torch.rand(1001, 1500).t()
    assert torch.equal(warmstart.average([{"w": a}, {"w": b}]).read("w"), ((a.double() + b.double()) / 2).float())


def test_formats_may_be_mixed_and_modules_are_sources(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with (tmp_path / "w.npz").open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    averaged = warmstart.average([model, tmp_path / "w.npz"])
    assert averaged.format == "memory and numpy npz"
    target = nn.Linear(3, 2)
    report = warmstart.load(target, averaged)
    assert report.verified
    assert torch.equal(target.weight, model.weight.detach() / 2)
    (source,) = report.lineage["sources"]
    assert source["location"] == "average of 2: a Linear in memory, w.npz"
    assert [file["name"] for file in source["files"]] == ["w.npz"]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for step in ("10", "20"):
        (tmp_path / step).mkdir()
        safetensors.torch.save_file(weights(1), tmp_path / step / "model.safetensors")
    averaged = warmstart.average([tmp_path / step / "model.safetensors" for step in ("10", "20")])
    assert averaged.location == "average of 2: 10/model.safetensors, 20/model.safetensors"
    many = warmstart.average([weights(0)] * 12)
    assert many.location.endswith(", and 4 more")


def test_a_changed_file_and_other_weights_are_seen(tmp_path: Path) -> None:
    paths = files(tmp_path, 1, 2)
    averaged = warmstart.average(paths)
    assert averaged.changed() is None
    assert averaged.header_digest() == warmstart.average(paths).header_digest()
    assert averaged.header_digest() != warmstart.average(paths, [1, 2]).header_digest()
    paths[1].write_bytes(paths[1].read_bytes() + b"x")
    assert "step-2.safetensors had" in (averaged.changed() or "")
    with pytest.raises(CheckpointError, match="exactly one file, not 2"):
        averaged.sha256()


def test_other_keys_and_shapes_are_listed_together() -> None:
    a = {"x": torch.zeros(2), "y": torch.zeros(2), "only.a": torch.zeros(1), "n": torch.tensor(1)}
    b = {"x": torch.zeros(2), "y": torch.zeros(3), "only.b": torch.zeros(1), "n": torch.tensor(1.0)}
    with pytest.raises(CheckpointError) as caught:
        warmstart.average([a, b])
    message = str(caught.value)
    assert "1 key only in a state dict in memory: 'only.a'" in message
    assert "1 key only in a state dict in memory: 'only.b'" in message
    assert "1 key with other shapes: 'y' ((2,) torch.float32" in message
    assert "1 key with other kinds of numbers: 'n'" in message
    assert message.endswith('open_checkpoint(path, checkpoint_key="...")')


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([1], "2 checkpoints with 1 weight; give one weight for each"),
        ([1, 0], "the weight 0; weights are positive finite numbers"),
        ([1, -1], "the weight -1"),
        ([1, float("nan")], "the weight nan"),
        ([1, float("inf")], "the weight inf"),
        ([True, 1], "the weight True"),
        (["1", 1], "the weight '1'"),
    ],
)
def test_weights_that_are_none(shares: list[float], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        warmstart.average([{"w": torch.zeros(2)}] * 2, shares)


def test_a_single_source_or_none() -> None:
    with pytest.raises(TypeError, match=re.escape('average(["a.safetensors", "b.safetensors"])')):
        warmstart.average("a.safetensors")
    with pytest.raises(TypeError):
        warmstart.average({"w": torch.zeros(2)})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="give at least one"):
        warmstart.average([])


def test_a_tree_of_each_file(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"model": weights(1), "ema": weights(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="holds 2 trees"):
        warmstart.average([tmp_path / "a", tmp_path / "b"])
    averaged = warmstart.average([open_checkpoint(tmp_path / name, checkpoint_key="ema") for name in "ab"])
    assert averaged.checkpoint_key == "ema"
    assert torch.equal(averaged.read("layer.bias"), weights(2)["layer.bias"])
