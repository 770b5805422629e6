"""The ancestor in a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warmstart.mapping.grouping import printable

_HEADING = "## Initial weights"


def add_ancestor(card: Path, lineage: Mapping[str, Any]) -> None:
    """Say in a model card where the model's initial weights came from.

    Args:
        card: The `README.md`; nothing happens if there is none.
        lineage: As a report has it.
    """
    if not card.exists():
        return
    text = card.read_text(encoding="utf-8")
    if _HEADING in text:
        return
    lines = [_HEADING, "", f"{lineage['loaded']} tensors ({lineage['coverage']:.0%} of what was in scope) came from"]
    for source in lineage["sources"]:
        revision = f" at revision {_code(source['revision'])}" if source["revision"] else ""
        lines.append(f"- {_code(source['location'])}{revision} (header sha256 {_code(source['header_sha256'])})")
    card.write_text(text.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', '')}`"
