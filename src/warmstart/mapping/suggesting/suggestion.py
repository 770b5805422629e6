"""What `suggest` answers: the rules it is sure of, what it would propose, and what it cannot explain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from warmstart.mapping.grouping import grouped, listed, printable
from warmstart.mapping.plan.table import renaming
from warmstart.mapping.pretrained import Pretrained

Pairs = dict[str, tuple[str, ...]]
_SHOWN = 8


class Coverage(NamedTuple):
    """Shares (0..1) of the elements of both sides that the sure rules explain."""

    checkpoint: float
    model: float


class Unexplained(NamedTuple):
    """Names that neither a rule nor a proposal explains."""

    keys: tuple[str, ...]
    entries: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Proposal:
    """Pairs with some evidence, which are never applied unless `accept` names their entries.

    Attributes:
        mapping: Entry to the keys it would get its value from, in the more likely reading.
        rivals: The other readings that fit as well.
        evidence: What speaks for it.
        doubt: Why it is not sure.
    """

    mapping: Pairs
    rivals: tuple[Pairs, ...]
    evidence: str
    doubt: str

    def __str__(self) -> str:
        out = [f"{line}  ({self.evidence}; {self.doubt})" for line in _lines(self.mapping)[:1]]
        out += _lines(self.mapping)[1:]
        for rival in self.rivals:
            out += [f"or: {line}" if i == 0 else f"    {line}" for i, line in enumerate(_lines(rival))]
        return "\n".join(out)


@dataclass(frozen=True, eq=False, repr=False)
class Suggestion:
    """The rules between a checkpoint and a model, as far as names, shapes and tree structure tell them.

    Attributes:
        pretrained: The source with only the rules that are sure, ready for `load`. What they leave open on either side is
            still an error there, until it is declared.
        mapping: What these rules do: entry to the keys it gets its value from. `plan(model, pretrained)` gives the same.
        proposed: Further pairs, each with its evidence and its rivals.
        unexplained: The names of both sides that nothing explains.
        coverage: The shares of both sides that the sure rules explain.
        model_name: The model's class.
        withheld: Entries to which a key of the same name and shape would go, although nothing is sure of it; the rules
            `exclude` them, so that only what is sure is loaded.
    """

    pretrained: Pretrained
    mapping: Pairs
    proposed: tuple[Proposal, ...]
    unexplained: Unexplained
    coverage: Coverage
    model_name: str
    withheld: tuple[str, ...] = ()

    def to_yaml(self) -> str:
        """The fields of `pretrained` as YAML, as every host takes them; proposals and what is open are comments."""
        out = [f"# {line}".rstrip() for line in self._head()]
        source = self.pretrained.source
        if isinstance(source, str) or hasattr(source, "__fspath__"):
            out.append(f"source: {json.dumps(str(source))}")
        for name, value in self.pretrained.rules().items():
            out += _yaml(name, value)
        out += [f"# {line}".rstrip() for line in self._open()]
        return "\n".join(out) + "\n"

    def __str__(self) -> str:
        rules = [f"  {line}" for name, value in self.pretrained.rules().items() for line in _yaml(name, value)]
        return "\n".join([*self._head(), *rules, *self._open()])

    def __repr__(self) -> str:
        return f"<Suggestion: {self._head()[0]}>"

    def _head(self) -> list[str]:
        keys = len({key for sources in self.mapping.values() for key in sources})
        label = printable(self.pretrained.short_label)
        line = (
            f"{label} -> {self.model_name}: {len(self.mapping):,} entries from {keys:,} keys, sure; "
            f"{_percent(self.coverage.model)} of the model, {_percent(self.coverage.checkpoint)} of the checkpoint"
        )
        return [line]

    def _open(self) -> list[str]:
        out: list[str] = []
        if self.withheld:
            out.append(
                f"left out by exclude, although a key has the same name and shape ({len(self.withheld):,}): other names "
                "say that it may be another tensor; take it out of exclude to load it"
            )
            out += listed(((name, "") for name in self.withheld), limit=_SHOWN, indent="  ").split("\n")
        if self.proposed:
            out.append(
                f"proposed, not applied; to take one: accept=[...] with patterns of its entries ({len(self.proposed)})"
            )
            for proposal in self.proposed[:_SHOWN]:
                out += [f"  {line}" for line in str(proposal).split("\n")]
            if len(self.proposed) > _SHOWN:
                out.append(f"  ... and {len(self.proposed) - _SHOWN} more")
        for what, names in (("keys", self.unexplained.keys), ("entries", self.unexplained.entries)):
            if names:
                out.append(f"unexplained {what} ({len(names):,}):")
                out += listed(((name, "") for name in names), limit=_SHOWN, indent="  ").split("\n")
        return out


def _lines(pairs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """`layers.{0-11}.mlp.up.weight  from layers.#.w3.*`, one line for each kind of pair."""
    kinds = grouped((entry, renaming(entry, keys[0])) for entry, keys in pairs.items())
    out = []
    for group in kinds[:_SHOWN]:
        key = pairs[group.names[0]][0]
        how = f"from {printable(key)}" if len(group) == 1 else group.tag
        out.append(f"{printable(group.template)}  {how}" + (f"  x{len(group)}" if len(group) > 1 else ""))
    return out


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{min(int(share * 1000) / 10, 99.9):.1f} %"  # never rounded up to 100 %


def _yaml(name: str, value: Any) -> list[str]:
    """One field as YAML: JSON's scalars and lists, a mapping with one line for each rule."""
    if isinstance(value, Mapping):
        return [f"{name}:", *(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())]
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        return [f"{name}:", *(f"  - {json.dumps(item)}" for item in value)]
    return [f"{name}: {json.dumps(value)}"]
