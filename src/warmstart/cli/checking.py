"""Was this run really started from that checkpoint? By the lineage that the run's checkpoint carries, and by values.

Values tell kinship and not direction: two runs from one ancestor are alike, too. Weights that were trained apart do not
correlate; fine-tuned ones stay near their start.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from jsonargparse import ArgumentParser, Namespace

from warmstart.api import plan
from warmstart.checkpoints.base import Checkpoint
from warmstart.cli.answers import Answer, Exit
from warmstart.cli.comparing import Sums
from warmstart.cli.models import skeleton
from warmstart.cli.opening import opened, opened_beside
from warmstart.cli.parsing import READING, RENAMING, add_rules, names_functions, pretrained
from warmstart.cli.progress import progress
from warmstart.errors import CheckpointError, WarmStartError
from warmstart.lineage import recorded
from warmstart.loading.values import Values
from warmstart.locations import public
from warmstart.mapping.pretrained import Pretrained

Verdict = Literal["yes", "no", "unknown"]

_RULES: Final = (*RENAMING, "into", "include", "exclude", "match")
_OPTIONS: Final = (*READING, *_RULES)
_LEAST_ELEMENTS: Final = 64  # of a matrix whose correlation says something: chance alone gives 1 / sqrt(64)
_KIN, _STRANGERS = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Told:
    """What the lineage says: `source`, `ancestor` (of a source), `other` (sources), or `none` (is recorded)."""

    says: Literal["source", "ancestor", "other", "none"]
    rules: Mapping[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="MODEL-CHECKPOINT", help="The run's own checkpoint.")
    parser.add_argument("source", metavar="SOURCE", help="What it should have been started from.")
    parser.add_argument("--model_checkpoint_key", help="Which tree of MODEL-CHECKPOINT, as a dotted path.")
    add_rules(parser, _OPTIONS)


def run(options: Namespace) -> Answer:
    """Keys of the JSON: `verdict` (`yes`, `no`, `unknown`), `by_lineage`, `by_values`, `compared`, `equal`, `correlation` (the
    median over matrices), `distance` (of all together), `notes`.
    """
    run_of = opened_beside(options.checkpoint, options.model_checkpoint_key, "model_checkpoint_key")
    rules = pretrained(options, _OPTIONS)
    lineages = [record for record in recorded(run_of) if "unreadable" not in record]
    source = _source(rules, lineages)
    told = _by_lineage(lineages, source)
    notes = []
    if told.rules and not any(name in _RULES for name in rules.rules()):
        try:
            rules = dataclasses.replace(rules, **told.rules)
            notes.append("the names are matched by the rules that the lineage records")
        except (WarmStartError, TypeError) as error:
            notes.append(f"the rules that the lineage records cannot be used: {error}")
    pairs = _compared(run_of, dataclasses.replace(rules, source=source, checkpoint_key=None, sha256=None))
    kin = _correlations(pairs)
    values = _by_values(pairs, kin)
    total = Sums()
    for sums in pairs:
        total.add(sums)
    verdict = _verdict(told, values)
    data = {
        "verdict": verdict,
        "by_lineage": told.says,
        "by_values": values,
        "compared": len(pairs),
        "equal": total.equal,
        "correlation": statistics.median(kin) if kin else None,
        "distance": total.distance if pairs and total.distance != float("inf") else None,
        "notes": notes,
    }
    text = _text(data, public(options.checkpoint), public(source.location))
    return Answer(text, data, Exit.OK if verdict == "yes" else Exit.DIFFERS)


def _source(rules: Pretrained, lineages: Sequence[Mapping[str, Any]]) -> Checkpoint:
    """The source; of several trees, the one that the lineage names."""
    try:
        return opened(rules)
    except CheckpointError:
        keys = [s.get("checkpoint_key") for _, s in _sources(lineages, 0)]
        for key in keys if rules.checkpoint_key is None else ():
            if isinstance(key, str):
                try:
                    return opened(rules, key)
                except CheckpointError:
                    continue
        raise


def _sources(lineages: Sequence[Any], depth: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """All recorded sources, and how many generations back each is."""
    for record in lineages:
        if isinstance(record, dict) and isinstance(record.get("sources"), list):
            yield from ((depth, source) for source in record["sources"] if isinstance(source, dict))
            ancestors = record.get("ancestors")
            yield from _sources(ancestors if isinstance(ancestors, list) else [], depth + 1)


def _by_lineage(lineages: Sequence[Mapping[str, Any]], source: Checkpoint) -> Told:
    digest = source.header_digest()
    found = sorted(
        ((depth, s) for depth, s in _sources(lineages, 0) if s.get("header_sha256") == digest), key=lambda item: item[0]
    )
    if not found:
        return Told("other" if lineages else "none", {})
    depth, record = found[0]
    return Told("ancestor" if depth else "source", {} if depth else _usable(record.get("rules")))


def _usable(rules: object) -> dict[str, Any]:
    """Of recorded rules, those on names. A file must not name functions to import, nor have itself trusted."""
    if not isinstance(rules, dict) or names_functions(rules.get("convert")):
        return {}
    return {name: value for name, value in rules.items() if name in _RULES}


def _compared(run_of: Checkpoint, rules: Pretrained) -> list[Sums]:
    """Each tensor of the run with the one of the source that it would have been started from, as far as there is one."""
    made = plan(skeleton(run_of), rules)
    values = Values(made)
    chosen = [a for a in made.written if a.adapter is None and a.source_shape == a.shape]
    pairs = []
    with progress("comparing", sum(run_of.info(a.target).nbytes for a in chosen)) as told:
        for assignment in chosen:
            pairs.append(Sums.of(values.source(assignment), run_of.read(assignment.target)))
            told(run_of.info(assignment.target).nbytes)
    return pairs


def _correlations(pairs: Sequence[Sums]) -> list[float]:
    found = (sums.correlation for sums in pairs if sums.count >= _LEAST_ELEMENTS)
    return [value for value in found if value is not None]


def _by_values(pairs: Sequence[Sums], kin: Sequence[float]) -> Verdict:
    if pairs and all(sums.equal for sums in pairs):
        return "yes"
    if not kin:
        return "unknown"
    middle = statistics.median(kin)
    return "yes" if middle >= _KIN else "no" if middle <= _STRANGERS else "unknown"


def _verdict(told: Told, values: Verdict) -> Verdict:
    recorded_so = told.says in ("source", "ancestor")
    if values == "unknown":
        return "yes" if recorded_so else "unknown"
    return "unknown" if values == "no" and recorded_so else values


def _text(data: Mapping[str, Any], checkpoint: str, source: str) -> str:
    said = {
        "source": "names it as a source, with this header",
        "ancestor": "names it as an ancestor of its source, with this header",
        "other": "names other sources",
        "none": "is not recorded",
    }[data["by_lineage"]]
    answer = {"yes": "yes", "no": "no", "unknown": "cannot tell"}[data["verdict"]]
    out = [f"{answer}: {checkpoint} <- {source}", f"  lineage {said}"]
    if not data["compared"]:
        out.append(
            "  values: no tensor of the one has a counterpart in the other; give the rules, such as --into or --rename"
        )
    else:
        correlation = "none" if data["correlation"] is None else f"{data['correlation']:.3f}"
        distance = "inf" if data["distance"] is None else f"{data['distance']:.2e}"
        out.append(
            f"  values: {data['equal']:,} of {data['compared']:,} tensors are equal bit for bit; median correlation "
            f"{correlation}, relative distance {distance}"
        )
    if data["by_lineage"] == "other" and data["by_values"] == "yes":
        out.append("  so it is kin to it all the same: a copy under other names, or from a common ancestor")
    if data["by_lineage"] in ("source", "ancestor") and data["by_values"] == "no":
        out.append(
            "  lineage and values contradict each other: other weights may have been written over those that were loaded"
        )
    return "\n".join(out + [f"  note: {note}" for note in data["notes"]])
