"""Apply rules to a checkpoint, without a model, and write the result as a new one.

Keys are taken as the file spells them; a rule of --select, --strip_prefix, --rename or --convert changes them, nothing else
does. The result is written tensor by tensor, and appears whole or not at all. It carries its lineage: safetensors files in
their metadata, a distributed checkpoint in warmstart.json beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from warmstart.cli.answers import Answer, UsageError
from warmstart.cli.opening import opened
from warmstart.cli.parsing import READING, RENAMING, add_rules, pretrained
from warmstart.cli.placing import whole_file, whole_folder
from warmstart.cli.progress import progress
from warmstart.cli.ruled import RuledCheckpoint
from warmstart.cli.writing import checked_size, write_dcp, write_safetensors, write_shards
from warmstart.errors import CheckpointError
from warmstart.lineage import as_metadata, lineage_of_copy
from warmstart.locations import public
from warmstart.mapping.model.names import WRAPPER_SEGMENTS
from warmstart.version import __version__

_FORMATS = ("safetensors", "sharded", "dcp")
_RULES = (*READING, *RENAMING)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="The checkpoint: a file, a folder, a model of the hub, or a URL.")
    parser.add_argument("out", help="The file or folder to write.")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        help="A file, shards with an index, or torch's distributed format. Needed unless OUT ends in .safetensors.",
    )
    parser.add_argument(
        "--dtype", help="What floating tensors are cast to, such as bfloat16; overflow to inf is an error."
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", help="Of a sharded one: bytes, or a number with KB, MB or GB."
    )
    parser.add_argument("--force", action="store_true", help="Replace what is at OUT, once the new one is complete.")
    add_rules(parser, _RULES)


def run(options: Namespace) -> Answer:
    """Keys of the JSON: `source`, `out`, `format`, `tensors`, `bytes`, `left_out`, `lineage`, `notes`."""
    out = Path(options.out).expanduser()
    if out.name in ("", ".."):
        raise UsageError(f"{options.out!r} is no name for a file or folder to write")
    format = _format(options.format, out)
    try:
        limit = checked_size(options.max_shard_size)
    except ValueError:
        raise UsageError(f"--max_shard_size {options.max_shard_size!r}: write it as 5GB or 500MB") from None
    rules = pretrained(options, _RULES)
    made = RuledCheckpoint(rules, opened(rules), _dtype(options.dtype))
    record = lineage_of_copy(rules, made.source, len(made), __version__)
    metadata = {**made.metadata, "format": "pt", **as_metadata(record)}
    size = sum(made.info(key).nbytes for key in made.keys())
    place = whole_file if format == "safetensors" else whole_folder
    with place(out, force=options.force) as path, progress(f"writing {out.name}", size) as told:
        if format == "safetensors":
            write_safetensors(made, path, metadata, told)
        elif format == "sharded":
            write_shards(made, path, metadata, told, limit)
        else:
            write_dcp(made, path, metadata, told)
        if changed := made.source.changed():
            raise CheckpointError(f"{changed}; convert it again, with the file at rest")
    notes = [*made.notes, *_wrappers(made)]
    left = f", {len(made.left_out)} keys left out by select" if made.left_out else ""
    text = f"{out}: {len(made):,} tensors, {size:,} bytes of {format} <- {rules.label}{left}"
    data = {
        "source": public(made.source.location),
        "out": str(out),
        "format": format,
        "tensors": len(made),
        "bytes": size,
        "left_out": made.left_out,
        "lineage": record,
        "notes": notes,
    }
    return Answer("\n".join([text, *(f"  note: {note}" for note in notes)]), data)


def _format(given: str | None, out: Path) -> str:
    if given is not None:
        return given
    if out.name.endswith(".safetensors"):
        return "safetensors"
    raise UsageError(f"{out}: say what to write: a name that ends in .safetensors, --format sharded, or --format dcp")


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name.removeprefix("torch."), None) if name is not None else None
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"--dtype {name!r}: a floating dtype of torch, such as float32, bfloat16 or float16")
    return dtype


def _wrappers(made: RuledCheckpoint) -> list[str]:
    found = sorted({segment for key in made.keys() for segment in key.split(".")} & WRAPPER_SEGMENTS)
    rule = ", ".join(f'"{segment}": ""' for segment in found)
    return (
        [f"{', '.join(found)} in the names may be a wrapper's; to take it out: --rename '{{{rule}}}'"] if found else []
    )
