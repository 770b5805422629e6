"""`Conversion`: which keys become which entries, by templates, and what is done to their tensors on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from warmstart.errors import MappingError
from warmstart.mapping.conversions.ops.applying import Apply
from warmstart.mapping.conversions.ops.base import Op
from warmstart.mapping.conversions.ops.joining import Concat, Split
from warmstart.mapping.conversions.ops.registry import OPS
from warmstart.mapping.conversions.ops.stacking import Stack, Unstack
from warmstart.mapping.conversions.templates import Template, numbered
from warmstart.mapping.declared import declared
from warmstart.mapping.grouping import printable


@dataclass(frozen=True)
class Conversion:
    """Tensors of several keys to several names.

        Conversion(["layers.{i}.experts.{e}.w1", "layers.{i}.experts.{e}.w3"], "layers.{i}.experts.gate_up",
                   ops=[Stack(over="e", dim=0), Concat(dim=1)])

    A name is a template: `{x}` stands for one segment or a part of one, `{x...}` for zero or more segments, `{2*i+1}` for
    that number; a brace of the name itself is written twice. The values of the placeholders that both sides have make one
    *instance* of the conversion each. A placeholder that only the sources have gathers all its values, in natural order;
    one that only the targets have is made by `Unstack`. A source without one of the shared placeholders is read by every
    instance. One result goes to one target, in order; with no ops, one source is copied to each of the targets.

    Attributes:
        sources: One template or several. A leading `?` on any of them: the conversion may match nothing.
        targets: One template or several, relative to `into`.
        ops: What is done, in order; as objects, or as in YAML `[{stack: {over: e, dim: 0}}, {concat: {dim: 1}}]`.

    Raises:
        MappingError: A template or an op that cannot be meant.
        TypeError: A value of another type.
    """

    sources: str | Sequence[str]
    targets: str | Sequence[str]
    ops: Sequence[Op | Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", _texts(self.sources, "sources"))
        object.__setattr__(self, "targets", _texts(self.targets, "targets"))
        if isinstance(self.ops, str | Mapping) or not isinstance(self.ops, Sequence):
            raise TypeError(f"ops={self.ops!r}: a list of ops, such as [{{concat: {{dim: 0}}}}]")
        ops = tuple(declared(op, OPS, f"ops[{number}]") for number, op in enumerate(self.ops))
        object.__setattr__(self, "ops", ops)
        self._check()

    @cached_property
    def optional(self) -> bool:
        """Whether it may match nothing."""
        return any(source.startswith("?") for source in self.sources)

    @cached_property
    def copies(self) -> bool:
        """Whether one tensor is copied to each of the targets."""
        return not self.ops and len(self.sources) == 1

    @cached_property
    def source_templates(self) -> tuple[Template, ...]:
        """The parsed sources."""
        return self._templates[: len(self.sources)]

    @cached_property
    def target_templates(self) -> tuple[Template, ...]:
        """The parsed targets."""
        return self._templates[len(self.sources) :]

    @cached_property
    def steps(self) -> tuple[Op, ...]:
        """The ops as objects."""
        return tuple(op for op in self.ops if isinstance(op, Op))

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The placeholders that both sides have, whose values name an instance; sorted."""
        made = {name for template in self.target_templates for name in template.names}
        return tuple(sorted(made.intersection(*[[n for t in self.source_templates for n in t.names]])))

    def inverse(self) -> Conversion:
        """The conversion back, from the targets to the sources, as far as it can be declared without shapes.

        Raises:
            MappingError: An op has no declared inverse; the message names it.
        """
        sources = [source.removeprefix("?") for source in self.sources]
        targets = [("?" if self.optional and not n else "") + text for n, text in enumerate(self.targets)]
        if not self.ops and len(sources) < len(targets):
            raise MappingError(
                f"{self}: a copy to several targets has no declared inverse; write one that takes one of them"
            )
        slots: int | None = len(sources)
        ops: list[Op] = []
        for op in self.steps:
            if isinstance(op, Concat) and (slots == 1 or slots != len(sources)):
                raise MappingError(
                    f"{self}: the inverse of {op} needs to know the tensors that it joins; "
                    f"write the conversion back with Split(dim={op.dim}, sizes=[...])"
                )
            ops.insert(0, op.inverted())
            if isinstance(op, Split):
                slots = len(targets if op.sizes is None else op.sizes)
            elif isinstance(op, Concat | Apply):
                slots = 1 if isinstance(op, Concat) else None
        return Conversion(targets, sources, ops)

    def __str__(self) -> str:
        ops = f" by {', '.join(map(str, self.ops))}" if self.ops else ""
        return f"{', '.join(map(printable, self.sources))} -> {', '.join(map(printable, self.targets))}{ops}"

    @cached_property
    def _templates(self) -> tuple[Template, ...]:
        texts = [source.removeprefix("?") for source in self.sources] + list(self.targets)
        numbers = numbered(Template(text) for text in texts)
        return tuple(Template(text, numbers) for text in texts)

    def _check(self) -> None:
        for template in self.source_templates:
            template.check_source()
        for side, texts in (("sources", self.source_templates), ("targets", self.target_templates)):
            if len({template.text for template in texts}) < len(texts):
                raise MappingError(f"{self}: the same template twice in {side}=; write it once")
        rests: dict[str, bool] = {}
        for placeholder in (p for template in self._templates for p in template.placeholders):
            if rests.setdefault(placeholder.name, placeholder.rest) != placeholder.rest:
                name = placeholder.name
                raise MappingError(f"{self}: both {{{name}}} and {{{name}...}}; give one of them another name")
        if self.shared and not any(set(self.shared) <= set(t.names) for t in self.source_templates):
            names = ", ".join(f"{{{name}}}" for name in self.shared)
            raise MappingError(
                f"{self}: one of the sources must have all of {names}, which the targets share with them"
            )
        self._check_placeholders()

    def _check_placeholders(self) -> None:
        """Every placeholder of one side only must be joined, or made, by an op."""
        gathered = {name for t in self.source_templates for name in t.names}.difference(self.shared)
        produced = {name for t in self.target_templates for name in t.names}.difference(self.shared)
        known = set(gathered)
        for op in self.steps:
            if isinstance(op, Stack):
                if op.over not in known:
                    raise MappingError(
                        f"{self}: {op} needs a placeholder {{{op.over}}} that only the sources have; "
                        f"those are {', '.join(sorted(known)) or 'none'}"
                    )
                known.discard(op.over)
                produced.discard(op.over)
            elif isinstance(op, Unstack):
                if op.over in self.shared:
                    raise MappingError(
                        f"{self}: {op} makes {{{op.over}}}, which the sources have already; rename it there"
                    )
                known.add(op.over)
                produced.discard(op.over)
        if produced:
            name = min(produced)
            raise MappingError(
                f"{self}: nothing gives {{{name}}} a value, which only the targets have; write it in the sources too, "
                f"or make it of a dimension: Unstack(over={name!r}, dim=0)"
            )
        joins = any(isinstance(op, Concat | Apply) for op in self.steps)
        if not joins and (left := gathered & known):
            name = min(left)
            raise MappingError(
                f"{self}: {{{name}}} is only in the sources, so that all its values are gathered, but no op joins them; "
                f"add Stack(over={name!r}, dim=0), or write it in the targets too"
            )


def conversion(value: object, where: str) -> Conversion:
    """A conversion as it is, or from plain data: `{sources: ..., targets: ..., ops: [...]}`.

    Args:
        value: Either of them.
        where: Where it was written, for messages.

    Raises:
        MappingError: It cannot be meant.
        TypeError: A value of another type.
    """
    if isinstance(value, Conversion):
        return value
    known = [field.name for field in fields(Conversion)]
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: a Conversion or a mapping with {', '.join(known)}, not {value!r}")
    unknown = [str(name) for name in value if name not in known]
    if unknown or not {"sources", "targets"} <= set(value):
        what = f"{', '.join(map(printable, unknown))} is no field" if unknown else "sources and targets are both needed"
        raise MappingError(f"{where}: {what}; write {{sources: [...], targets: [...], ops: [...]}}")
    try:
        return Conversion(**value)
    except MappingError as error:
        raise MappingError(f"{where}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None


def _texts(value: object, where: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not all(isinstance(text, str) for text in texts) or (not texts and not isinstance(value, Sequence)):
        raise TypeError(f"{where}={value!r}: a name template is a string, several are a list of strings")
    if not texts:
        raise MappingError(f"{where}=[] names nothing; write at least one template, such as 'layers.{{i}}.weight'")
    return texts
