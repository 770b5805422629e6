"""Rules that are objects in Python and `{snake_case_name: {field: value}}` in YAML."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from warmstart.errors import MappingError

T = TypeVar("T")


def yaml_name(cls: type) -> str:
    """`resize_pos_embed` for `ResizePosEmbed`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


def declared(value: object, kinds: Iterable[type[T]], where: str) -> T:
    """An object of one of `kinds`: as it is, or made from its name, or from `{name: {field: value}}`.

    Raises:
        MappingError: No kind has that name, or it has no such field.
        TypeError: A value of another type.
    """
    known = {yaml_name(kind): kind for kind in kinds}
    for kind in known.values():
        if isinstance(value, kind):
            return value
    name, options = (value, None) if isinstance(value, str) else _only_item(value, where, known)
    chosen = known.get(name) or next((k for k in known.values() if k.__name__ == name), None)
    if chosen is None:
        raise MappingError(f"{where}: {name!r} is none of {', '.join(known)}")
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{where}: {name} takes its fields as a mapping, not {options!r}")
    try:
        return chosen(**(options or {}))
    except MappingError as error:
        raise MappingError(f"{where}: {error}") from None
    except TypeError as error:
        shape = inspect.signature(chosen)
        raise MappingError(
            f"{where}: {error}; write {{{yaml_name(chosen)}: ...}} with the fields of {chosen.__name__}{shape}"
        ) from None


def plain(value: Any) -> Any:
    """A declared object as plain data again: its name, and the fields that differ from their defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = {}
        for f in fields(value):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if f.init and (current := getattr(value, f.name)) != default:
                kept[f.name] = plain(current)
        return {yaml_name(type(value)): kept}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"  # as `apply: {fn: ...}` takes it
    return str(value)


def _only_item(value: object, where: str, known: Mapping[str, Any]) -> tuple[str, object]:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise TypeError(
            f"{where}: one of {', '.join(known)}, as an object or as {{name: {{field: value}}}}, not {value!r}"
        )
    ((name, options),) = value.items()
    return str(name), options
