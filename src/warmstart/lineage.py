"""Lineage: where a run's initial weights came from, as plain JSON types."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import torch

from warmstart.locations import public
from warmstart.mapping.plan import Plan


def lineage(plan: Plan, version: str) -> dict[str, Any]:
    """Where the plan's values come from: sources with size, time and header digest, the rules, and the versions.

    No tensor is read for it: the digest is of names, shapes, dtypes and offsets.
    """
    return {
        "sources": [
            {
                "location": public(part.checkpoint.location),
                "format": part.checkpoint.format,
                "checkpoint_key": part.checkpoint.checkpoint_key,
                "files": [
                    {"name": stamp.path.name, "bytes": stamp.size, "modified": _iso(stamp.mtime_ns)}
                    for stamp in part.checkpoint.files
                ],
                "revision": part.checkpoint.revision,
                "file_hashes": dict(part.checkpoint.file_hashes),
                "header_sha256": part.checkpoint.header_digest(),
                "sha256": part.pretrained.sha256,
                "rules": _plain(part.pretrained.rules()),
                "prefix": list(part.prefix) if part.prefix else None,
            }
            for part in plan.parts
        ],
        "model": plan.model_name,
        "plan_sha256": plan.digest(),
        "loaded": len(plan.assignments),
        "coverage": plan.coverage,
        "versions": {"warmstart": version, "torch": str(torch.__version__), "python": platform.python_version()},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _iso(mtime_ns: int) -> str | None:
    if not mtime_ns:  # a server that does not say
        return None
    return datetime.datetime.fromtimestamp(mtime_ns / 1e9, datetime.UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
