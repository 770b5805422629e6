"""A checkpoint under rules alone, without a model: selected, renamed, converted and cast, read lazily."""

from __future__ import annotations

import torch
from torch import Tensor

from warmstart.checkpoints.base import Checkpoint, Index, TensorInfo
from warmstart.errors import MappingError
from warmstart.mapping.buckets import Part, Problem
from warmstart.mapping.conversions.converting import convert
from warmstart.mapping.derivations import Derivation
from warmstart.mapping.grouping import printable
from warmstart.mapping.keys import Key
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.planning.pool import renamed, selected, without_collisions
from warmstart.mapping.pretrained import Pretrained
from warmstart.tensors import dtype_name, non_finite

_CHUNK = 1 << 20  # elements that are looked at together


class RuledCheckpoint(Checkpoint):
    """What `select`, `strip_prefix`, `rename` and `convert` make of a checkpoint.

    Keys are taken as the file spells them: which segments are a wrapper's, only a model can tell.

    Attributes:
        source: The checkpoint itself.
        left_out: Its keys that `select` leaves out.
    """

    def __init__(self, pretrained: Pretrained, source: Checkpoint, dtype: torch.dtype | None = None) -> None:
        """Apply the rules to names, shapes and dtypes.

        Args:
            pretrained: The rules; its other fields are not looked at.
            source: The checkpoint that they apply to.
            dtype: What floating tensors are cast to; None leaves every tensor its own.

        Raises:
            MappingError: A rule hits nothing, two keys get one name, or a conversion does not work out.
        """
        self.source = source
        keys, self.left_out = _ruled(pretrained, source)
        self._keys = {key.name: key for key in keys}
        self._made: tuple[Derivation | None, list[Tensor]] = (None, [])
        infos = {}
        for key in keys:
            assert key.shape is not None
            infos[key.name] = TensorInfo(key.shape, _cast(key.dtype, dtype))
        super().__init__(
            location=source.location,
            format=source.format,
            infos=infos,
            files=source.files,
            checkpoint_key=source.checkpoint_key,
            metadata=source.metadata,
            notes=source.notes,
        )

    def _read(self, key: str, index: Index | None) -> Tensor:
        value = self._value(self._keys[key])
        wanted = self.info(key).dtype
        if value.dtype != wanted:
            cast = value.to(wanted)
            if _overflows(value, cast):
                raise MappingError(
                    f"dtype: '{printable(key)}' holds values beyond the range of {dtype_name(wanted)}; choose a wider dtype, "
                    "such as bfloat16 or float32"
                )
            value = cast
        return value if index is None else value[index]

    def _value(self, key: Key) -> Tensor:
        if key.made is None:
            return self.source.read(key.spelled)
        if self._made[0] is not key.made:
            self._made = (None, [])  # frees what the one before made
            sources = key.made.sources
            self._made = (key.made, key.made.run(lambda i: self.source.read(sources[i])))
        return self._made[1][key.output]


def _ruled(pretrained: Pretrained, source: Checkpoint) -> tuple[list[Key], list[str]]:
    out = PartPlan(Part(pretrained, source, None, ()))
    keys = [Key(name, name, name, source.info(name).shape, source.info(name).dtype) for name in source.keys()]
    keys = selected(keys, pretrained, out)
    renamed(keys, pretrained, out)
    keys = without_collisions(keys, out)
    if pretrained.conversions:
        converting = convert(keys, pretrained.conversions)
        out.errors += converting.errors
        for key in converting.displaced:
            out.problem(
                "collision", f"a conversion makes '{printable(key.name)}', and there is a key of that name already"
            )
        keys = converting.keys
        _settle(keys, out.errors)
    if not keys and not out.errors:
        out.problem("nothing matched", "nothing is left of the checkpoint; widen select=")
    if out.errors:
        count = "1 error" if len(out.errors) == 1 else f"{len(out.errors)} errors"
        shown = [f"{problem.kind}: {problem.message}" for problem in out.errors[:12]]
        if len(out.errors) > 12:
            shown.append(f"... and {len(out.errors) - 12} more")
        raise MappingError(
            "\n\n".join([f"the rules do not fit {pretrained.label}: {count}, nothing was written", *shown])
        )
    # What one conversion makes stands together, so that it runs once.
    place = {id(key.made): number for number, key in reversed(list(enumerate(keys))) if key.made is not None}
    order = [place.get(id(key.made), number) for number, key in enumerate(keys)]
    return [keys[i] for i in sorted(range(len(keys)), key=order.__getitem__)], out.ignored


def _settle(keys: list[Key], errors: list[Problem]) -> None:
    """Shapes that would be those of a model's entries: equal parts, or an error."""
    failed: set[int] = set()
    for key in keys:
        if key.shape is None and key.made is not None and id(key.made) not in failed:
            try:
                key.made.resolve([None] * len(key.made.targets))
            except MappingError as error:
                failed.add(id(key.made))
                errors.append(Problem("conversion", str(error), key.made.sources))
                continue
        if key.made is not None and id(key.made) not in failed:
            key.shape, key.dtype = key.made.shapes[key.output], key.made.dtypes[key.output]


def _overflows(value: Tensor, cast: Tensor) -> bool:
    before, after = value.reshape(-1), cast.reshape(-1)
    parts = (slice(start, start + _CHUNK) for start in range(0, before.numel(), _CHUNK))
    return any(bool((non_finite(after[part]) & ~non_finite(before[part])).any()) for part in parts)


def _cast(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point else dtype
