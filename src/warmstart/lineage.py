"""Lineage: where a run's initial weights came from, as plain JSON types, ancestors included."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from warmstart.checkpoints import jsons
from warmstart.checkpoints.base import Checkpoint
from warmstart.locations import public

if TYPE_CHECKING:
    from warmstart.mapping.plan.plan import Plan
    from warmstart.mapping.pretrained import Pretrained

METADATA_KEY: Final = "warmstart_lineage"
"""Under which a safetensors file's `__metadata__` holds the lineage of its tensors, as JSON."""

REPORT_NAME: Final = "warmstart.json"
"""The report, or the lineage alone, in a checkpoint's own folder."""

MAX_BYTES: Final = 16 << 20
MAX_VALUES: Final = 100_000
MAX_DEPTH: Final = 100

_FOLDER_MARKS: Final = ("config.json", "trainer_state.json", ".metadata", "random_states_0.pkl")


def lineage(plan: Plan, version: str) -> dict[str, Any]:
    """Where the plan's values come from: sources with size, time and header digest, the rules, and the versions.

    No tensor is read for it: the digest is of names, shapes, dtypes and offsets. What a source itself says of where it
    comes from is under `ancestors`, each with the index of that source as `of_source`.
    """
    return _record(
        [(part.pretrained, part.checkpoint, part.prefix) for part in plan.parts],
        version,
        model=plan.model_name,
        plan_sha256=plan.digest(),
        loaded=len(plan.assignments),
        coverage=plan.coverage,
    )


def lineage_of_copy(pretrained: Pretrained, checkpoint: Checkpoint, count: int, version: str) -> dict[str, Any]:
    """The lineage of `count` tensors that rules alone made of a checkpoint, without a model; the same keys."""
    return _record([(pretrained, checkpoint, None)], version, model=None, plan_sha256=None, loaded=count, coverage=None)


def as_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """A lineage as a safetensors file's `__metadata__` carries it."""
    return {METADATA_KEY: json.dumps(record, allow_nan=False)}


def recorded(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The lineages that an open checkpoint carries; one for each warm start of the run that wrote it.

    They are in a safetensors file's metadata, in the callbacks' states of a `.ckpt`, or beside the weights in the
    checkpoint's own folder (`warmstart.json`, `trainer_state.json`). No code of the file runs, and no tensor is read.
    What is there and cannot be read is `{"unreadable": why}`: a lineage is never a reason to refuse weights.
    """
    text = checkpoint.metadata.get(METADATA_KEY)
    if text is not None:
        return _from_text(text.encode("utf-8", "replace"), METADATA_KEY)
    if found := _of_value(checkpoint.callbacks):
        return found
    if not checkpoint.files:
        return []
    folder = checkpoint.files[0].path.parent
    try:
        return _from_folder(folder) if any((folder / mark).is_file() for mark in _FOLDER_MARKS) else []
    except OSError as error:
        return [{"unreadable": str(error)[:300]}]


def recorded_in_json(path: Path) -> list[dict[str, Any]]:
    """The lineages of a report (`Report.to_json`) or of a trainer's state, which are JSON."""
    if path.stat().st_size > MAX_BYTES:
        return [{"unreadable": f"{path.name} has more than {MAX_BYTES >> 20} MiB"}]
    return _from_text(path.read_bytes(), path.name)


def _record(
    sources: Sequence[tuple[Pretrained, Checkpoint, tuple[str, str] | None]], version: str, **facts: Any
) -> dict[str, Any]:
    return {
        "sources": [_source(*source) for source in sources],
        **facts,
        "versions": {"warmstart": version, "torch": str(torch.__version__), "python": platform.python_version()},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ancestors": [
            {"of_source": number} | ancestor
            for number, (_, checkpoint, _) in enumerate(sources)
            for ancestor in recorded(checkpoint)
        ],
    }


def _source(pretrained: Pretrained, checkpoint: Checkpoint, prefix: tuple[str, str] | None) -> dict[str, Any]:
    return {
        "location": public(checkpoint.location),
        "format": checkpoint.format,
        "checkpoint_key": checkpoint.checkpoint_key,
        "files": [
            {"name": stamp.path.name, "bytes": stamp.size, "modified": _iso(stamp.mtime_ns)}
            for stamp in checkpoint.files
        ],
        "revision": checkpoint.revision,
        "file_hashes": dict(checkpoint.file_hashes),
        "header_sha256": checkpoint.header_digest(),
        "sha256": pretrained.sha256,
        "rules": _plain(pretrained.rules()),
        "prefix": list(prefix) if prefix else None,
    }


def _from_folder(folder: Path) -> list[dict[str, Any]]:
    for name in (REPORT_NAME, "trainer_state.json"):
        if (folder / name).is_file() and (found := recorded_in_json(folder / name)):
            return found
    return []


def _from_text(text: bytes, where: str) -> list[dict[str, Any]]:
    try:
        value = jsons.parse(text) if len(text) <= MAX_BYTES else None
    except ValueError as error:
        return [{"unreadable": f"{where} is not valid JSON ({str(error)[:200]})"}]
    if where == METADATA_KEY:
        value = {"lineage": value}
    return _of_value(value)


def _of_value(value: object) -> list[dict[str, Any]]:
    """All that stands under a key `lineage`, at any depth, as plain JSON types; a level at a time, the outermost first."""
    budget, depth, told = [MAX_VALUES], 0, False
    found: list[dict[str, Any]] = []
    level, below = [value], _Below()
    try:
        while level:
            deeper: list[object] = []
            for each in level:
                own = dict.get(each, "lineage") if isinstance(each, dict) else None
                told = told or own is not None
                if isinstance(own, dict) and isinstance(own.get("sources"), list):
                    found.append(_clean(own, budget, 0))
                    continue
                children = below.of(each)
                _spend(budget, depth, 1 + len(children))
                deeper += children
            level, depth = deeper, depth + 1
    except _TooMuchError:
        # What never says the word is some other callback's.
        return [{"unreadable": "it is nested too deeply, or has too many values"}] if told else []
    return found


class _TooMuchError(Exception):
    pass


class _Below:
    """The containers in a container; a pickle may hold one as often as it likes, and it is searched once."""

    def __init__(self) -> None:
        self._known: dict[int, list[object]] = {}

    def of(self, value: object) -> list[object]:
        if id(value) not in self._known:
            # Past the methods of a class of the file's own.
            inside = dict.values(value) if isinstance(value, dict) else value if isinstance(value, list) else ()
            self._known[id(value)] = [child for child in inside if isinstance(child, dict | list)]
        return self._known[id(value)]


def _clean(value: object, budget: list[int], depth: int) -> Any:
    """Plain JSON types only, and no URI with a secret; what a file holds beside them is left out."""
    _spend(budget, depth)
    if isinstance(value, dict):
        return {k: _clean(v, budget, depth + 1) for k, v in value.items() if type(k) is str}
    if isinstance(value, list):
        return [_clean(v, budget, depth + 1) for v in value]
    if type(value) is str:
        return public(value) if "://" in value else value
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    return value if type(value) in {bool, int} else None


def _spend(budget: list[int], depth: int, count: int = 1) -> None:
    budget[0] -= count
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise _TooMuchError


def _iso(mtime_ns: int) -> str | None:
    if not mtime_ns:  # a server that does not say
        return None
    return datetime.datetime.fromtimestamp(mtime_ns / 1e9, datetime.UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
