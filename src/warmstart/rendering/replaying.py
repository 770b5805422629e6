"""What each rule of a source did: planning's naming steps once more, with every step counted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from warmstart.errors import MappingError
from warmstart.mapping.buckets import Assignment, Buckets
from warmstart.mapping.model.names import join, strip
from warmstart.mapping.planning.renames import Rename, Renamer
from warmstart.patterns import PatternSet, as_patterns

_OF_KEYS = ("select", "allow_unexpected")
_OF_ENTRIES = ("include", "exclude", "allow_missing", "allow_mismatched", "freeze")
_BY_ENTRY = ("adapt", "fill")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule and what it hit.

    Attributes:
        field: `Pretrained`'s field; `prefix` for the pair that was inferred.
        text: The rule as it was written.
        hits: How many names it hit, needed or not; None for a setting that hits none.
        unit: What it hits: checkpoint keys, entries of the model, or instances of a conversion.
    """

    field: str
    text: str
    hits: int | None = None
    unit: Literal["keys", "entries", "instances", ""] = ""


class Replay:
    """One source's keys under the names that its rules gave them."""

    def __init__(self, plan: Buckets, number: int) -> None:
        self._plan, self._number, self._part = plan, number, plan.parts[number]
        rules = self._part.pretrained
        self._clean = plan.targets.key_cleaner()
        self._into = plan.targets.clean_paths.get(rules.into, rules.into)
        self._prefix = (rules.strip_prefix or "").removeprefix("?").strip(".")
        self._select = PatternSet(rules.select, where="select")
        self._renames: list[Rename] = []
        self._named: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._stripped = 0
        try:
            renamer = Renamer(rules.stages)
            self._renames = [rule for stage in renamer.stages for rule in stage]
            for key in self._part.checkpoint.keys():
                if self.selects(key):
                    self._named[key] = self._name(key, renamer)
        except MappingError:
            pass  # a rename that leaves nothing of a name: the plan's own error says so
        self._matched = {
            a.target
            for a in plan.assignments
            if a.part == number and a.conversion is None and a.sources and not self._lands(a)
        }

    def selects(self, key: str) -> bool:
        return not self._select or self._select.matches(key, self._clean(key))

    def names(self, key: str) -> tuple[str, str]:
        """A key without wrapper segments, and the name in the whole model that its rules gave it."""
        clean = self._clean(key)
        return clean, join(self._into, self._named.get(key, (clean, ()))[0])

    def how(self, assignment: Assignment) -> str:
        """What brought an entry its value, in a few words."""
        if assignment.alias_of is not None:
            return "tied"
        if assignment.fill is not None:
            return f"fill {assignment.fill:g}"
        key = assignment.sources[0]
        if assignment.conversion is not None:
            words = [assignment.conversion.label]
        else:
            words = list(self._named.get(key, (key, ()))[1])
            if assignment.target in self._matched:
                words.append(self._match)
        if not words and key != assignment.target:
            words.append(f"into {self._into}" if self._into else "wrapper segments")
        if assignment.adapter is not None:
            words.append(type(assignment.adapter).__name__)
        return ", ".join(words) or "same name"

    def rules(self) -> list[Rule]:
        """Every rule of the source, in the order of `Pretrained`'s fields."""
        out = [rule for field, value in self._part.pretrained.rules().items() for rule in self._counted(field, value)]
        if self._part.prefix is not None:
            strip_, add = self._part.prefix
            out.append(Rule("prefix", f"inferred: {strip_!r} to {add!r}", len(self._matched), "keys"))
        return out

    def _name(self, key: str, renamer: Renamer) -> tuple[str, tuple[str, ...]]:
        name, steps = self._clean(key), []
        if self._prefix and (rest := strip(name, self._prefix)) is not None:
            self._stripped += 1
            name = rest
            steps.append("strip_prefix")
        before = [rule.hits for rule in self._renames]
        name = renamer(name)
        steps += [f"rename {r.rule}" for r, hits in zip(self._renames, before, strict=True) if r.hits > hits]
        return name, tuple(steps)

    def _lands(self, assignment: Assignment) -> bool:
        """Whether the rules alone lead to this entry, without a prefix, a suffix or a module's say."""
        return self._plan.targets.entries[assignment.target].clean == self.names(assignment.sources[0])[1]

    @property
    def _match(self) -> str:
        if self._part.prefix is not None:
            return "inferred prefix"
        return "longest suffix" if self._part.pretrained.match == "suffix" else "its module's own names"

    def _counted(self, field: str, value: Any) -> Iterator[Rule]:
        rules = self._part.pretrained
        if field in _OF_KEYS:
            keys = [(key, self._clean(key)) for key in self._part.checkpoint.keys()]
            for pattern in as_patterns(value):
                yield Rule(field, pattern.text, _hits(pattern.text, keys), "keys")
        elif field in _BY_ENTRY or (field in _OF_ENTRIES and value is not True):
            entries = [self._plan.targets.spellings(name) for name in self._plan.targets.entries]
            how = {p: f": {v}" for p, v in value.items()} if field in _BY_ENTRY else {}
            for pattern in as_patterns(list(value) if how else value):
                yield Rule(field, pattern.text + how.get(pattern.text, ""), _hits(pattern.text, entries), "entries")
        elif field == "rename":
            for rename in self._renames:
                yield Rule(field, f"{rename.rule} to {rename.replacement or '(nothing)'}", rename.hits, "keys")
        elif field == "convert":
            for conversion in rules.conversions:
                made = {
                    id(a.conversion) for a in self._mine() if a.conversion and a.conversion.label == str(conversion)
                }
                yield Rule(field, str(conversion), len(made), "instances")
        elif field == "strip_prefix" and value:
            yield Rule(field, str(value), self._stripped, "keys")
        elif field == "into":
            yield Rule(field, str(value), len(self._part.scope), "entries")
        elif field == "freeze":
            frozen = set(self._plan.freeze)
            yield Rule(field, "True", sum(a.target in frozen for a in self._mine()), "entries")
        elif field == "match":
            yield Rule(field, str(value), len(self._matched), "keys")
        else:
            yield Rule(field, repr(value))

    def _mine(self) -> list[Assignment]:
        return [a for a in self._plan.assignments if a.part == self._number]


def _hits(pattern: str, names: Collection[tuple[str, ...]]) -> int:
    patterns = PatternSet(pattern, where="")
    return sum(patterns.matches(*spellings) for spellings in names)
