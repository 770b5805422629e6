"""Show what would go where in a model, and what does not fit, from names, shapes and dtypes alone.

No tensor is read and nothing is written, except the lock file that --lock asks for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from warmstart.api import plan
from warmstart.cli.answers import Answer, Exit
from warmstart.cli.models import HELP, model_of
from warmstart.cli.options import FIELDS, as_options
from warmstart.cli.parsing import add_rules, sources
from warmstart.cli.placing import whole_file
from warmstart.mapping.plan.lock import compare
from warmstart.mapping.plan.plan import Plan


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="The checkpoint: a file, a folder, a model of the hub, or a URL.")
    parser.add_argument(
        "--pretrained",
        type=list[Any] | None,
        help="Only in the file of --config: several sources, each with its rules, [{source: a.pt, into: encoder}, ...].",
    )
    parser.add_argument("--model", required=True, help=HELP)
    parser.add_argument("--model_checkpoint_key", help="Which tree, where --model is a checkpoint of several.")
    parser.add_argument("--lock", help="Write the plan's decisions here, for load(..., lock=FILE) and the callbacks.")
    parser.add_argument("--force", action="store_true", help="Replace a lock file that decides otherwise.")
    add_rules(parser, FIELDS)


def run(options: Namespace) -> Answer:
    """Keys of the JSON: `fits`, `digest`, `lock` and those of `Plan.to_dict`."""
    parts = sources(options, FIELDS)
    made = plan(model_of(options.model, options.model_checkpoint_key), parts)
    code = Exit.DIFFERS if made.errors else Exit.OK
    text, lock = as_options(str(made)), None
    if options.lock is not None and made.errors:
        text, lock = f"{text}\n\n{options.lock}: not written, because the plan has errors", "not written"
    elif options.lock is not None:
        differs, lock = _lock(made, Path(options.lock).expanduser(), options.force)
        text = f"{text}\n{differs or f'{options.lock}: {lock}'}"
        code = Exit.DIFFERS if differs else code
    data = {"fits": not made.errors, "digest": made.digest(), "lock": lock, **made.to_dict()}
    return Answer(text, data, code)


def _lock(made: Plan, path: Path, force: bool) -> tuple[str, str]:
    """What a lock file that is there decides otherwise, in words, and what became of it."""
    there = path.is_file()
    if there and not force:
        problems = compare(made, path)
        if not problems:
            return "", "unchanged"
        return f"{path}: not replaced\n{problems[0].message}\n     or give --force", "differs"
    with whole_file(path, force=force) as scratch:
        scratch.write_text(made.to_yaml(), encoding="utf-8")
    return "", "written"
