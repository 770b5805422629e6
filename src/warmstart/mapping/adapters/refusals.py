"""How adapters say no: both shapes, the reason, and the line to type. Planning puts the entry's name for `<entry>`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from warmstart.errors import MappingError
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.labels import Labels
from warmstart.mapping.derivations import Shape

KEEP_OWN = 'allow_mismatched=["<entry>"]'


def refused(source: Shape, target: Shape, why: str, line: str) -> MappingError:
    """`line` is what to type instead: `written(...)`, or `KEEP_OWN` where no adapter fits."""
    return MappingError(f"checkpoint {source}, model {target}: {why}\n  -> {line}")


def written(adapter: Adapter, **changes: Any) -> str:
    """The line that declares this adapter with `changes`: the fields that differ from their defaults.

    Long lists of labels are shown as variables.
    """
    changed: Any = replace(adapter, **changes)  # type: ignore[type-var]  # every adapter is a dataclass
    values = {f.name: value for f in fields(changed) if (value := getattr(changed, f.name)) != f.default}
    shown = (f"{name}={name if isinstance(value, Labels) else repr(value)}" for name, value in values.items())
    return f'adapt={{"<entry>": {type(adapter).__name__}({", ".join(shown)})}}'


def check_mode(adapter: Adapter, mode: object, *known: str) -> None:
    if mode not in known:
        choices = " or ".join(f'{type(adapter).__name__}(mode="{name}")' for name in known)
        raise MappingError(f"mode={mode!r}: write {choices}")
