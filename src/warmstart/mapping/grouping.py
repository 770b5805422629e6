"""Many names as few lines: `encoder.layer.{0-11}.attention.{key,query}.weight`."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from warmstart.patterns import Pattern
from warmstart.showing import printable as printable

Tag = TypeVar("Tag", bound=Hashable)

Sets = tuple[frozenset[str], ...]

_SHOWN = 12  # alternatives of one segment that are spelled out


@dataclass(frozen=True, slots=True)
class Group(Generic[Tag]):
    """Names that differ in some segments only, are complete in them, and share a tag (a shape, say)."""

    template: str
    tag: Tag
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def grouped(items: Iterable[tuple[str, Tag]]) -> list[Group[Tag]]:
    """Merge names into templates, in the order of their first name.

    Two names merge only if they agree on the tag and on every other segment, so a template stands for exactly its
    names: nothing is shown that is not there, and a gap in the indices is shown as a gap.
    """
    table: dict[tuple[Tag, Sets], list[str]] = {}
    for name, tag in items:
        cell = (tag, tuple(frozenset((segment,)) for segment in name.split(".")))
        table.setdefault(cell, []).append(name)
    depth = max((len(sets) for _, sets in table), default=0)
    # Words from the last segment backwards, then indices from the first: {query,key} before {0-11}.
    order = [(p, False) for p in reversed(range(depth))] + [(p, True) for p in range(depth)]
    for position, numeric in order * 2:
        merged: dict[Hashable, tuple[set[str], tuple[Tag, Sets], list[str]]] = {}
        for (tag, sets), names in table.items():
            if position < len(sets) and _is_numeric(sets[position]) == numeric:
                key: Hashable = (tag, len(sets), sets[:position], sets[position + 1 :])
                if key in merged:
                    merged[key][0].update(sets[position])
                    merged[key][2].extend(names)
                else:
                    merged[key] = (set(sets[position]), (tag, sets), list(names))
            else:
                merged[(tag, sets)] = (set(), (tag, sets), list(names))
        table = {}
        for values, (tag, sets), names in merged.values():
            if values:
                sets = (*sets[:position], frozenset(values), *sets[position + 1 :])
            table.setdefault((tag, sets), []).extend(names)
    return [Group(_template(sets), tag, tuple(names)) for (tag, sets), names in table.items()]


def listed(items: Iterable[tuple[str, str]], *, limit: int = 12, indent: str = "    ") -> str:
    """Groups as indented lines, at most `limit` of them; the last one says how much is left out."""
    groups = grouped(items)
    lines = []
    for group in groups[:limit]:
        count = f"  x{len(group)}" if len(group) > 1 else ""
        lines.append(f"{indent}{printable(group.template)}  {group.tag}{count}".rstrip())
    if len(groups) > limit:
        rest = groups[limit:]
        lines.append(f"{indent}... and {sum(map(len, rest))} more in {len(rest)} groups")
    return "\n".join(lines)


def covering(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Few patterns that match all of `names` and none of `others`: the highest paths that hold nothing else."""
    names = list(names)
    blocked: set[str] = set()
    for other in others:
        blocked.update(_paths(other))
    found: dict[str, None] = {}
    for name in names:
        path = next((path for path in _paths(name) if path not in blocked), name)
        found.setdefault(path)
    globs: dict[str, None] = {}
    for group in grouped((path, 0) for path in found):
        columns = zip(*(name.split(".") for name in group.names), strict=True)
        glob = ".".join("*" if len(set(column)) > 1 else _literal(column[0]) for column in columns)
        if len(group) > 1 and glob.strip("*.") and not any(map(Pattern(glob).matches, others)):
            globs.setdefault(glob)
        else:
            globs.update(dict.fromkeys(map(_literal, group.names)))
    return list(globs)


def pasteable(field_name: str, names: Collection[str], others: Collection[str]) -> str:
    """`allow_missing=["head"]`: the line to type for `names` and none of `others`, at most eight patterns long."""
    patterns = covering(names, others)
    quoted = (pattern.replace("\\", "\\\\").replace('"', '\\"') for pattern in patterns[:8])
    shown = ", ".join(f'"{printable(pattern)}"' for pattern in quoted)
    return f"{field_name}=[{shown}]" + (f" and {len(patterns) - 8} more patterns" if len(patterns) > 8 else "")


def _literal(name: str) -> str:
    """The pattern that matches this name only, whatever characters of a glob it holds; a huge name is cut."""
    return re.sub(r"[\[*?]", r"[\g<0>]", name[:200]) + "*" * (len(name) > 200)


def _paths(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_numeric(segments: Collection[str]) -> bool:
    # `01` is a word: as a number it would be shown as another name.
    return all(re.fullmatch(r"0|[1-9][0-9]{0,17}", segment) for segment in segments)


def _template(sets: Sequence[frozenset[str]]) -> str:
    return ".".join(next(iter(s)) if len(s) == 1 else "{" + _alternatives(s) + "}" for s in sets)


def _alternatives(segments: frozenset[str]) -> str:
    if _is_numeric(segments):
        return _ranges(sorted(map(int, segments)))
    words = sorted(segments)
    if len(words) > _SHOWN:
        return ",".join(words[:_SHOWN]) + f",... {len(words) - _SHOWN} more"
    return ",".join(words)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}-{b}" for a, b in runs]
    if len(parts) > _SHOWN:
        return ",".join(parts[:_SHOWN]) + f",... {len(parts) - _SHOWN} more"
    return ",".join(parts)
