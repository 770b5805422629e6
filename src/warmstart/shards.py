"""What of a tensor this process holds: all of it, a DTensor's shard, or a ZeRO-3 partition."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from warmstart.errors import MappingError
from warmstart.modules import every_module

Shape = tuple[int, ...]
Span = tuple[int, int]


class Region(Protocol):
    """Which elements of a tensor a process holds."""

    def run(self, shape: Shape) -> Span | None:
        """The first and past the last of them as they lie in a row-major tensor of this shape; None if others lie between."""

    def take(self, whole: Tensor) -> Tensor:
        """Of the whole tensor, the part that is held, in the shape it is held in."""

    def read(self, read: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
        """The same, of a tensor that `read` gives slices of: no more of it is read than is held."""


@dataclass(frozen=True, slots=True)
class Box:
    """Of every dimension some positions: one span of them, or several where shards are strided.

    Attributes:
        spans: For each dimension the spans (first, past the last), in the order in which they are held.
    """

    spans: tuple[tuple[Span, ...], ...]

    def run(self, shape: Shape) -> Span | None:
        start, count = 0, 1
        for size, spans in zip(shape, self.spans, strict=True):
            (first, last), *others = spans
            if others or (count > 1 and last - first < size):
                return None
            start, count = start * size + first, count * (last - first)
        return start, start + count

    def take(self, whole: Tensor) -> Tensor:
        return self.read(lambda index: whole[index])

    def read(self, read: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
        pieces = [read(tuple(itertools.starmap(slice, spans))) for spans in itertools.product(*self.spans)]
        for dim in range(len(self.spans) - 1, -1, -1):
            count = len(self.spans[dim])
            if count > 1:
                pieces = [torch.cat(pieces[i : i + count], dim) for i in range(0, len(pieces), count)]
        return pieces[0]


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the elements as they lie in a row-major tensor.

    Attributes:
        shape: The tensor's shape.
        start: The first element.
        stop: Past the last one.
    """

    shape: Shape
    start: int
    stop: int

    def run(self, shape: Shape) -> Span | None:
        return self.start, self.stop

    def take(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1)[self.start : self.stop]

    def read(self, read: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
        # Down the dimensions while the run lies in one row, then the rows that it meets.
        index: list[slice] = []
        first, offset = self.start, 0
        for dim, size in enumerate(self.shape):
            row = math.prod(self.shape[dim + 1 :])
            low = first // row if row else 0
            high = -(-(first + self.stop - self.start) // row) if row else 0
            index.append(slice(low, min(high, size)))
            first, offset = first - low * row, first - low * row
            if high - low > 1:
                break
        return read(tuple(index)).reshape(-1)[offset : offset + self.stop - self.start]


class Shard(NamedTuple):
    """A tensor, whole and as this process has it.

    Attributes:
        shape: The whole tensor's shape.
        local: What this process has of it, as a plain tensor on the same memory.
        region: Which elements these are; None where they are all, in the same shape.
    """

    shape: Shape
    local: Tensor
    region: Region | None


def shard_of(tensor: Tensor) -> Shard:
    """What this process holds of a tensor.

    Raises:
        MappingError: It is sharded in a way that does not say which elements a process holds.
    """
    if is_partition(tensor):
        return _partition(tensor)
    if _is_dtensor(tensor):
        return _dtensor_shard(tensor)
    return Shard(tuple(tensor.shape), tensor, None)


def local_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, as a plain tensor on the same memory; a plain one, lazy or not, is itself.

    Raises:
        MappingError: As `shard_of`.
    """
    return shard_of(tensor).local if is_sharded(tensor) else tensor


def full_shape(tensor: Tensor) -> Shape:
    """The shape of the whole tensor, of which this process may hold a part or nothing."""
    return tuple(tensor.ds_shape) if is_partition(tensor) else tuple(tensor.shape)  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether an engine spreads the tensor over processes, be it only as copies."""
    return is_partition(tensor) or _is_dtensor(tensor)


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one a copy, for which every process of its group has to call this."""
    if is_partition(tensor):
        import deepspeed  # its `zero` is an attribute, no module

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if _is_dtensor(tensor):
        whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return whole
    return tensor


def mesh_device(tensor: Tensor) -> torch.device | None:
    """The kind of device that a DTensor is computed with, where its shards lie unless they are `offloaded`; else None."""
    return torch.device(tensor.device_mesh.device_type) if _is_dtensor(tensor) else None  # type: ignore[attr-defined]


def offloaded(model: nn.Module) -> set[int]:
    """Identities of the parameters whose shards FSDP2 keeps on the CPU (`CPUOffloadPolicy`), whatever computes with them."""
    return {id(param.sharded_param) for param in _fsdp_params(model) if param.offload_to_cpu}


@contextmanager
def same_draws(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Random numbers are drawn alike by all processes that share these tensors: as the first of them draws.

    A collective of a few kilobytes for each dimension of each mesh. A process that was in the same random state goes on
    from there, another one from where it was.
    """
    own = torch.get_rng_state()
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if _is_dtensor(tensor))  # type: ignore[attr-defined]
    state = own.clone()
    for mesh in meshes:
        shared = state.to(mesh.device_type)
        for dim in range(mesh.ndim):
            torch.distributed.broadcast(shared, group=mesh.get_group(dim), group_src=0)
        state = shared.cpu()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        if not torch.equal(state, own):
            torch.set_rng_state(own)


def sharded_behind(model: nn.Module) -> dict[int, Tensor]:
    """FSDP2's parameters, by the identity of the whole ones that stand in their places between a forward and its backward."""
    return {
        id(unsharded): param.sharded_param
        for param in _fsdp_params(model)
        if (unsharded := getattr(param, "_unsharded_param", None)) is not None
    }


def reshard(model: nn.Module) -> None:
    """Drop FSDP2's gathered copies of what is about to be written to: the next forward gathers anew."""
    for module in _fsdp_modules(model):
        module.reshard()  # type: ignore[operator]


def unsharded_type(module: nn.Module) -> type[nn.Module]:
    """The module's class before `fully_shard` put its own in front of it."""
    kind = type(module)
    return kind.__mro__[2] if _fsdp_type() in kind.__mro__[:2] else kind


def _fsdp_type() -> type | None:
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _fsdp_modules(model: nn.Module) -> list[nn.Module]:
    kind = _fsdp_type()
    if kind is None:
        return []
    return [module for module in every_module(model) if isinstance(module, kind)]


def _fsdp_params(model: nn.Module) -> Iterator[Any]:
    """FSDP2's own records of the parameters that it shards."""
    for module in _fsdp_modules(model):
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.10
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        for group in groups:
            yield from group.fsdp_params


def is_partition(tensor: Tensor) -> bool:
    """Whether it is a ZeRO-3 parameter."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape")


def _is_dtensor(tensor: object) -> bool:
    if type(tensor) in {Tensor, nn.Parameter}:
        return False
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, getattr(distributed, "DTensor", ()))


def _dtensor_shard(tensor: Any) -> Shard:
    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    with torch.no_grad():
        local = tensor.to_local().detach()
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # another pipeline stage's
        return Shard(shape, local, Run(shape, 0, 0))
    spans: list[tuple[Span, ...]] = [((0, size),) for size in shape]
    for placement, parts, part in zip(tensor.placements, mesh.shape, coordinate, strict=True):
        if placement.is_partial():
            raise MappingError(
                f"a tensor of shape {shape} is placed as {placement}: what it holds is a sum over ranks that was not made "
                "yet; tensor.redistribute(...) it to Shard or Replicate before the load"
            )
        if (dim := getattr(placement, "dim", None)) is not None:
            spans[dim] = _split(spans[dim], getattr(placement, "split_factor", 1), parts, part)
    size = tuple(sum(stop - start for start, stop in each) for each in spans)
    if size != tuple(local.shape):
        raise MappingError(
            f"a tensor of shape {shape} placed as {tuple(tensor.placements)} has {tuple(local.shape)} of its elements here "
            f"instead of {size}; load before it is sharded"
        )
    return Shard(shape, local, None if size == shape else Box(tuple(spans)))


def _split(spans: Sequence[Span], factor: int, parts: int, part: int) -> tuple[Span, ...]:
    """The positions that one of `parts` processes gets: of each of `factor` chunks its chunk, chunks as torch makes them."""
    out: list[Span] = []
    size = sum(stop - start for start, stop in spans)
    for outer in range(factor):
        start, stop = _chunk(0, size, factor, outer)
        out += _between(spans, *_chunk(start, stop, parts, part))
    return tuple(_joined(out)) or ((0, 0),)


def _chunk(start: int, stop: int, parts: int, part: int) -> Span:
    size = -(-(stop - start) // parts)
    return min(start + size * part, stop), min(start + size * (part + 1), stop)


def _between(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The `start`th to `stop`th of the positions that spans list."""
    out, passed = [], 0
    for first, last in spans:
        low, high = max(start - passed, 0), min(stop - passed, last - first)
        if low < high:
            out.append((first + low, first + high))
        passed += last - first
    return out


def _joined(spans: Iterable[Span]) -> list[Span]:
    out: list[Span] = []
    for start, stop in spans:
        if out and out[-1][1] == start:
            start = out.pop()[0]
        out.append((start, stop))
    return out


def _partition(tensor: Any) -> Shard:
    """A ZeRO-3 partition: the flat parameter cut into equal runs, the last one padded."""
    shape, partition = tuple(tensor.ds_shape), tensor.ds_tensor
    for unsupported, what in (
        (partition is None or partition.status.name != "AVAILABLE", "is not in memory (offloaded to NVMe)"),
        (getattr(partition, "ds_quant_scale", None) is not None, "is held quantised"),
        (getattr(tensor, "ds_secondary_tensor", None) is not None, "is held twice (zero_hpz_partition_size)"),
    ):
        if unsupported:
            raise MappingError(
                f"a ZeRO-3 parameter of shape {shape} {what}; load before deepspeed.zero.Init or without it"
            )
    size, group = partition.ds_numel, tensor.ds_process_group
    rank = torch.distributed.get_rank(group)
    if size != -(-tensor.ds_numel // torch.distributed.get_world_size(group)):
        raise MappingError(
            f"a ZeRO-3 parameter of shape {shape} is partitioned over part of its ranks (MiCS); load before it is"
        )
    start, stop = min(rank * size, tensor.ds_numel), min((rank + 1) * size, tensor.ds_numel)
    return Shard(shape, partition.detach().narrow(0, 0, stop - start), Run(shape, start, stop))
