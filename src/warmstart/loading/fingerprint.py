"""What ranks must have in common before they load, in short: a digest for each thing that can differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from warmstart.checkpoints.base import Checkpoint
from warmstart.mapping.plan.plan import Plan
from warmstart.tensors import as_words, dtype_name

SECTIONS: Final = ("call", "header", "model", "plan", "bytes")
"""In the order of blame: another header or model makes another plan."""

_ELEMENTS: Final = 16


def fingerprint(plan: Plan, call: Mapping[str, str]) -> dict[str, str]:
    """A digest of each section; without the bytes where another rank reads them."""
    reads = all(part.checkpoint.at_hand is not None for part in plan.parts)
    sections = SECTIONS if reads else SECTIONS[:-1]
    return {section: _digest(details(plan, call, section)) for section in sections}


def details(plan: Plan, call: Mapping[str, str], section: str) -> dict[str, str]:
    """What the digest of a section is made of, by name, in words."""
    if section == "call":
        return dict(call)
    if section == "model":
        entries = plan.targets.entries.values()
        return {
            t.name: f"{t.shape} {dtype_name(t.dtype)}" + (f" tied to {t.alias_of}" if t.alias_of else "")
            for t in entries
        }
    if section == "header":
        return {
            _key(plan, i, key): what for i, p in enumerate(plan.parts) for key, what in _header(p.checkpoint).items()
        }
    if section == "plan":
        return _decisions(plan)
    return _samples(plan)


def _header(checkpoint: Checkpoint) -> dict[str, str]:
    out = {}
    for key in checkpoint.keys():
        info = checkpoint.info(key)
        place = f" at byte {info.offset} of file {info.file}" if info.offset >= 0 else ""
        out[key] = f"{info.shape} {dtype_name(info.dtype)}{place}"
    if _is_remote(checkpoint):  # of which no bytes are sampled
        out |= {stamp.path.name: f"{stamp.size} bytes of {stamp.mtime_ns}" for stamp in checkpoint.files}
    return out


def _decisions(plan: Plan) -> dict[str, str]:
    plain = plan.to_dict()
    out = {row["target"]: _decision(row) for row in plain["assignments"]}
    for bucket in ("missing", "excluded"):
        out |= dict.fromkeys(plain[bucket], bucket)
    out |= {name: f"mismatched {shapes}" for name, shapes in plain["mismatched"].items()}
    return out | {f"freeze {name}": "frozen" for name in plain["freeze"]}


def _decision(row: Mapping[str, Any]) -> str:
    keys = ", ".join(row["sources"]) or "no key"
    kept = ("cast", "alias_of", "conversion", "adapter", "fill")
    more = {name: row[name] for name in kept if row[name] is not None} | ({"part": row["part"]} if row["part"] else {})
    return (
        f"from {keys} as {row['dtype']} {tuple(row['shape'])}{' ' + json.dumps(more, sort_keys=True) if more else ''}"
    )


def _samples(plan: Plan) -> dict[str, str]:
    """A few bytes of every tensor that is read, where they can be had for the cost of a few bytes."""
    out = {}
    for part, key in dict.fromkeys((a.part, key) for a in plan.assignments for key in a.sources):
        checkpoint = plan.parts[part].checkpoint.at_hand
        assert checkpoint is not None
        shape = checkpoint.info(key).shape
        plain = not checkpoint.files or checkpoint.info(key).offset >= 0
        if not plain or _is_remote(checkpoint) or 0 in shape:
            continue
        sha = hashlib.sha256()
        for at in (0.5, 1.0):  # the middle, and the end
            starts = [int((size - 1) * at) for size in shape]
            index = tuple(slice(start, start + 1) for start in starts[:-1])
            if shape:
                start = max(0, starts[-1] - _ELEMENTS + 1)
                index = (*index, slice(start, start + _ELEMENTS))
            sha.update(as_words(checkpoint.read(key, index)).numpy().tobytes())
        out[_key(plan, part, key)] = sha.hexdigest()[:16]
    return out


def _is_remote(checkpoint: Checkpoint) -> bool:
    return "://" in checkpoint.location


def _key(plan: Plan, part: int, key: str) -> str:
    return key if len(plan.parts) == 1 else f"source {part}: {key}"


def _digest(found: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{k}\0{v}" for k, v in found.items()).encode("utf-8", "surrogatepass")).hexdigest()
