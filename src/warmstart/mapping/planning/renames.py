"""Renames: regex rules on whole path segments, all rules of a stage at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from warmstart.errors import MappingError
from warmstart.mapping.grouping import printable

# A match must start and end at a segment boundary: at an end of the key, or with a dot just outside or just inside of it.
# Written around the rule, so that the regex engine backtracks to a match that fits instead of giving up on its first.
_BOUNDARY = r"(?:(?<![^.])|(?![^.]))"


class Rename:
    """One rule, compiled once, that counts the keys it hit."""

    def __init__(self, rule: str, replacement: str, stage: int) -> None:
        self.rule = rule
        self.replacement = replacement
        self.stage = stage
        self.optional = rule.startswith("?")
        self.hits = 0
        text = rule.removeprefix("?")
        try:
            self.regex = re.compile(f"{_BOUNDARY}(?:{text}){_BOUNDARY}")
            # Expanding the template once finds an unknown group before any key is touched.
            if probe := re.compile(f"(?:{text})|").match(""):
                probe.expand(replacement)
        except (re.error, IndexError, RecursionError, OverflowError) as error:
            raise MappingError(
                f"rename: {rule!r} -> {replacement!r} is no valid regex and replacement: {error}. "
                "Write it as for re.sub, for example {r'layers\\.(\\d+)': r'layer.\\1'}"
            ) from None


class Renamer:
    """All stages of one source's renames."""

    def __init__(self, stages: Sequence[Mapping[str, str]]) -> None:
        self.stages = [
            [Rename(rule, replacement, i) for rule, replacement in stage.items()] for i, stage in enumerate(stages)
        ]

    def __call__(self, key: str) -> str:
        """The key's new name.

        Raises:
            MappingError: Nothing would be left of the name.
        """
        for stage in self.stages:
            key = _rename(key, stage)
        return key

    def without_hit(self) -> list[Rename]:
        return [rule for stage in self.stages for rule in stage if not rule.hits and not rule.optional]


def _rename(key: str, rules: Sequence[Rename]) -> str:
    """One stage: at each point the leftmost match wins, then the first listed rule; replaced text is not looked at again."""
    out: list[str] = []
    position = 0
    empty_at = -1  # where a zero-width match was replaced: the next match there must have a width
    last: Rename | None = (
        None  # the rule that matched last: `(.*)` does not match once more at the end of its own match
    )
    hit: set[Rename] = set()
    while position <= len(key):
        best: tuple[int, int, re.Match[str], Rename] | None = None
        for order, rule in enumerate(rules):
            match = rule.regex.search(key, position)
            spent = position if rule is last else empty_at
            if match and match.end() == match.start() == spent:
                match = next((m for m in rule.regex.finditer(key, position) if m.end() > spent), None)
            if match and (best is None or (match.start(), order) < best[:2]):
                best = (match.start(), order, match, rule)
        if best is None:
            break
        _, _, match, rule = best
        out += [key[position : match.start()], match.expand(rule.replacement)]
        position = match.end()
        empty_at = position if match.start() == match.end() else -1
        last = rule
        hit.add(rule)
    if not hit:
        return key
    for rule in hit:
        rule.hits += 1
    out.append(key[position:])
    # A rule without its dot ('encoder' -> '') leaves an empty segment; a name has none.
    name = ".".join(segment for segment in "".join(out).split(".") if segment)
    if not name:
        rules_text = ", ".join(repr(rule.rule) for rule in hit)
        raise MappingError(f"rename: {rules_text} leaves nothing of the key '{printable(key)}'")
    return name
