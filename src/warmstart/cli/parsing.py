"""The arguments: one parser for each command, with `Pretrained`'s fields as options of the same names."""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Any, Final

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from warmstart.cli.answers import Answer, UsageError
from warmstart.cli.configs import SEVERAL, config, part
from warmstart.cli.options import FIELDS
from warmstart.errors import MappingError
from warmstart.mapping.pretrained import Pretrained
from warmstart.version import __version__

COMMANDS: Final = {
    "inspect": ("inspecting", "what a checkpoint holds: trees, tensors, sizes, dtypes"),
    "plan": ("planning", "what would go where in a model, and what does not fit"),
    "diff": ("diffing", "how two checkpoints differ: names, shapes, values"),
    "convert": ("converting", "a checkpoint under rules, written as a new one"),
    "check": ("checking", "whether a run was really started from a checkpoint"),
    "lineage": ("ancestry", "where the weights of a file come from"),
    "suggest": ("suggesting", "the rules by which a checkpoint goes into a model, inferred"),
}
"""Each command's module in this package, with `add_arguments(parser)` and `run(options)`, and what it shows."""

_ENDS: Final = """exit codes: 0 it fits, is equal, is done; 1 it does not fit, differs, or is not there; 2 what was typed
cannot be meant; 3 a source cannot be read or an output cannot be written; 130 and 143 stopped by Ctrl-C and by SIGTERM.
completion: warmstart --print_completion shtab-bash (or shtab-zsh)"""

_KINDS: Final = {
    "collections.abc.Mapping": "a mapping ({name: value})",
    "collections.abc.Sequence": "a list ([...])",
    "dict": "a mapping ({name: value})",
    "list": "a list ([...])",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
}

_OBJECTS: Final = {
    "convert": "Conversions: [{sources: ..., targets: ..., ops: [{concat: {dim: 0}}]}].",
    "adapt": "Patterns of model entries and their adapters: {encoder.pos: {resize_pos_embed: {prefix_tokens: 1}}}.",
}

READING: Final = ("checkpoint_key", "sha256", "trust_pickle", "revision", "subfolder")
"""The fields that say how a source is read."""

RENAMING: Final = ("select", "strip_prefix", "rename", "convert")
"""The fields that mean something without a model."""


def parse(args: Sequence[str]) -> tuple[Callable[[Namespace], Answer], Namespace]:
    """The command that is named, and its arguments.

    Raises:
        UsageError: They are not what the command takes.
        SystemExit: Help was asked for, and given.
    """
    if args and args[0].startswith("--print_completion"):
        set_parsing_settings(add_print_completion_argument=True)
    named = args[0] if args and args[0] in COMMANDS else None
    parser = ArgumentParser(
        prog="warmstart",
        description=import_module("warmstart").__doc__,
        epilog=_ENDS,
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command")
    # One parser is made where one is enough; help and completion want them all.
    subparsers = {}
    for name in [named] if named else COMMANDS:
        file, shows = COMMANDS[name]
        module = import_module(f"warmstart.cli.{file}")
        subparsers[name] = sub = ArgumentParser(description=module.__doc__, epilog=_ENDS, exit_on_error=False)
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="Print JSON with stable keys instead of text.")
        commands.add_subcommand(name, sub, help=shows)
    options = set(_labels(subparsers[named])) if named else set()
    try:
        chosen = parser.parse_args(_files_first(args, options))
    except (ArgumentError, UnicodeDecodeError) as error:
        labels = {} if named is None else _labels(subparsers[named])
        raise UsageError(_in_words(str(error), named, labels)) from None
    command = import_module(f"warmstart.cli.{COMMANDS[chosen.command][0]}").run
    return command, chosen[chosen.command]


def add_rules(parser: ArgumentParser, names: Collection[str]) -> None:
    """Fields of `Pretrained` as options, and `--config` for a YAML file of them."""
    parser.add_argument(
        "--config",
        action="config",
        help="A YAML file of the options below, or of a callback's keywords; what is typed stands over it.",
    )
    # Rules that are objects in Python are plain data here, as in YAML: `Pretrained` says best what is wrong with them.
    objects = {"convert": list[dict[str, Any]], "adapt": dict[str, Any]}
    plain = set(names).difference(objects)
    parser.add_class_arguments(Pretrained, as_group=True, skip={"source", *FIELDS}.difference(plain))
    for name, kind in objects.items():
        if name in names:
            parser.add_argument(f"--{name}", type=kind, default=kind(), help=_OBJECTS[name])


def pretrained(options: Namespace, names: Collection[str]) -> Pretrained:
    """The source and its rules.

    Raises:
        UsageError: A value that cannot be meant.
    """
    if names_functions(options.get("convert")):
        find_modules_here()
    try:
        return Pretrained(options.source, **{name: options[name] for name in names})
    except (MappingError, TypeError) as error:
        raise UsageError(str(error)) from None


def sources(options: Namespace, names: Collection[str]) -> list[Pretrained]:
    """The source and its rules, or the several that the file of `--config` lists.

    Raises:
        UsageError: Both are given, or a value cannot be meant.
    """
    if options.pretrained is None:
        return [pretrained(options, names)]
    if options.source != SEVERAL:
        raise UsageError(f"{options.source!r} beside a list of sources; give the one or the other")
    if names_functions(options.pretrained):
        find_modules_here()
    parts = [part(value, f"pretrained[{number}]") for number, value in enumerate(options.pretrained)]
    if beside := list(pretrained(options, names).rules()):
        raise UsageError(f"--{beside[0]} beside a list of sources; give it to each of them")
    return parts


def names_functions(conversions: object) -> bool:
    """Whether conversions as plain data may have an `Apply`, however it is spelled, whose function would be imported."""
    return "apply" in str(conversions).lower()


def find_modules_here() -> None:
    """Let functions and classes that were named be found in this folder, behind everything that is installed."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _files_first(args: Sequence[str], options: Collection[str]) -> list[str]:
    """`--config FILE` before everything else, so that what is typed stands over what is in the file."""
    first: list[str] = []
    rest: list[str] = []
    words = list(args[1:])
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            first += [word, config(words.pop(0), options)]
        elif word.startswith("--config="):
            first += ["--config", config(word.removeprefix("--config="), options)]
        else:
            rest.append(word)
    return [*args[:1], *first, *rest]


def _labels(parser: ArgumentParser) -> dict[str, str]:
    """Each argument as its user types it: `--model`, `SOURCE`."""
    return {
        action.dest: action.option_strings[0] if action.option_strings else str(action.metavar or action.dest.upper())
        for action in parser._actions
    }


def _in_words(message: str, command: str | None, labels: Mapping[str, str]) -> str:
    """What jsonargparse says, on one line, in the words of the command line, and with the nearest option."""
    see = f"see warmstart {f'{command} ' if command else ''}--help"
    if unknown := re.search(r"does not accept option '([^']*)'|unrecognized arguments: (\S+)", message):
        in_file, typed = unknown.groups()
        if command is None and typed == "--json":
            return "--json comes after the command: warmstart inspect SOURCE --json"
        near = difflib.get_close_matches((in_file or typed).lstrip("-"), labels, n=1)
        hint = f"; did you mean {labels[near[0]] if typed else near[0]}?" if near else ""
        where = "the file of --config: " if in_file else ""
        return f"{where}{in_file or typed!r} is no option of {command or 'warmstart'}{hint}; {see}"
    if ambiguous := re.search(r"ambiguous option: (\S+) could match (.*)", message):
        near_names = dict.fromkeys(name.strip().removesuffix("+") for name in ambiguous[2].split(","))
        return (
            f"{ambiguous[1]!r} is no option of {command or 'warmstart'}; did you mean {' or '.join(near_names)}?; {see}"
        )
    if value := re.search(r'Parser key "([\w.]+)".*?(?:Given value|Got value): (.*)', message, re.DOTALL):
        wanted = re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])", message)
        kinds = " or ".join(dict.fromkeys(_KINDS.get(kind, kind) or choices for kind, choices in wanted))
        return f"--{value[1]}: {' '.join(value[2].split())!r} should be {kinds or 'something else'}; {see}"
    if lacking := re.search(r"arguments are required: (.*)", message):
        names = [labels.get(name.rpartition(".")[2], name) for name in lacking[1].split(", ")]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing; {see}"
    if command is None and 'expected "command"' in message:
        return f"name a command: {', '.join(COMMANDS)}; {see}"
    if choice := re.search(r"argument command: invalid choice: '(.*)' \(", message):
        near = difflib.get_close_matches(choice[1], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{choice[1]!r} is no command{hint}; the commands are {', '.join(COMMANDS)}"
    said = re.sub(r'Parser key "([\w.]+)"', r"--\1", message)
    return f"{' '.join(said.split())}; {see}"
