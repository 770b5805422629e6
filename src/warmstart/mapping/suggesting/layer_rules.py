"""Rename rules for layers: one for all that only a number tells apart, as far as it says the same of all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations

from warmstart.mapping.planning.renames import Renamer
from warmstart.mapping.suggesting.rules import Rule
from warmstart.mapping.suggesting.templates import Path, numbered
from warmstart.mapping.suggesting.words import INDEX

_LEAST = 2  # layers from which a rule with numbers stands for all of them
_NUMBERS = 4  # in a path that are tried in all ways


def layer_renames(names: Mapping[str, str], others: Iterable[str]) -> dict[str, str]:
    """Rules that turn the names of layers into others and match no further name.

    Args:
        names: Key to the model's name.
        others: Keys that the rules leave alone.
    """
    modules = _modules(names)
    standing: dict[Rule, list[Path]] = defaultdict(list)
    for path, image in modules.items():
        for rule in _rules(path, image):
            standing[rule].append(path)
    left = dict.fromkeys(modules)
    apart = list(others)
    found: list[Rule] = []
    for rule, paths in sorted(standing.items(), key=lambda item: (-len(item[1]), item[0].regex, item[0].replacement)):
        new = [path for path in paths if path in left]
        whole = INDEX not in "".join(rule.source)
        if (len(new) >= _LEAST and not _meets(rule, apart)) or (whole and new):
            found.append(rule)
            for path in new:
                del left[path]
    ordered = sorted(found, key=lambda rule: (len(standing[rule]), rule.regex))
    made = {rule.regex: rule.replacement for rule in ordered}
    renamer = Renamer([made])
    exceptions = [_whole(path, image) for path, image in modules.items() if renamer(".".join(path)) != ".".join(image)]
    return {**{rule.regex: rule.replacement for rule in exceptions}, **made}


def _modules(names: Mapping[str, str]) -> dict[Path, Path]:
    """The modules of the names, or whole names where a tensor of theirs is called otherwise."""
    out: dict[Path, Path] = {}
    whole: set[Path] = set()
    parts = [(tuple(key.split(".")), tuple(entry.split("."))) for key, entry in names.items()]
    for key, entry in parts:
        if key[-1] != entry[-1] or out.setdefault(key[:-1], entry[:-1]) != entry[:-1]:
            whole.add(key[:-1])
    return {path: image for path, image in out.items() if path not in whole} | {
        key: entry for key, entry in parts if key[:-1] in whole
    }


def _rules(path: Path, image: Path) -> Iterator[Rule]:
    """Rules that are right for one layer: with none of its numbers left open, or with some that both sides have."""
    places = [
        (p, q)
        for p, segment in enumerate(path)
        for q, other in enumerate(image)
        if (number := numbered(segment)[1]) is not None and number == numbered(other)[1]
    ]
    for count in range(min(len(places), _NUMBERS) + 1):
        for chosen in combinations(places[:_NUMBERS], count):
            turns = list(zip(*chosen, strict=True)) or [(), ()]
            if all(list(turn) == sorted(set(turn)) for turn in turns):
                yield Rule(_opened(path, turns[0]), _opened(image, turns[1]), first=True)


def _opened(path: Path, places: Iterable[int]) -> Path:
    at = set(places)
    return tuple(numbered(segment)[0] + INDEX if i in at else segment for i, segment in enumerate(path))


def _meets(rule: Rule, names: Iterable[str]) -> bool:
    regex = re.compile(rf"{rule.regex}(?![^.])")
    return any(regex.match(name) for name in names)


def _whole(path: Path, image: Path) -> Rule:
    return Rule(path, image, first=True)
