"""Lock files: a plan's decisions as YAML to commit, and what a later plan decides otherwise, in a few lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from warmstart.errors import MappingError
from warmstart.mapping.buckets import Assignment, Buckets, Problem
from warmstart.mapping.declared import plain
from warmstart.mapping.grouping import grouped, printable
from warmstart.mapping.plan.table import renaming
from warmstart.tensors import dtype_name

_VERSION = 1
_GROUPS = 8  # two lines each
_SECTIONS = ("mapping", "mismatched", "missing", "unexpected", "ignored", "freeze")
_JSON = json.JSONDecoder()
_HEAD = """\
# What goes where, as it was planned. Commit this file: load(..., lock="this file") refuses a run that plans otherwise.
"""


def to_yaml(plan: Buckets) -> str:
    """A plan's decisions, one line for each entry and key, sorted; paths and times are left out."""
    lines = [f"{_HEAD}warmstart_lock: {_VERSION}", f"model: {json.dumps(plan.model_name)}"]
    for section, rows in _decisions(plan).items():
        lines.append(f"{section}:" if rows else f"{section}: {{}}")
        lines += [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def compare(plan: Buckets, lock: str | os.PathLike[str]) -> list[Problem]:
    """What a plan decides otherwise than its lock file, as one problem of at most 20 lines; nothing if it agrees.

    Raises:
        MappingError: There is no such file, or it is no lock file.
    """
    path = Path(lock)
    known = _read(path)
    rows = [
        (name, section, was.get(name), now.get(name))
        for section, now in _decisions(plan).items()
        for was in [known[section]]
        for name in sorted({*was, *now})
        if _text(was.get(name)) != _text(now.get(name))
    ]
    if not rows:
        return []
    first = {name: (was, now) for name, _, was, now in reversed(rows)}
    groups = grouped((name, (section, _words(name, was), _words(name, now))) for name, section, was, now in rows)
    lines = [f"{len(rows)} decisions differ from {path.name} ({len(groups)} kinds)"]
    for group in groups[:_GROUPS]:
        section, was, now = group.tag
        count = f"  x{len(group)}" if len(group) > 1 else ""
        lines.append(f"    {printable(group.template)}  {section}: was {was}, is {now}{count}")
        old, new = (_keys(value) for value in first[group.names[0]])
        if section == "mapping" and old != new:
            lines.append(f"      for example {printable(group.names[0])}: {old} -> {new}")
    if len(groups) > _GROUPS:
        rest = groups[_GROUPS:]
        lines.append(f"    ... and {sum(map(len, rest))} more of {len(rest)} kinds")
    lines.append("  -> put the rules or the file back; or, if this is meant, write the lock anew:")
    lines.append(f"     pathlib.Path({path.name!r}).write_text(warmstart.plan(model, ...).to_yaml())")
    return [Problem("lock", "\n".join(lines), tuple(name for name, *_ in rows))]


def frozen_names(lock: str | os.PathLike[str]) -> list[str]:
    """The entries that the plan of a lock file freezes.

    Raises:
        MappingError: There is no such file, or it is no lock file.
    """
    return list(_read(Path(lock))["freeze"])


def _decisions(plan: Buckets) -> dict[str, dict[str, Any]]:
    def key(item: Any) -> str:
        return f"source {item[0]}: {item[1]}" if isinstance(item, tuple) else str(item)

    return {
        "mapping": {a.target: _decision(plan, a) for a in plan.assignments},
        "mismatched": {name: [list(m.checkpoint_shape), list(m.model_shape)] for name, m in plan.mismatched.items()},
        "missing": dict.fromkeys(plan.missing, True),
        "unexpected": dict.fromkeys(map(key, plan.unexpected), True),
        "ignored": dict.fromkeys(map(key, plan.ignored), True),
        "freeze": dict.fromkeys(plan.freeze, True),
    }


def _decision(plan: Buckets, a: Assignment) -> dict[str, Any]:
    row: dict[str, Any] = {"keys": list(a.sources), "shape": list(a.shape)}
    if len(plan.parts) > 1:
        row["part"] = a.part
    if a.dtype != plan.targets.entries[a.target].dtype:
        row["dtype"] = dtype_name(a.dtype)
    if a.source_shape != a.shape:
        row["source_shape"] = list(a.source_shape)
    if a.cast is not None:
        row["cast"] = [dtype_name(dtype) for dtype in a.cast]
    if a.alias_of is not None:
        row["alias_of"] = a.alias_of
    if a.conversion is not None:
        if "<lambda>" in a.conversion.label or "<locals>" in a.conversion.label:
            raise MappingError(
                f"{printable(a.conversion.label)}: a function without a name of its own cannot be locked, because another one "
                "would look the same; define it in a module, with def"
            )
        row |= {"conversion": a.conversion.label, "output": a.output}
    if a.adapter is not None:
        row["adapter"] = plain(a.adapter)
    if a.fill is not None:
        row["fill"] = a.fill
    return row


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a lock file: YAML of the one form that `to_yaml` writes, an entry a line and JSON in it."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise MappingError(
            f"lock={str(path)!r}: there is no such file; write it once you are content with the plan: "
            f"pathlib.Path({str(path)!r}).write_text(warmstart.plan(model, ...).to_yaml())"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise MappingError(f"lock={str(path)!r} cannot be read: {error}") from error
    known: dict[str, dict[str, Any]] = {}
    section: dict[str, Any] = {}
    head = ""
    try:
        for line in lines:
            if line.startswith("  "):
                name, end = _JSON.raw_decode(line, 2)
                section[name] = json.loads(line[end + 1 :])
            elif line.startswith("warmstart_lock:"):
                head = line.partition(":")[2].strip()
            elif line and not line.startswith(("#", "model:")):
                section = known[line.partition(":")[0]] = {}
    except (ValueError, TypeError) as error:
        raise MappingError(f"lock={str(path)!r} is damaged ({error}); write it anew with plan.to_yaml()") from None
    if head != str(_VERSION):
        raise MappingError(f"lock={str(path)!r} is no lock file of this version; write it anew with plan.to_yaml()")
    if bad := [name for name in _SECTIONS if name not in known]:
        raise MappingError(f"lock={str(path)!r} lacks its section {bad[0]!r}; write it anew with plan.to_yaml()")
    return known


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # of numbers too: a NaN is the same NaN


def _words(name: str, value: Any) -> str:
    """One side of a difference, said so that like differences read alike."""
    if value is None:
        return "absent"
    if not isinstance(value, dict):
        return "there" if value is True else str(value)
    keys = value.get("keys") or []
    text = renaming(name, str(keys[0])) if len(keys) == 1 else f"{len(keys)} keys"
    more = [f"{k} {v}" for k, v in value.items() if k not in ("keys", "shape")]
    return printable(", ".join([text, str(tuple(value.get("shape", ()))), *more]))


def _keys(value: Any) -> str:
    keys = value.get("keys") if isinstance(value, dict) else None
    return printable(", ".join(map(str, keys[:4])) + ", ..." * (len(keys) > 4)) if keys else "nothing"
