"""The weighted mean of several checkpoints, as a checkpoint: the last ones of a run, or a soup of fine-tuned models."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from warmstart.checkpoints.base import Checkpoint, Index, TensorInfo
from warmstart.checkpoints.opening import Source, open_checkpoint
from warmstart.errors import CheckpointError
from warmstart.showing import counted, listed
from warmstart.tensors import same_bits

MAX_SHOWN = 8
_BLOCK = 1 << 20  # elements that are summed at once, in double precision: 8 MB


class AveragedCheckpoint(Checkpoint):
    """What `average` returns: each tensor is averaged when it is read."""

    def __init__(self, sources: Sequence[Checkpoint], weights: Sequence[float] | None) -> None:
        """Join sources that fit each other.

        Args:
            sources: The checkpoints; the first says which dtype each tensor has.
            weights: How much each counts, or None for all the same.
        """
        first = sources[0]
        names = _short_names([source.location for source in sources])
        self._sources = tuple(sources)
        shares = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        shares = [share / max(shares) for share in shares]  # so that no sum of them overflows
        self._shares = [share / math.fsum(shares) for share in shares]
        if weights is not None:
            names = [f"{name} x {share:.4g}" for name, share in zip(names, self._shares, strict=True)]
        more = f", and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        notes = {note: None for source in sources for note in source.notes}
        counts = [key for key in first.keys() if not _has_mean(first.info(key).dtype)]
        if counts:
            notes[f"integers were taken from {names[0]}: {listed(counts)}"] = None
        super().__init__(
            location=f"average of {len(sources)}: {', '.join(names[:MAX_SHOWN])}{more}",
            format=" and ".join(sorted({source.format for source in sources})),
            infos={key: TensorInfo(first.info(key).shape, first.info(key).dtype) for key in first.keys()},
            files=[stamp for source in sources for stamp in source.files],
            checkpoint_key=first.checkpoint_key if len({source.checkpoint_key for source in sources}) == 1 else None,
            metadata=first.metadata,
            versions=first.versions,
            notes=list(notes),
        )
        self.callbacks = [source.callbacks for source in sources]

    def header_digest(self) -> str:
        """A SHA-256 of the sources' own digests and of how much each counts."""
        sha = hashlib.sha256()
        for source, share in zip(self._sources, self._shares, strict=True):
            sha.update(f"{source.header_digest()} {share.hex()}\n".encode())
        return sha.hexdigest()

    def changed(self) -> str | None:
        """What changed in any of the sources since it was opened, in words; None if nothing did."""
        return next((what for what in (source.changed() for source in self._sources) if what is not None), None)

    def _read(self, key: str, index: Index | None) -> Tensor:
        before = sum(source.bytes_read for source in self._sources)
        if _has_mean(self.info(key).dtype):
            mean = _mean([source.read(key, index) for source in self._sources], self._shares, self.info(key).dtype)
        else:
            mean = self._sources[0].read(key, index)
        # What is read is what the sources give, not what comes out of it.
        self.bytes_read += sum(source.bytes_read for source in self._sources) - before
        self.bytes_read -= mean.numel() * mean.element_size()
        return mean


def average(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Checkpoint:
    """The weighted mean of checkpoints with the same keys and shapes, as a checkpoint to load from.

    Nothing is read before it is needed, and then one tensor at a time. The sums are made in double precision, and tensors
    that are equal in all checkpoints (a frozen backbone's) keep their bits. The result has the dtypes of the first
    checkpoint, and integers and booleans are taken from it.

    Args:
        sources: Paths, state dicts, modules or open checkpoints; what needs a `checkpoint_key` is opened by
            `open_checkpoint` first.
        weights: How much each counts; positive, and divided by their sum, so that `[1, 3]` is a quarter and three quarters.

    Raises:
        CheckpointError: A source cannot be opened, the weights are none, or keys, shapes or kinds of numbers differ.
        TypeError: `sources` is a single one.

    Example:
        >>> report = warmstart.load(model, warmstart.average(["step-80.pt", "step-90.pt", "step-100.pt"]))
    """
    if isinstance(sources, str) or not isinstance(sources, Sequence):
        raise TypeError(
            f'average() takes a list of checkpoints, not {type(sources).__name__}: average(["a.safetensors", "b.safetensors"])'
        )
    if not sources:
        raise CheckpointError("average() of no checkpoints; give at least one: average([path, ...])")
    if weights is not None:
        _check_weights(weights, len(sources))
    opened = [open_checkpoint(source) for source in sources]
    names = _short_names([source.location for source in opened])
    for name, other in zip(names[1:], opened[1:], strict=True):
        _check_same(names[0], opened[0], name, other)
    return AveragedCheckpoint(opened, weights)


def _check_weights(weights: Sequence[float], count: int) -> None:
    if not hasattr(weights, "__len__"):
        raise TypeError(f"average() with weights={weights!r}; give a list with one number for each checkpoint")
    if len(weights) != count:
        raise CheckpointError(
            f"average() of {counted(count, 'checkpoint')} with {counted(len(weights), 'weight')}; give one weight for each"
        )
    for weight in weights:
        try:
            number = math.nan if isinstance(weight, (bool, str, bytes)) else float(weight)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if not math.isfinite(number) or number <= 0:
            raise CheckpointError(
                f"average() with the weight {weight!r}; weights are positive finite numbers: leave out a checkpoint that "
                "should not count"
            )


def _check_same(first_name: str, first: Checkpoint, name: str, other: Checkpoint) -> None:
    both = [key for key in first.keys() if key in other]
    problems: list[str] = []
    for only, keys in (
        (first_name, [key for key in first.keys() if key not in other]),
        (name, [key for key in other.keys() if key not in first]),
    ):
        if keys:
            problems.append(f"{counted(len(keys), 'key')} only in {only}: {listed(keys, 8)}")
    differing: list[tuple[str, Callable[[TensorInfo], object]]] = [
        ("shapes", lambda info: info.shape),
        ("kinds of numbers", lambda info: "a mean" if _has_mean(info.dtype) else info.dtype),
        ("kinds of numbers", lambda info: info.dtype.is_complex),
    ]
    for what, of in differing:
        keys = [key for key in both if of(first.info(key)) != of(other.info(key))]
        if keys:
            a, b = first.info(keys[0]), other.info(keys[0])
            problems.append(
                f"{counted(len(keys), 'key')} with other {what}: {listed(keys, 8)} ({a.shape} {a.dtype} in {first_name}, "
                f"{b.shape} {b.dtype} in {name})"
            )
    if problems:
        raise CheckpointError(
            f"average(): {first_name} and {name} are not of one model:\n  "
            + "\n  ".join(problems)
            + "\ngive checkpoints of the same model, opened with the same checkpoint_key: "
            'open_checkpoint(path, checkpoint_key="...")'
        )


def _mean(tensors: Sequence[Tensor], shares: Sequence[float], dtype: torch.dtype) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    out = torch.empty(tensors[0].shape, dtype=dtype)
    target = out.reshape(-1)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, target.numel(), _BLOCK):
        part = slice(start, start + _BLOCK)
        if all(same_bits(flat[0][part], tensor[part]) for tensor in flat[1:]):
            target[part] = flat[0][part]
            continue
        total = torch.zeros(target[part].shape, dtype=wide)
        for tensor, share in zip(flat, shares, strict=True):
            total.add_(tensor[part].to(wide), alpha=share)
        target[part] = total.to(dtype)
    return out


def _has_mean(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _short_names(locations: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [location.replace("\\", "/").rstrip("/").split("/") for location in locations]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(locations)):
            return names
    return list(locations)
