"""Plain keys of parametrized tensors: a `weight` for a layer that computes its weight from something else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from warmstart.errors import MappingError
from warmstart.mapping.buckets import Problem
from warmstart.mapping.derivations import Derivation, Shape
from warmstart.mapping.grouping import printable
from warmstart.mapping.keys import Key
from warmstart.mapping.model.names import join


class RightInverse(Derivation):
    """What `layer.weight = value` stores in a layer whose `weight` is parametrized (`torch.nn.utils.parametrize`).

    Computed on a copy, in the wider dtype of key and layer, with a random state of its own: completing a basis takes
    random numbers (`torch.nn.utils.parametrizations.orthogonal`), and every rank and every reading must have the same.
    """

    may_refuse = True

    def __init__(self, label: str, key: Key, path: str, parametrizations: ParametrizationList) -> None:
        """Try it on what the layer holds now, which any `right_inverse` has to accept.

        Args:
            label: The layer's tensor, for messages.
            key: The plain key.
            path: Where the layer keeps what the tensor is computed from, relative to `into`.
            parametrizations: The layer's own; copied.

        Raises:
            MappingError: A parametrization has no `right_inverse`, or the key has another shape than the tensor.
        """
        lacking = [type(p).__name__ for p in parametrizations if not hasattr(p, "right_inverse")]
        if lacking:
            raise MappingError(
                f"{lacking[0]} has no right_inverse to say what to store\n"
                "  -> give it one, def right_inverse(self, value): ..., or load before register_parametrization"
            )
        self.label = label
        self.sources = key.sources
        self._key = key
        own = next(
            t for t in [*parametrizations._parameters.values(), *parametrizations._buffers.values()] if t is not None
        )
        dtype = torch.promote_types(key.dtype, own.dtype) if key.dtype.is_floating_point else own.dtype
        with torch.random.fork_rng(devices=[]):
            self._copy = _with_values(copy.deepcopy(parametrizations)).to(dtype).eval()
            value = self._copy().detach()
        if tuple(value.shape) != key.shape:
            raise MappingError(
                f"of another shape: {key.shape} in the checkpoint, {tuple(value.shape)} in the model\n"
                "  -> load before register_parametrization, where adapt= can change its shape"
            )
        _, stored, self.identity = self._stored(value)
        self._names = tuple(stored)
        self.targets = tuple(join(path, name) for name in stored)
        self.shapes: list[Shape | None] = [tuple(t.shape) for t in stored.values()]
        self.dtypes = [t.dtype for t in stored.values()]

    def run(self, read: Callable[[int], Tensor]) -> list[Tensor]:
        """The tensors to store, on the CPU.

        Raises:
            MappingError: The parametrization refuses the value.
        """
        made = self._key.made
        value = read(0) if made is None else made.run(read)[self._key.output]
        value = value.to(self.dtypes[0])
        try:
            layer, stored, _ = self._stored(value)
            made = layer().detach()
        except Exception as error:  # the parametrization's code: anything
            raise MappingError(f"{self.label}: right_inverse refuses the checkpoint's value: {error}") from error
        if (off := (made - value).abs().max().item()) > 1e-3 * value.abs().max().item():
            raise MappingError(
                f"{self.label}: its parametrization cannot hold the checkpoint's value, and would make another one of it "
                f'(up to {off:.2g} away)\n  -> leave it out: exclude=["{self.label}"], or load before register_parametrization'
            )
        return [stored[name] for name in self._names]

    def undo(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        raise MappingError(f"{self.label}: {self.no_inverse}")

    @property
    def no_inverse(self) -> str:
        return "a parametrization computes its tensor again, and may round"

    def _stored(self, value: Tensor) -> tuple[ParametrizationList, dict[str, Tensor], bool]:
        """A fresh copy after the assignment, what it holds where it was written to, and whether that is `value` itself."""
        layer = copy.deepcopy(self._copy)
        before = {name: (t, t._version) for name, t in layer.state_dict(keep_vars=True).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer.right_inverse(value)
        after = layer.state_dict(keep_vars=True)
        stored = {
            name: t.detach()
            for name, t in after.items()
            if name not in before or before[name][0] is not t or before[name][1] != t._version
        }
        only = next(iter(stored.values())) if len(stored) == 1 else None
        identity = only is not None and only.data_ptr() == value.data_ptr() and only.stride() == value.stride()
        return layer, stored, identity


def _with_values(layer: ParametrizationList) -> ParametrizationList:
    """A copy on the CPU; of one on meta, with ones."""
    if not any(t.is_meta for t in [*layer.parameters(), *layer.buffers()]):
        return layer.cpu()
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.fill_(1)
    return layer


def outputs_of(made: Derivation) -> list[Key]:
    """The keys that stand for a derivation's outputs."""
    return [
        Key(name, name, name, shape, dtype, made, i)
        for i, (name, shape, dtype) in enumerate(zip(made.targets, made.shapes, made.dtypes, strict=True))
    ]


def into_parametrizations(
    keys: list[Key], modules: Mapping[str, nn.Module], into: str = ""
) -> tuple[list[Key], list[Problem]]:
    """Replace the plain key of each parametrized tensor, unless the pool has what it is computed from.

    Where all parametrizations store the value as it is, the key is only renamed.

    Args:
        keys: The pool.
        modules: Clean path below `into` to module, "" for the root.
        into: The root's own clean path, for messages.

    Returns:
        The new pool, and the keys that cannot be stored, with what to do.
    """
    tensors = {
        join(path, name): (join(path, "parametrizations", name), parametrizations)
        for path, module in modules.items()
        if is_parametrized(module)
        for name, parametrizations in module.parametrizations.items()  # type: ignore[union-attr, operator]
    }
    if not tensors:
        return keys, []
    stored = {key.name.rpartition(".")[0] for key in keys}
    out: list[Key] = []
    errors: list[Problem] = []
    for key in keys:
        path, parametrizations = tensors.get(key.name, ("", None))
        if parametrizations is None or path in stored or key.shape is None:
            out.append(key)
            continue
        label = printable(join(into, key.name))
        try:
            made = RightInverse(label, key, path, parametrizations)
        except Exception as error:  # the parametrization's code: anything
            fix = "" if isinstance(error, MappingError) else "\n  -> load before register_parametrization"
            message = f"'{printable(key.spelled)}' is a plain tensor, and '{label}' is parametrized: {error}{fix}"
            errors.append(Problem("load hook", message, (key.spelled,)))
            out.append(key)
            continue
        if made.identity:
            key.name = made.targets[0]
            out.append(key)
            continue
        out += outputs_of(made)
    return out, errors
