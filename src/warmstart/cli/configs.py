"""The file of `--config`: rules under the options' own names, or what a callback takes, unchanged."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from warmstart.cli.answers import UsageError
from warmstart.cli.options import FIELDS
from warmstart.errors import MappingError
from warmstart.mapping.pretrained import Pretrained

OF_HOSTS: Final = frozenset(
    ("verify", "held", "unfreeze", "unfreeze_unit", "stages", "on_freeze_change", "lock", "read", "log", "name")
)
"""Keywords of the callbacks that say nothing about a plan."""

SEVERAL: Final = "(several)"
"""Stands where one source would, beside a list of them."""

_KINDS: Final = {list: "a list", int: "a number", float: "a number", bool: "a truth value"}

_FIELDS: Final = ("source", *FIELDS)


def config(path: str, options: Collection[str]) -> str:
    """What a parser with these options takes for `--config`: the path, or what the file means to a callback as YAML.

    A callback's keywords have the source, or several with rules of their own, under `pretrained`; LightningCLI saves
    objects as `class_path` and `init_args`.

    Raises:
        UsageError: The file is no YAML or no mapping; it has several sources for a command that takes one, or fields beside
            sources that have their own.
    """
    try:
        file = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: is no YAML: {_in_words(error)}") from None
    except (OSError, ValueError):
        return path  # the parser says what is wrong
    if not isinstance(file, Mapping):
        what = (
            "is empty; write options into it"
            if file is None
            else f"holds {_KINDS.get(type(file), 'text')} where options should be"
        )
        raise UsageError(f"{path}: {what}, such as into: encoder")
    given = _arguments(file)
    if not isinstance(given, Mapping) or "pretrained" not in given:
        return path if given is file else _dumped(given)
    rest = {name: value for name, value in given.items() if name in options or name not in OF_HOSTS}
    sources = rest.pop("pretrained")
    if isinstance(sources, str):
        return _dumped({"source": sources} | rest)
    if beside := sorted(set(rest).intersection(_FIELDS)):
        raise UsageError(
            f"{path}: {', '.join(beside)} beside sources that have fields of their own; give it to each of them"
        )
    several = sources if isinstance(sources, list) else [sources]
    if len(several) == 1:
        return _dumped(_fields(several[0]) | rest)
    if "pretrained" not in options:
        raise UsageError(f"{path}: names {len(several)} sources, and this command takes one; plan takes several")
    return _dumped(rest | {"source": SEVERAL, "pretrained": [_fields(each) for each in several]})


def part(value: Any, where: str) -> Pretrained:
    """One of several sources, as plain data.

    Raises:
        UsageError: It is neither a name nor a mapping of `Pretrained`'s fields, or a value cannot be meant.
    """
    given = dict(value) if isinstance(value, Mapping) else {"source": value}
    for name in given:
        if name not in _FIELDS:
            near = difflib.get_close_matches(str(name), _FIELDS, n=1)
            raise UsageError(f"{where}: {name!r} is no field{f'; did you mean {near[0]}?' if near else ''}")
    try:
        return Pretrained(**given)
    except (MappingError, TypeError) as error:
        raise UsageError(f"{where}: {error}") from None


def _in_words(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    said = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None)))) or "unreadable"
    return f"{said}, line {mark.line + 1}, column {mark.column + 1}" if mark else said


def _fields(source: Any) -> dict[str, Any]:
    source = _arguments(source)
    if isinstance(source, str):
        return {"source": source}
    if not isinstance(source, Mapping) or not isinstance(source.get("source"), str):
        raise UsageError(
            f"pretrained: {source!r} should be a file, or a mapping such as {{source: FILE, into: encoder}}"
        )
    return dict(source)


def _dumped(value: Any) -> str:
    text: str = yaml.safe_dump(value)
    return text


def _arguments(value: Any) -> Any:
    return value.get("init_args", {}) if isinstance(value, Mapping) and "class_path" in value else value
