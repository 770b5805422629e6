"""Templates: dotted names with placeholders, matched against key names and rendered into them, exactly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from warmstart.errors import MappingError
from warmstart.mapping.grouping import printable

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[^{}]+|[{}]")
_NAME = r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
_REST = re.compile(rf"{_NAME}\.\.\.")
_INDEX = re.compile(
    rf"\s*(?:(?P<before>[0-9]{{1,9}})\s*\*\s*)?{_NAME}(?:\s*\*\s*(?P<after>[0-9]{{1,9}}))?"
    r"\s*(?:(?P<sign>[+-])\s*(?P<offset>[0-9]{1,9}))?\s*"
)
_DIGITS = "0|[1-9][0-9]{0,17}"  # `00` is not 0: what is matched must render as it was spelled
_EXAMPLE = "'layers.{i}.{r...}' or 'layers.{2*i+1}.weight' (a brace of the name itself is written twice)"


@dataclass(frozen=True, slots=True)
class Placeholder:
    """`{x}`, `{x...}` or an index, `scale * x + offset`."""

    name: str
    rest: bool = False
    index: bool = False
    scale: int = 1
    offset: int = 0

    @property
    def least(self) -> int:
        """The least value of `x` whose index is not negative."""
        return max(0, -(self.offset // self.scale))


class Template:
    """A name in which `{x}` stands for one segment or a part of one and `{x...}` for zero or more segments.

    `{2*i+1}` stands for the number that it comes to: `[a*]x[+b]` or `x*a`, with `-` too. A value is the text that `{x}`
    stands for (at least one character); of `{x...}`, each of its segments followed by a dot; of an index, `x` itself as
    decimal digits.

    Args:
        text: The template.
        numbers: Placeholders that are indices elsewhere, with their least value: here they match only such numbers.

    Raises:
        MappingError: It cannot be parsed.
    """

    def __init__(self, text: str, numbers: Mapping[str, int] | None = None) -> None:
        self.text = text
        self._parts = _parsed(text)
        self.placeholders = tuple(part for part in self._parts if isinstance(part, Placeholder))
        self.names = tuple(dict.fromkeys(p.name for p in self.placeholders))
        self._numbers = numbers or {}
        seen: set[str] = set()
        self._captured: list[Placeholder] = []  # all but those that the regex itself compares with an earlier one
        for placeholder in self.placeholders:
            if placeholder.name not in seen or not self._is_text(placeholder):
                self._captured.append(placeholder)
            seen.add(placeholder.name)
        self._regex = re.compile(self._pattern(lazy=True), re.DOTALL)
        # Where two placeholders can share out a name between them, the lazy and the greedy match differ.
        self._greedy = re.compile(self._pattern(lazy=False), re.DOTALL) if _elastic(self._parts) else None
        first, last = self._parts[0], self._parts[-1]
        self._start = first.rstrip(".") if isinstance(first, str) else ""
        self._end = last.lstrip(".") if isinstance(last, str) else ""

    def check_source(self) -> None:
        """Refuse a template that can be rendered, but never be matched in one way only.

        Raises:
            MappingError: One `{x...}` follows another.
        """
        for part, dot, after in zip(self._parts, self._parts[1:], self._parts[2:], strict=False):
            if (
                isinstance(part, Placeholder)
                and isinstance(after, Placeholder)
                and part.rest
                and after.rest
                and dot == "."
            ):
                raise _unparsable(self.text, f"nothing tells {_written(part)} from {_written(after)}")

    def match(self, name: str) -> dict[str, str] | None:
        """The placeholders' values if the whole name fits, else None; `render` gives the name back from them.

        Raises:
            MappingError: The name fits in more than one way.
        """
        if not (name.startswith(self._start) and name.endswith(self._end)):
            return None
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        if self._greedy is not None:
            other = self._greedy.fullmatch(name)
            assert other is not None
            if other.groups() != found.groups():
                raise MappingError(
                    f"'{printable(self.text)}' fits '{printable(name)}' in more than one way; "
                    "write more of the name out, or use one template per case"
                )
        values: dict[str, str] = {}
        for placeholder, text in zip(self._captured, found.groups(), strict=True):
            value = self._value(placeholder, text)
            if value is None or values.setdefault(placeholder.name, value) != value:
                return None
        return values

    def render(self, values: Mapping[str, str]) -> str:
        """The name for these values; a placeholder without one is left as it is written.

        Raises:
            MappingError: Nothing would be left of the name.
        """
        out: list[str] = []
        skip_dot = False
        for number, part in enumerate(self._parts):
            if isinstance(part, str):
                out.append(part.removeprefix(".") if skip_dot else part)
                skip_dot = False
            elif part.name not in values:
                out.append(_written(part))
            elif part.index:
                out.append(str(part.scale * int(values[part.name]) + part.offset))
            elif part.rest and number + 1 < len(self._parts):
                out.append(values[part.name])
                skip_dot = True
            elif part.rest:
                before = "".join(out)
                value = values[part.name]
                out = [before + value[:-1] if value else before.removesuffix(".")]
            else:
                out.append(values[part.name])
        name = "".join(out)
        if not name and not any(values.get(p.name) for p in self.placeholders):
            raise MappingError(f"'{printable(self.text)}' leaves nothing of the name; write a segment before it")
        return name

    @property
    def example(self) -> str:
        """A name that it might stand for, to look up its nearest neighbours."""
        return re.sub(r"\{[^{}]*\}", "0", re.sub(r"\{\w*\.\.\.\}\.?", "", self.text))

    def _is_text(self, placeholder: Placeholder) -> bool:
        return not (placeholder.rest or placeholder.index or placeholder.name in self._numbers)

    def _pattern(self, *, lazy: bool) -> str:
        """The regex: a `{x...}` swallows the dot after it, or the one before it where it comes last."""
        how = "?" if lazy else ""
        out: list[str] = []
        seen: set[str] = set()
        last = len(self._parts) - 1
        for number, part in enumerate(self._parts):
            before = self._parts[number - 1] if number else None
            after = self._parts[number + 1] if number < last else None
            if isinstance(part, str):
                text = part.removeprefix(".") if isinstance(before, Placeholder) and before.rest else part
                if isinstance(after, Placeholder) and after.rest and number + 1 == last:
                    text = text.removesuffix(".")
                out.append(re.escape(text))
                continue
            if self._is_text(part):
                out.append(f"(?P={part.name})" if part.name in seen else f"(?P<{part.name}>[^.]+{how})")
                seen.add(part.name)
            elif not part.rest:
                out.append(f"({_DIGITS})")
            elif after is not None:
                out.append(rf"((?:[^.]*\.)*{how})")
            else:
                out.append(r"(.*)" if before is None else rf"((?:\.[^.]*)*{how})")
        return "".join(out)

    def _value(self, placeholder: Placeholder, text: str) -> str | None:
        if placeholder.rest:
            if placeholder is not self._parts[-1]:
                return text
            return text + "." if len(self._parts) == 1 else text[1:] + "." if text else ""
        if self._is_text(placeholder):
            return text
        value, remainder = divmod(int(text) - placeholder.offset, placeholder.scale)
        return str(value) if not remainder and value >= self._numbers.get(placeholder.name, 0) else None

    def __str__(self) -> str:
        return self.text


def numbered(templates: Iterable[Template]) -> dict[str, int]:
    """The placeholders that are indices in any of the templates, with the least value that all of them can render."""
    least: dict[str, int] = {}
    for placeholder in (p for template in templates for p in template.placeholders):
        if placeholder.index:
            least[placeholder.name] = max(least.get(placeholder.name, 0), placeholder.least)
    return least


def natural(text: str) -> tuple[object, ...]:
    """A sorting key by which 2 comes before 10."""
    # Numbers as (length, digits): `int` refuses those of several thousand digits.
    pieces = re.split(r"([0-9]+)", text)
    return tuple([_number(p) if i % 2 else p for i, p in enumerate(pieces)]), text


def _number(digits: str) -> tuple[int, str]:
    digits = digits.lstrip("0")
    return (len(digits), digits)


def _parsed(text: str) -> list[str | Placeholder]:
    """Literals and placeholders in turn; what touches is refused where it could not be told apart."""
    parts: list[str | Placeholder] = []
    for token in _TOKEN.finditer(text):
        body = token.group(1)
        if body is not None:
            if parts and isinstance(parts[-1], Placeholder):
                raise _unparsable(text, "two placeholders touch")
            parts.append(_placeholder(text, body))
        elif token.group() in "{}":
            raise _unparsable(text, f"a {token.group()!r} without its partner")
        else:
            literal = token.group()[:1] if token.group() in ("{{", "}}") else token.group()
            if parts and isinstance(before := parts[-1], str):
                parts[-1] = before + literal
            else:
                parts.append(literal)
    if not parts:
        raise _unparsable(text, "it is empty")
    for number, part in enumerate(parts):
        if isinstance(part, Placeholder) and part.rest:
            before, after = parts[number - 1] if number else ".", parts[number + 1] if number + 1 < len(parts) else "."
            if not (str(before).endswith(".") and str(after).startswith(".")):
                raise _unparsable(text, f"{_written(part)} must be a whole segment")
    return parts


def _elastic(parts: Sequence[str | Placeholder]) -> bool:
    """Whether more than one placeholder takes segments, or characters of one segment."""
    segments = "".join(
        ("*" if p.rest else "?") if isinstance(p, Placeholder) else re.sub("[*?]", "_", p) for p in parts
    )
    return segments.count("*") > 1 or any(segment.count("?") > 1 for segment in segments.split("."))


def _placeholder(text: str, body: str) -> Placeholder:
    if found := _REST.fullmatch(body):
        return Placeholder(found["name"], rest=True)
    found = _INDEX.fullmatch(body)
    if found is None or (found["before"] and found["after"]):
        raise _unparsable(text, f"{{{body}}} is no placeholder")
    if not (found["before"] or found["after"] or found["sign"]):
        return Placeholder(found["name"])
    scale = int(found["before"] or found["after"] or 1)
    if not scale:
        raise _unparsable(text, f"{{{body}}} is the same number for every {found['name']}")
    offset = int((found["sign"] or "") + (found["offset"] or "0"))
    return Placeholder(found["name"], index=True, scale=scale, offset=offset)


def _written(part: Placeholder) -> str:
    if part.rest:
        return f"{{{part.name}...}}"
    scale = f"{part.scale}*" if part.scale != 1 else ""
    offset = f"{part.offset:+d}" if part.offset else ""
    return f"{{{scale}{part.name}{offset}}}"


def _unparsable(text: str, why: str) -> MappingError:
    return MappingError(f"template '{printable(text)}': {printable(why)}; write it like {_EXAMPLE}")
