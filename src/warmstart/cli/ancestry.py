"""Print where the weights of a file come from: its lineage, and its ancestors' as far as they are recorded.

FILE is a checkpoint, or a report that `Report.to_json` or a callback wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from warmstart.checkpoints.folders.sharded import INDEX_SUFFIX
from warmstart.cli.answers import Answer, Exit
from warmstart.cli.opening import opened_whole
from warmstart.lineage import recorded, recorded_in_json
from warmstart.locations import public
from warmstart.mapping.pretrained import Pretrained


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="A checkpoint, or a report in JSON.")


def run(options: Namespace) -> Answer:
    """Keys of the JSON: `file`, `lineages`; each lineage as `Report.lineage` has it, its `ancestors` included."""
    path = Path(options.source).expanduser()
    if path.suffix == ".json" and not path.name.endswith(INDEX_SUFFIX) and path.is_file():
        found = recorded_in_json(path)
    else:
        found = recorded(opened_whole(Pretrained(options.source))[0])
    shown = public(options.source)
    data = {"file": shown, "lineages": found}
    if not found:
        return Answer(f"{shown} carries no lineage", data, Exit.DIFFERS)
    return Answer("\n".join([shown, *_lines(found, 1)]), data)


def _lines(lineages: Sequence[Mapping[str, Any]], depth: int) -> Iterator[str]:
    # What a file says of itself may be of any type: it is printed, and only looked into where it is what we write.
    indent = "  " * depth
    for record in lineages:
        if "unreadable" in record:
            yield f"{indent}a lineage that cannot be read: {record['unreadable']}"
            continue
        versions = record.get("versions")
        version = versions.get("warmstart") if isinstance(versions, dict) else None
        into = f"into {record['model']}" if record.get("model") else "converted by rules alone"
        yield f"{indent}{record.get('loaded')} tensors {into}, {record.get('time')}, warmstart {version}"
        ancestors = [a for a in record.get("ancestors") or () if isinstance(a, dict)]
        for number, source in enumerate(s for s in record["sources"] if isinstance(s, dict)):
            tree = f" [{source['checkpoint_key']}]" if source.get("checkpoint_key") else ""
            revision = f" @ {source['revision']}" if source.get("revision") else ""
            yield f"{indent}<- {source.get('location')}{tree}{revision}"
            yield f"{indent}   {source.get('format')}, header {str(source.get('header_sha256'))[:16]}"
            rules = source.get("rules")
            if isinstance(rules, dict) and rules:
                yield f"{indent}   {', '.join(f'{name}={value!r}' for name, value in rules.items())}"
            yield from _lines([a for a in ancestors if a.get("of_source") == number and _is_lineage(a)], depth + 2)


def _is_lineage(value: Mapping[str, Any]) -> bool:
    return "unreadable" in value or isinstance(value.get("sources"), list)
