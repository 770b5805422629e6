"""What can become of a tensor, in one word and one colour each: the same in the console, in pages and in pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["loaded", "adapted", "filled", "tied", "own init", "out of scope", "error"]


@dataclass(frozen=True, slots=True)
class Look:
    """How a status looks; never told apart by its colour alone.

    Attributes:
        meaning: What it says, in a few words.
        light: Fill and ink on a light ground, as CSS colours.
        dark: Fill and ink on a dark ground.
        hatch: matplotlib's hatch; the page has patterns like them.
        terminal: rich's style.
    """

    meaning: str
    light: tuple[str, str]
    dark: tuple[str, str]
    hatch: str
    terminal: str


# The fills are those of Okabe and Ito, "Color Universal Design" (2008), which people with any colour vision tell apart.
STATUSES: dict[Status, Look] = {
    "loaded": Look("value from the checkpoint", ("#0072b2", "#ffffff"), ("#3d97d3", "#04121d"), "", "blue"),
    "adapted": Look("checkpoint's value, reshaped", ("#009e73", "#03130e"), ("#1fae85", "#03130e"), "///", "green"),
    "filled": Look("a constant", ("#cc79a7", "#1c0712"), ("#d58bb4", "#1c0712"), "...", "magenta"),
    "tied": Look("the same tensor as another", ("#56b4e9", "#04121d"), ("#7cc6f0", "#04121d"), "|||", "cyan"),
    "own init": Look("keeps its initialisation", ("#e69f00", "#1c1200"), ("#e8ae33", "#1c1200"), "\\\\\\", "yellow"),
    "out of scope": Look("not asked for", ("#d3d8e0", "#29303a"), ("#3c4550", "#dde2e9"), "", "dim"),
    "error": Look("has to be settled", ("#b3261e", "#ffffff"), ("#f28b82", "#2a0603"), "xxx", "bold red"),
}
