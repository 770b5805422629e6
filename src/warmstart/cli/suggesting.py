"""Infer the rules by which a checkpoint goes into a model, as YAML: warmstart suggest SOURCE --model ... > rules.yaml.

What is sure is printed as rules that --config and the callbacks take; what is only proposed, or open, is said as comments. No
tensor is read.
"""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from warmstart.api import suggest
from warmstart.cli.answers import Answer, Exit
from warmstart.cli.models import HELP, model_of
from warmstart.cli.parsing import add_rules, pretrained

_FIELDS = ("checkpoint_key", "select", "into", "include", "exclude", "revision", "subfolder", "trust_pickle")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="The checkpoint: a file, a folder, a model of the hub, or a URL.")
    parser.add_argument("--model", required=True, help=HELP)
    parser.add_argument("--model_checkpoint_key", help="Which tree, where --model is a checkpoint of several.")
    parser.add_argument(
        "--accept", type=str | list[str], default=[], help="Entries whose proposals are taken too, as patterns."
    )
    parser.add_argument(
        "--no_vocabulary", action="store_true", help="Do without the declared words of known codebases."
    )
    add_rules(parser, _FIELDS)


def run(options: Namespace) -> Answer:
    """Keys of the JSON: `rules`, `mapping` (entry to keys), `proposed` and `unexplained` as text."""
    found = suggest(
        model_of(options.model, options.model_checkpoint_key),
        pretrained(options, _FIELDS),
        accept=options.accept,
        vocabulary=not options.no_vocabulary,
    )
    data = {
        "rules": found.pretrained.rules(),
        "mapping": {name: list(keys) for name, keys in found.mapping.items()},
        "proposed": [str(proposal) for proposal in found.proposed],
        "unexplained": str(found.unexplained),
    }
    return Answer(found.to_yaml(), data, Exit.OK)
