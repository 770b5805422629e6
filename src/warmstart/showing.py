"""Text that others wrote, made safe to show: names of tensors, paths, what a file says of itself."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str, limit: int = 300) -> str:
    """Text that is safe on a terminal: control characters escaped, the middle of a huge name left out."""
    if len(text) <= limit and text.isprintable():
        return text
    safe = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in text[: 4 * limit]
    )
    if len(text) <= limit and len(safe) <= 2 * limit:
        return safe
    return f"{safe[:limit]}... ({len(text):,} characters)"


def shown(name: object, limit: int = 100) -> str:
    """A name as a message may show it: quoted, escaped, and cut where it is long."""
    text = name if isinstance(name, str) else str(name) if type(name) in {int, float} else type(name).__name__
    return f"'{printable(text, limit)}'"


def counted(count: int, noun: str) -> str:
    plural = noun + "es" if noun.endswith("s") else noun + "s"
    return f"{count:,} {noun if count == 1 else plural}"


def listed(names: Sequence[str], limit: int = 3) -> str:
    text = ", ".join(shown(name, 60) for name in names[:limit])
    return text + (", ..." if len(names) > limit else "")
