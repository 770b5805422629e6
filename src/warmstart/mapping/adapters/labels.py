"""Labels and the rows they stand for: a vocabulary, the classes of a head, or an index map."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
from torch import Tensor

from warmstart.errors import MappingError
from warmstart.mapping.grouping import printable

Label: TypeAlias = str | bytes | int

_SHOWN = 3


class Labels:
    """Labels with the row of each, in any number: short to print, compared and hashed by a digest.

    Attributes:
        names: The labels.
        rows: The row of each, int64, in the same order.
    """

    def __init__(self, names: Sequence[Label], rows: Sequence[int]) -> None:
        self.names = tuple(names)
        self.rows = np.array(rows, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of rows and labels, whatever their order was."""
        said = sorted(f"{row} {name!r}" for name, row in zip(self.names, self.rows.tolist(), strict=True))
        return hashlib.sha256("\n".join(said).encode(errors="surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        more = ", ..." if len(self) > _SHOWN else ""
        return f"<{len(self)} labels: {shown(self.names[:_SHOWN])}{more}; sha256 {self.digest[:12]}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


LabelRows: TypeAlias = Sequence[Label | None] | Mapping[Label, int] | np.ndarray[Any, Any] | Tensor | Labels
IndexMap: TypeAlias = Sequence[int | None] | Mapping[int, int | None] | np.ndarray[Any, Any] | Tensor | Labels


def shown(names: Iterable[Label]) -> str:
    return ", ".join(printable(repr(name), 40) for name in names)


def as_labels(value: object, field: str) -> Labels:
    """Labels in row order, where None is a row without one, or a mapping of label to row.

    Raises:
        MappingError: Not labels (text, bytes or whole numbers), or rows that are none.
    """
    if isinstance(value, Labels):
        return value
    if isinstance(value, Mapping):
        pairs = [(name, _row(row, field)) for name, row in value.items()]
    else:
        pairs = [(name, row) for row, name in enumerate(_listed(value, field)) if name is not None]
    return Labels([_label(name, field) for name, _ in pairs], [row for _, row in pairs])


def as_index_map(value: object, field: str) -> Labels:
    """The old row (the label) of each new row: in row order, or a mapping of new row to old; None and -1 are no old row.

    Raises:
        MappingError: Something else than row numbers.
    """
    if isinstance(value, Labels):
        return value
    items = value.items() if isinstance(value, Mapping) else enumerate(_listed(value, field))
    pairs = [(_row(old, field), _row(new, field)) for new, old in items if old is not None and old != -1]
    return Labels([old for old, _ in pairs], [new for _, new in pairs])


def repeated(items: Sequence[Label]) -> list[Label]:
    """Those that come more than once, in order."""
    if len(set(items)) == len(items):
        return []
    return [item for item, count in Counter(items).items() if count > 1]


def _listed(value: object, field: str) -> Sequence[object]:
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise MappingError(
            f"{field}={printable(repr(value), 60)}: a list of labels in row order, or a dict of label to row; write "
            f"{field}=tokenizer.get_vocab(), or {field}=[...]"
        )
    return value


def _label(name: object, field: str) -> Label:
    if type(name) is str or type(name) is int:  # asked first: vocabularies are long, and a protocol is slow to ask for
        return name
    if isinstance(name, str):
        return str(name)
    if isinstance(name, bytes):
        return bytes(name)
    if isinstance(name, SupportsIndex) and not isinstance(name, bool):
        return int(name)
    raise MappingError(
        f"{field} has the label {printable(repr(name), 60)}: labels are text, bytes or whole numbers; write those"
    )


def _row(row: object, field: str) -> int:
    if type(row) is int and row >= 0:
        return row
    if isinstance(row, bool) or not isinstance(row, SupportsIndex) or int(row) < 0:
        raise MappingError(
            f"{field} has the row {printable(repr(row), 60)}: rows are whole numbers of 0 or more; write those"
        )
    return int(row)
