"""The fewest readable rename rules that turn one side's names into the other's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from warmstart.mapping.planning.renames import Renamer
from warmstart.mapping.suggesting.leaves import LEAVES
from warmstart.mapping.suggesting.templates import Path
from warmstart.mapping.suggesting.words import INDEX

_CONTEXT = ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1))  # segments of context, left and right
_FEW = 64  # rules up to which each is tried to be left out
_LONG = 200  # segments of a path up to which what differs is looked for; a longer one is renamed as a whole


@dataclass(frozen=True, slots=True)
class Change:
    """Segments of a path, from `start` to before `end`, that become others."""

    start: int
    end: int
    to: Path


@dataclass(frozen=True, slots=True)
class Rule:
    """Segments that become others wherever they stand, or at the start (`first`) or the whole of a name only."""

    source: Path
    target: Path
    first: bool = False
    whole: bool = False

    @property
    def regex(self) -> str:
        return ("^" if self.first else "") + r"\.".join(map(_escaped, self.source)) + ("$" if self.whole else "")

    @property
    def replacement(self) -> str:
        count = 0
        out = []
        for segment in self.target:
            if segment.endswith(INDEX):
                count += 1
                out.append(segment[:-1].replace("\\", r"\\") + rf"\{count}")
            else:
                out.append(segment.replace("\\", r"\\"))
        return ".".join(out) + ("" if self.source else ".")


def _escaped(segment: str) -> str:
    if segment.endswith(INDEX):
        return _literal(segment[:-1]) + r"(\d+)"
    return _literal(segment)


def _literal(text: str) -> str:
    """As `re.escape`, but for characters that mean themselves, so that rules stay readable."""
    return re.sub(r"[^A-Za-z0-9_ -]", lambda m: re.escape(m[0]), text)


def renames(paths: Mapping[Path, Path]) -> dict[str, str]:
    """Rename rules, all of one stage, that turn each path into its image.

    Every difference is tried without context first, then with its neighbours, until it says the same of all paths in which
    it occurs; what cannot be told by its neighbours is written out.

    Args:
        paths: Path of the checkpoint (indices as `#`) to the model's; paths that stay as they are belong here as well.
    """
    changes = {path: _changes(path, image) for path, image in paths.items()}
    places: dict[str, list[tuple[Path, int]]] = defaultdict(list)
    for path in paths:
        for position, segment in enumerate(path):
            places[_kind(segment)].append((path, position))
    rules: dict[Rule, None] = {}
    known: dict[tuple[Rule, int], bool] = {}
    for path, found in changes.items():
        for change in found:
            rules.setdefault(_rule(path, change, changes, places, paths, known))
    return _completed(list(rules), changes, places, paths)


def _changes(path: Path, image: Path) -> list[Change]:
    if path == image:
        return []
    if max(len(path), len(image)) > _LONG:
        return [Change(0, len(path), image)]
    found: list[Change] = []
    for tag, i, j, p, q in SequenceMatcher(None, path, image, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        counts = [sum(s.endswith(INDEX) for s in side) for side in (path[i:j], image[p:q])]
        if counts[0] != counts[1]:
            return [Change(0, len(path), image)]
        found.append(Change(i, j, image[p:q]))
    return [_anchored(change, path) for change in found]


def _anchored(change: Change, path: Path) -> Change:
    """An insertion within a name needs a neighbour to stand at; one at its start has the start."""
    if change.start < change.end or change.start == 0:
        return change
    return Change(change.start - 1, change.end, (path[change.start - 1], *change.to))


def _rule(
    path: Path,
    change: Change,
    changes: Mapping[Path, Sequence[Change]],
    places: Mapping[str, Sequence[tuple[Path, int]]],
    paths: Mapping[Path, Path],
    known: dict[tuple[Rule, int], bool],
) -> Rule:
    if change.start == change.end == 0 and all(c and c[0] == change for c in changes.values()):
        return Rule((), change.to, first=True)
    others = [c for c in changes[path] if c is not change]
    for first in (False, True) if change.start == 0 else (False,):
        for left, right in _CONTEXT:
            start, end = change.start - left, change.end + right
            if start < 0 or end > len(path) or start == end:
                continue
            if any(c.start < end and start < c.end for c in others):
                continue
            if (
                start == change.start
                and all(s in LEAVES or s.isdecimal() for s in path[start : change.end])
                and not first
            ):
                continue  # `bias` or `0` alone would say too much
            rule = Rule(path[start:end], (*path[start : change.start], *change.to, *path[change.end : end]), first)
            if (rule, left) not in known:
                known[rule, left] = _consistent(rule, changes, places, left)
            if known[rule, left]:
                return rule
    return _whole(path, paths[path])


def _consistent(
    rule: Rule,
    changes: Mapping[Path, Sequence[Change]],
    places: Mapping[str, Sequence[tuple[Path, int]]],
    left: int,
) -> bool:
    """Whether the rule is right wherever its segments stand: there is just this change, and no other reaches in."""
    length = len(rule.source)
    for path, at in places[_kind(rule.source[0])]:
        there = path[at : at + length]
        if len(there) < length or (rule.first and at > 0) or not all(map(_meets, rule.source, there)):
            continue
        inside = [
            c for c in changes[path] if (c.start < at + length and at < c.end) or at <= c.start == c.end < at + length
        ]
        if len(inside) != 1:
            return False
        change = inside[0]
        if change.start != at + left or change.start < at or change.end > at + length:
            return False
        if (*path[at : change.start], *change.to, *path[change.end : at + length]) != _made(rule, there):
            return False
    return True


def _kind(segment: str) -> str:
    """Segments that one rule may meet: numbers and indices are of one kind."""
    return (
        segment.rstrip(INDEX + "0123456789") + INDEX if segment[-1:] == INDEX or segment[-1:].isdecimal() else segment
    )


def _meets(ruled: str, segment: str) -> bool:
    return ruled == segment or (INDEX in (ruled[-1:], segment[-1:]) and _kind(ruled) == _kind(segment))


def _made(rule: Rule, there: Path) -> Path:
    """What the rule makes of segments that it meets."""
    caught = iter([segment for ruled, segment in zip(rule.source, there, strict=True) if ruled.endswith(INDEX)])
    return tuple(
        segment[:-1] + next(caught, INDEX)[len(segment) - 1 :] if segment.endswith(INDEX) else segment
        for segment in rule.target
    )


def _merged(rules: Sequence[Rule]) -> dict[str, str]:
    """As regexes and replacements, the longest first; segments that get the same beginning are one rule."""
    starts: dict[Path, list[str]] = defaultdict(list)
    out: dict[str, str] = {}
    for rule in sorted(rules, key=lambda rule: (-len(rule.source), rule.source)):
        added = rule.target[: len(rule.target) - len(rule.source)]
        alone = rule.first and not rule.whole and len(rule.source) == 1 and not rule.source[0].endswith(INDEX)
        if alone and added and rule.target == (*added, *rule.source):
            starts[added].append(rule.source[0])
        else:
            out[rule.regex] = rule.replacement
    for added, segments in starts.items():
        if len(segments) == 1:
            rule = Rule((segments[0],), (*added, segments[0]), first=True)
            out[rule.regex] = rule.replacement
        else:
            out[f"^({'|'.join(map(_literal, sorted(segments)))})"] = Rule((), added).replacement + r"\1"
    return out


def _completed(
    rules: list[Rule],
    changes: Mapping[Path, Sequence[Change]],
    places: Mapping[str, Sequence[tuple[Path, int]]],
    paths: Mapping[Path, Path],
) -> dict[str, str]:
    """The rules; for what they get wrong together, one rule for all its changes, or its whole name; without idle ones."""
    for whole in (False, True):
        for path, image in list(_wrong(_merged(rules), paths)):
            rules.append(_joint(path, image, changes, places) if not whole else _whole(path, image))
    if len(rules) <= _FEW:
        for rule in list(rules):
            fewer = [other for other in rules if other is not rule]
            if next(_wrong(_merged(fewer), paths), None) is None:
                rules = fewer
    return _merged(rules)


def _whole(path: Path, image: Path) -> Rule:
    return Rule(path, image, first=True, whole=True)


def _joint(
    path: Path,
    image: Path,
    changes: Mapping[Path, Sequence[Change]],
    places: Mapping[str, Sequence[tuple[Path, int]]],
) -> Rule:
    found = changes[path]
    if not found:
        return _whole(path, image)
    start, end = found[0].start, found[-1].end
    rule = Rule(path[start:end], image[start : len(image) - (len(path) - end)], first=start == 0)
    alike = [p for p, at in places[_kind(path[start])] if p[at : at + end - start] == rule.source]
    if rule.source and all(p == path or changes[p] == found for p in alike):
        return rule
    return _whole(path, image)


def _wrong(rules: Mapping[str, str], paths: Mapping[Path, Path]) -> Iterator[tuple[Path, Path]]:
    renamer = Renamer([rules])
    for path, image in paths.items():
        if renamer(_example(path)) != _example(image):
            yield path, image


def _example(path: Path) -> str:
    """A name of the template; its indices are 7, 8, ... from the left."""
    count = 6
    out = []
    for segment in path:
        if segment.endswith(INDEX):
            count += 1
            segment = f"{segment[:-1]}{count}"
        out.append(segment)
    return ".".join(out)
