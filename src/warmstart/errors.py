"""What can go wrong, one type per kind; every message ends with the line to type."""

from __future__ import annotations

from typing import Any


class WarmStartError(ValueError):
    """Base of every error this package raises on purpose."""


class CheckpointError(WarmStartError):
    """A source cannot be read: not there, truncated, unsafe, ambiguous, or not the file that was asked for.

    Attributes:
        written: Names of the model entries that had been written when reading failed; empty if the model is untouched.
        report: Of a fault while writing, the `Report`, whose status is `failed`; None of any other.
    """

    def __init__(self, message: str, *, written: tuple[str, ...] = (), report: Any = None) -> None:
        super().__init__(message)
        self.written = written
        self.report = report


class MappingError(WarmStartError):
    """The checkpoint does not account for the model, or the rules do not account for the checkpoint.

    Attributes:
        plan: The `Plan` with all its errors, or None if no plan could be made.
    """

    def __init__(self, message: str, *, plan: Any = None) -> None:
        super().__init__(message)
        self.plan = plan


class VerificationError(WarmStartError):
    """The model does not hold the values the plan says it should.

    Attributes:
        tensors: Names of the model entries whose values differ.
        report: If it was found right after writing, the `Report`, whose status is `failed`; else None.
    """

    def __init__(self, message: str, *, tensors: tuple[str, ...] = (), report: Any = None) -> None:
        super().__init__(message)
        self.tensors = tensors
        self.report = report


class FrozenChangedError(WarmStartError):
    """A frozen parameter or buffer has moved, or is no longer the one that was frozen.

    Attributes:
        tensors: Names of the entries that moved.
    """

    def __init__(self, message: str, *, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors


class TimingError(WarmStartError):
    """Called at a moment at which it cannot be right: an optimizer or a wrapper is already there."""
