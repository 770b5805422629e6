"""Show what a checkpoint holds: its trees, tensors, sizes, dtypes and wrappers, without reading any tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from warmstart.checkpoints.base import Checkpoint
from warmstart.cli.answers import Answer
from warmstart.cli.opening import opened_whole
from warmstart.cli.parsing import READING, add_rules, pretrained
from warmstart.cli.progress import progress
from warmstart.lineage import recorded
from warmstart.locations import public
from warmstart.mapping.grouping import grouped, printable
from warmstart.mapping.model.names import WRAPPER_SEGMENTS
from warmstart.tensors import dtype_name, non_finite


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="The checkpoint: a file, a folder, a model of the hub, or a URL.")
    parser.add_argument("--nonfinite", action="store_true", help="Read every tensor and count NaN and infinities.")
    parser.add_argument("--digest", action="store_true", help="Read the file and print its SHA-256.")
    parser.add_argument("--rows", type=int, default=40, help="At most this many groups; 0: every tensor by itself.")
    add_rules(parser, READING)


def run(options: Namespace) -> Answer:
    """Keys of the JSON: `location`, `format`, `checkpoint_key`, `trees`, `tensors` (a list), `elements`, `bytes`, `dtypes`,
    `wrappers`, `header_sha256`, `sha256`, `nonfinite`, `metadata`, `lineages`, `notes`.
    """
    rules = pretrained(options, READING)
    checkpoint, trees = opened_whole(rules)
    infos = {key: checkpoint.info(key) for key in checkpoint.keys()}
    dtypes = Counter(dtype_name(info.dtype) for info in infos.values())
    data: dict[str, Any] = {
        "location": public(checkpoint.location),
        "format": checkpoint.format,
        "checkpoint_key": checkpoint.checkpoint_key,
        "trees": [
            {"checkpoint_key": t.checkpoint_key, "tensors": len(t), "elements": sum(t.info(k).numel for k in t.keys())}
            for t in trees
        ],
        "tensors": [
            {"key": key, "shape": list(info.shape), "dtype": dtype_name(info.dtype), "bytes": info.nbytes}
            for key, info in infos.items()
        ],
        "elements": sum(info.numel for info in infos.values()),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": dict(dtypes.most_common()),
        "wrappers": sorted({segment for key in infos for segment in key.split(".")} & WRAPPER_SEGMENTS),
        "header_sha256": checkpoint.header_digest(),
        "sha256": checkpoint.sha256() if options.digest else None,
        "nonfinite": _non_finite(checkpoint) if options.nonfinite else None,
        "metadata": checkpoint.metadata,
        "lineages": recorded(checkpoint),
        "notes": list(checkpoint.notes),
    }
    return Answer("\n".join(_lines(data, options.rows)), data)


def _non_finite(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    found = {}
    total = sum(checkpoint.info(key).nbytes for key in checkpoint.keys())
    with progress("looking for NaN and infinities", total) as told:
        for key in checkpoint.keys():
            tensor = checkpoint.read(key)
            if tensor.is_floating_point() or tensor.is_complex():
                bad = tensor[non_finite(tensor)]
                if bad.numel():
                    nan = int(bad.to(torch.complex128 if bad.is_complex() else torch.float64).isnan().sum())
                    found[key] = {"nan": nan, "inf": bad.numel() - nan}
            told(checkpoint.info(key).nbytes)
    return found


def _lines(data: dict[str, Any], limit: int) -> list[str]:
    dtypes = ", ".join(f"{count:,} {name}" for name, count in data["dtypes"].items())
    tree = f" [{data['checkpoint_key']}]" if data["checkpoint_key"] else ""
    counts = f"{len(data['tensors']):,} tensors ({dtypes}), {data['elements']:,} elements, {data['bytes']:,} bytes"
    out = [f"{data['location']}{tree}", f"  {data['format']}: {counts}"]
    if data["trees"]:
        out.append(f"  {len(data['trees'])} trees; a load takes one of them:")
        for t in data["trees"]:
            out.append(
                f'    --checkpoint_key "{t["checkpoint_key"]}"  {t["tensors"]:,} tensors, {t["elements"]:,} elements'
            )
    if data["wrappers"]:
        out.append(f"  wrapper segments in the names: {', '.join(data['wrappers'])}; a plan takes them out by itself")
    if data["sha256"]:
        out.append(f"  SHA-256 {data['sha256']}")
    tensors = [(t["key"], f"{tuple(t['shape'])} {t['dtype']}") for t in data["tensors"]]
    groups = grouped(tensors)
    shown = groups if len(groups) <= limit else groups[: limit - 1]
    rows = [(g.template, g.tag, f"  x{len(g):,}" if len(g) > 1 else "") for g in shown]
    if limit <= 0:
        rows = [(key, what, "") for key, what in tensors]
    width = min(72, max((len(printable(name)) for name, _, _ in rows), default=0))
    out += [f"  {printable(name):{width}}  {what}{count}" for name, what, count in rows]
    if limit > 0 and (rest := groups[len(shown) :]):
        out.append(f"  ... and {sum(map(len, rest)):,} more tensors in {len(rest):,} groups; --rows 0 prints them all")
    if data["nonfinite"] is not None:
        bad = [(key, f"{c['nan']:,} NaN, {c['inf']:,} inf") for key, c in data["nonfinite"].items()]
        out.append(f"  {len(bad):,} tensors hold NaN or infinities" if bad else "  every value is finite")
        out += [f"    {printable(key)}  {what}" for key, what in bad]
    if data["lineages"]:
        out.append("  it carries its lineage: warmstart lineage FILE prints it")
    return out + [f"  note: {note}" for note in data["notes"]]
