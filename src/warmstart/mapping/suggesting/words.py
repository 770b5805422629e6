"""Names as words: `self_attn.out_proj` and `attention.o` are both `attention output`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from warmstart.mapping.suggesting.vocabulary import FILLERS, SYNONYMS

_SPLIT = re.compile(r"[Cc]onv[123]d|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^A-Za-z0-9_.\s-]+")
_LONGEST = 200  # of a segment that is split at all: beyond it, a name is one opaque word
INDEX = "\ue000"  # stands for an index; written `#` in comments. Of a private plane, so that no name holds it


@dataclass(slots=True)
class Lexicon:
    """How segments are read.

    Attributes:
        vocabulary: Whether the declared synonyms are used, or only what the letters say.
        learned: Segments that are read as others, each proven to be the other's rename.
    """

    vocabulary: bool = True
    learned: Mapping[str, str] = field(default_factory=dict)
    _single: dict[str, str] = field(default_factory=dict)
    _several: dict[tuple[str, ...], str] = field(default_factory=dict)
    _segments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _depth: int = 1

    def __post_init__(self) -> None:
        for synonym in SYNONYMS if self.vocabulary else ():
            for spelling in synonym.words:
                words = tuple(spelling.split())
                if len(words) == 1:
                    self._single[spelling] = synonym.words[0]
                else:
                    self._several[words] = synonym.words[0]
                    self._depth = max(self._depth, len(words))

    def segment(self, segment: str) -> tuple[str, ...]:
        """The words of one path segment, each as the vocabulary's first spelling; an index is `#`."""
        known = self._segments.get(segment)
        if known is None:
            known = self._segments[segment] = tuple(self._read(self.learned.get(segment, segment)))
        return known

    def content(self, segment: str) -> tuple[str, ...]:
        """The words of a segment that say something: without fillers (of `layers.#` and `fc1`, `#` and `1` are left).

        Several fillers say something together: `H_module` and `L_module` are two towers.
        """
        words = self.segment(segment)
        if not self.vocabulary:
            return words
        if "self" in words and len(words) > 1 and "attention" not in words:
            words = tuple("attention" if word == "self" else word for word in words)  # `norm_self`
        telling = tuple(w for w in words if w not in FILLERS)
        return telling if telling or len(words) == 1 else words

    def _read(self, segment: str) -> list[str]:
        if len(segment) > _LONGEST:
            return [segment]
        words = [self._word(word.lower()) for word in self._split(segment)]
        out: list[str] = []
        at = 0
        while at < len(words):
            for length in range(min(self._depth, len(words) - at), 1, -1):
                joined = self._several.get(tuple(words[at : at + length]))
                if joined is not None:
                    out.append(joined)
                    at += length
                    break
            else:
                out.append(words[at])
                at += 1
        return [word for i, word in enumerate(out) if i == 0 or word != out[i - 1]]

    def _split(self, segment: str) -> list[str]:
        if segment == INDEX or segment.lower() in self._single:
            return [segment]
        return _SPLIT.findall(segment) or [segment]

    def _word(self, word: str) -> str:
        word = self._single.get(word, word)
        if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is", "as")):
            word = word[:-1]  # layers, experts, embeddings
        return self._single.get(word, word)
