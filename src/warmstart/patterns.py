"""Patterns: a case-sensitive shell glob against a whole dotted name or any leading dotted path of it."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from warmstart.errors import MappingError

Patterns = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern. `encoder` matches `encoder` and `encoder.a.b`, never `encoder2`; `*` crosses dots.

    A leading `?` makes the pattern optional: it may then hit nothing.
    """

    text: str
    glob: str = field(init=False)
    optional: bool = field(init=False)

    def __post_init__(self) -> None:
        optional = self.text.startswith("?")
        glob = self.text[1:] if optional else self.text
        object.__setattr__(self, "optional", optional)
        object.__setattr__(self, "glob", glob)

    def matches(self, name: str) -> bool:
        return _compiled(self.glob).match(name) is not None


@functools.lru_cache(maxsize=4096)
def _compiled(glob: str) -> re.Pattern[str]:
    # fnmatch.translate gives `(?s:...)\Z` (`\z` from Python 3.14 on); we end at a dot as well.
    body = re.sub(r"\\[zZ]$", "", fnmatch.translate(glob))
    return re.compile(rf"{body}(?:\.|\Z)")


def as_patterns(value: Patterns, *, where: str = "patterns") -> tuple[Pattern, ...]:
    """One pattern or several, as a tuple of them.

    Raises:
        TypeError: A value is not a string.
        MappingError: A pattern is empty.
    """
    texts = [value] if isinstance(value, str) else list(value)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{where}: a pattern is a string such as 'encoder.*', not {text!r}")
        if not text.removeprefix("?"):
            raise MappingError(f"{where}: an empty pattern matches nothing; leave it out, or write '*' for everything")
    return tuple(Pattern(text) for text in texts)


class PatternSet:
    """Several patterns over one side, each remembering whether it hit a name. Plain paths cost a look-up, however many."""

    def __init__(self, patterns: Patterns, *, where: str) -> None:
        self.where = where
        self.patterns = as_patterns(patterns, where=where)
        self._hit = [False] * len(self.patterns)
        self._paths: dict[str, list[int]] = {}
        self._globs: list[int] = []
        for i, pattern in enumerate(self.patterns):
            if any(c in pattern.glob for c in "*?["):
                self._globs.append(i)
            else:
                self._paths.setdefault(pattern.glob, []).append(i)
        ends = zip(min(self._paths, default=""), max(self._paths, default=""), strict=False)
        self._start = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def which(self, *names: str) -> list[int]:
        """Indices of the patterns that match any of these spellings of one entry; each is marked as hit."""
        found: set[int] = set()
        for name in names:
            end = len(name) if self._paths and name.startswith(self._start) else -1
            while end >= 0:
                if hits := self._paths.get(name[:end]):
                    found.update(hits)
                end = name.rfind(".", 0, end)
            if self._globs:
                found.update(i for i in self._globs if self.patterns[i].matches(name))
        if not found:  # as most names
            return []
        for i in found:
            self._hit[i] = True
        return sorted(found)

    def matches(self, *names: str) -> bool:
        """Whether any pattern matches any of these spellings of one entry; every pattern that does is marked as hit."""
        return bool(self.which(*names))

    def without_hit(self) -> list[Pattern]:
        return [p for p, hit in zip(self.patterns, self._hit, strict=True) if not hit and not p.optional]


def nearest(text: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The names, or leading paths of names, that `text` most likely means: it lacks what stands before it, or is mistyped."""
    word = text.removeprefix("?").replace("\\.", ".").strip("*.^$\\")  # a rename rule is a regex
    depth = word.count(".") + 1
    candidates: set[str] = set()
    deeper: set[str] = set()
    for name in names:
        parts = name.split(".")
        candidates.update(".".join(parts[:d]) for d in {depth, depth + 1, len(parts)})
        if word and (at := f".{name}.".find(f".{word}.")) > 0:
            deeper.add(name[: at + len(word)])
    # difflib is quadratic in a word's length and linear in the candidates: long words and lists are cut.
    pool = sorted(c for c in candidates if len(c) < 200)[:5000]
    alike = difflib.get_close_matches(word[:200], pool, n=n, cutoff=0.6)
    return list(dict.fromkeys([*sorted(deeper, key=lambda path: (path.count("."), path)), *alike]))[:n]
