"""`Pretrained`'s fields as they are typed on a command line, where the core spells them as Python."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from typing import Final

from warmstart.mapping.pretrained import Pretrained

FIELDS: Final = tuple(field.name for field in fields(Pretrained) if field.name != "source")

_VALUE = r"""\[[^]\n]*\]|\{[^}\n]*\}|"[^"\n]*"|'[^'\n]*'|True|False"""
_FIELD = re.compile(rf"(?<![\w.])({'|'.join(FIELDS)})=({_VALUE})")


def as_options(text: str) -> str:
    """What the core says, with `allow_missing=["head"]` as `--allow_missing '["head"]'`."""

    def option(match: re.Match[str]) -> str:
        line = match.string[: match.start()].rpartition("\n")[2]
        if line.count("(") > line.count(")"):  # an argument of a call
            return match[0]
        name, value = match.groups()
        value = value.lower() if value in {"True", "False"} else value[1:-1] if value[0] in "\"'" else value
        return f"--{name} {shlex.quote(value)}"

    return re.sub(r"(--\w+ \S+), (?=--)", r"\1 ", _FIELD.sub(option, text))
