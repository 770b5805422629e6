"""Text that others wrote, made safe to show: names of tensors, paths, what a file says of itself."""

from __future__ import annotations


def printable(text: str, limit: int = 300) -> str:
    """Text that is safe on a terminal: control characters escaped, the middle of a huge name left out."""
    safe = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in text[: 4 * limit]
    )
    if len(text) <= limit and len(safe) <= 2 * limit:
        return safe
    return f"{safe[:limit]}... ({len(text):,} characters)"
