"""Lists that count from another number, as conversions: `layers.{i}` is `queries.{i-1}`."""

from __future__ import annotations

from collections.abc import Sequence

from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.suggesting.inference import Match
from warmstart.mapping.suggesting.templates import index_positions
from warmstart.mapping.suggesting.words import INDEX


def shifted(sure: Sequence[Match]) -> list[Conversion]:
    """One conversion for each list whose indices change, on names as the renames leave them."""
    found: dict[tuple[str, str], None] = {}
    for match in sure:
        turns = [(p, by) for p, by in zip(index_positions(match.entry.spelled), match.offsets, strict=True)]
        if any(by for _, by in turns):
            last = max(p for p, by in turns if by)
            offsets = dict(turns)
            sides = []
            for change in (False, True):
                path = []
                for position, segment in enumerate(match.entry.spelled[: last + 1]):
                    if segment.endswith(INDEX):
                        by = offsets[position] if change else 0
                        path.append(literal(segment[:-1]) + f"{{i{position}{f'{by:+d}' if by else ''}}}")
                    else:
                        path.append(literal(segment))
                sides.append(".".join([*path, "{rest...}"]))
            found.setdefault((sides[0], sides[1]))
    return [Conversion(source, target) for source, target in found]


def literal(segment: str) -> str:
    """A segment as it stands in a conversion's template."""
    return segment.replace("{", "{{").replace("}", "}}")
