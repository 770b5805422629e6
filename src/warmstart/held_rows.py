"""Some rows of a parameter stay bit for bit what they are, while the others train."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from warmstart.shards import Box, full_shape, gathered, is_sharded, local_of, shard_of
from warmstart.tensors import digest, sample


class HeldRows:
    """Holds rows of one parameter, as slices along one dimension.

    They get no gradient; and because weight decay and momentum move what has none, they are put back after every step of
    any torch optimizer that holds the parameter. A copy of the model (`copy.deepcopy`, pickle) holds nothing: freeze it anew.

    Attributes:
        tensor: The parameter.
        dim: The dimension that the rows are counted along.
        index: The rows that this process has, an int64 tensor, counted in its own part of a sharded parameter.
    """

    def __init__(self, tensor: Tensor, mask: Tensor | None) -> None:
        """Hold what a mask says.

        Args:
            tensor: The parameter.
            mask: Booleans that broadcast to it and vary along one dimension at most; None holds every row.
        """
        varying = [d for d in range(tensor.dim()) if mask is not None and mask.shape[d - tensor.dim()] > 1]
        self.dim = varying[0] if varying else 0
        size = full_shape(tensor)[self.dim]
        self._rows = torch.ones(size, dtype=torch.bool) if mask is None else mask.reshape(-1).expand(size)
        self._kept: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self.released = False
        for other in list(_ACTIVE):
            if other.tensor is tensor:  # of a load before this one
                other.release()
        self._take(tensor)
        _watch(self)

    def _take(self, tensor: Tensor) -> None:
        self.tensor = tensor
        shard = shard_of(tensor)
        here = Box((shard.region.spans[self.dim],)).take(self._rows) if isinstance(shard.region, Box) else self._rows
        self.index = here.nonzero().reshape(-1).to(tensor.device)
        self._set_hook()
        self.rebase()

    def follow(self, tensor: Tensor, *, resumed: bool) -> None:
        """Go on with the shards that an engine has put in the place of the whole parameter; each rank calls it.

        The shards of all ranks together must have the held rows, unless a resume has put the run's own there.
        """
        whole = gathered(tensor)
        rows = whole.index_select(self.dim, self._rows.nonzero().reshape(-1).to(whole.device))
        if resumed or digest(rows.to(self._digests[0])) == self._digests[1]:
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            self._take(tensor)

    def _set_hook(self) -> None:
        if self._hook is None and self.tensor.requires_grad:
            self._hook = self.tensor.register_hook(self._without_gradient)  # type: ignore[no-untyped-call]

    @property
    def mask(self) -> Tensor:
        """The held rows as booleans that broadcast to the parameter."""
        return self._rows.reshape([-1 if d == self.dim else 1 for d in range(self.tensor.dim())])

    def rows(self) -> Tensor:
        """A copy of the held rows, of a sharded parameter of those that this process has."""
        local = local_of(self.tensor).detach()
        self.index = self.index.to(local.device)  # the host may have moved the model since
        return local.index_select(self.dim, self.index)

    def rebase(self) -> None:
        """Take the present values as the held ones."""
        rows = self.rows()
        self._digests = (rows.dtype, digest(rows), digest(sample(rows)))

    def unchanged(self, *, sampled: bool) -> bool:
        """Whether the rows are what they were, bit for bit; a cast that the host made is taken as the new value."""
        if self.released:
            return True
        rows = self.rows()
        if rows.dtype != self._digests[0]:
            self.rebase()
            return True
        return digest(sample(rows)) == self._digests[2] if sampled else digest(rows) == self._digests[1]

    def release(self) -> None:
        """Let the rows train."""
        self.released = True
        if self._hook is not None:
            self._hook.remove()
        _ACTIVE.discard(self)

    def _without_gradient(self, grad: Tensor) -> Tensor:
        if is_sharded(
            self.tensor
        ):  # engines show hooks such a gradient in any placement, or not at all: see `_before_step`
            return grad
        if grad.is_sparse:  # of an embedding with sparse=True: (row, value) pairs
            grad = grad.coalesce()
            free = ~torch.isin(grad.indices()[0], self.index.to(grad.device))
            return torch.sparse_coo_tensor(
                grad.indices()[:, free], grad.values()[free], grad.shape, is_coalesced=True, check_invariants=False
            )
        return grad.index_fill(self.dim, self.index.to(grad.device), 0)

    def _before_step(self) -> None:
        self._set_hook()
        self._kept = self.rows()
        grad = self.tensor.grad
        if grad is not None and is_sharded(grad) and local_of(grad).shape == local_of(self.tensor).shape:
            local_of(grad).index_fill_(self.dim, self.index, 0)

    def _after_step(self) -> None:
        if self._kept is not None:
            with torch.no_grad():
                local_of(self.tensor).index_copy_(self.dim, self.index, self._kept)
            self._kept = None


# The hooks are torch's own, for all optimizers; they are set once, with the first rows that are held.
_ACTIVE: weakref.WeakSet[HeldRows] = weakref.WeakSet()
_hooks: list[Any] = []


def _watch(rows: HeldRows) -> None:
    _ACTIVE.add(rows)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(lambda opt, args, kwargs: _each(opt, before=True)))
        _hooks.append(register_optimizer_step_post_hook(lambda opt, args, kwargs: _each(opt, before=False)))


def _each(optimizer: torch.optim.Optimizer, *, before: bool) -> None:
    held = list(_ACTIVE)
    if not held:
        return
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for rows in held:
        if id(rows.tensor) in params:
            rows._before_step() if before else rows._after_step()
