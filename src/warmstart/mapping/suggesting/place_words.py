"""The words of what lies below two corresponding places, and what the vocabulary says of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from warmstart.mapping.suggesting.branches import branches_of, way_back
from warmstart.mapping.suggesting.items import Item
from warmstart.mapping.suggesting.side import Bag, Side
from warmstart.mapping.suggesting.templates import Path, Place, index_positions, numbered
from warmstart.mapping.suggesting.vocabulary import BESIDE, PHRASES, Phrase
from warmstart.mapping.suggesting.words import INDEX

Modules = tuple[dict[Path, Path], dict[Path, Path]]  # of tensors in layers of torch: where the layer went

# Names of a block's norms, which speak of these two also where both sides have them: `post_attention_norm` beside another two.
_IN_BLOCKS = {tuple(sorted(name.split())) for p in PHRASES if p.of_two for row in p.rows for name in row}


class PlaceWords:
    """The words of items below a place; a word that many of them have weighs little."""

    def __init__(
        self,
        sides: tuple[Side, Side],
        phrases: Sequence[Phrase],
        modules: Modules,
        place: Place,
        items: tuple[Sequence[Item], Sequence[Item]],
    ) -> None:
        self.sides, self.phrases, self.modules, self.place = sides, phrases, modules, place
        self._said: dict[Item, frozenset[str]] = {}
        self._beside: dict[Item, frozenset[str]] = {}
        for side, both in enumerate(items):
            for item in both:
                self._said[item] = self._read(item, side)
                if phrases and (told := self._among_norms(item, side)):
                    self._beside[item] = told
        self.counts = [Counter(w for i in both for w in self._said[i]) for both in items]

    def _read(self, item: Item, side: int) -> frozenset[str]:
        lexicon = self.sides[0].lexicon
        path = item.path[len(self.place[side]) :]
        out = set()
        for depth, segment in enumerate(path, len(self.place[side])):
            stem, number = numbered(segment)
            for word in lexicon.content(segment):
                if word.isdecimal() and number is not None:
                    row = self.sides[side].families[item.path[:depth], stem]
                    first = self.sides[side].first(item.path[:depth], stem)
                    word += f" from {first}" if first != min(row) else ""
                    word += f" of {min(row)}-{max(row)}"
                if word != INDEX:
                    out.add(word)
        return frozenset(out)

    def _among_norms(self, item: Item, side: int) -> frozenset[str]:
        """What a norm's name says because of the only other norm beside it; nothing if it says the same anyway."""
        lexicon = self.sides[side].lexicon
        own = frozenset(lexicon.content(item.path[-1]))
        for name, other, told in BESIDE:
            if own == frozenset(name.split()):
                row = [frozenset(lexicon.content(s)) for s in self.sides[side].children[item.path[:-1]]]
                if [words for words in row if words != own and "norm" in words] == [frozenset(other.split())]:
                    return frozenset(told.split())
        return frozenset()

    def said(self, item: Item) -> frozenset[str]:
        return self._said[item]

    def told(self, item: Item) -> frozenset[str]:
        """The words by which an item takes its place in a row."""
        return self._beside.get(item, self._said[item])

    def score(self, x: Item, y: Item) -> float:
        a, b = self._said[x], self._said[y]
        if self.vetoed(x, y):
            return 0.0
        if self.sameturn_of(x, y):
            return 1.0
        total = self._weight(a) + self._weight(b)
        return 2 * self._weight(a & b) / total if total else 0.0

    def _weight(self, words: Iterable[str]) -> float:
        """Rounded once, so that the order of a set does not show: the same words are of a score of 1."""
        return math.fsum(1 / max(1, self.counts[0][word], self.counts[1][word]) for word in words)

    def sameturn_of(self, x: Item, y: Item) -> bool:
        """Whether the vocabulary says that the two stand at the same place of one row, and their numbers count alike."""
        if self._go_back(x, y):
            return True
        counts = [{word for word in self._said[item] if " of " in word} for item in (x, y)]
        if all(counts) and counts[0] != counts[1]:
            return False
        told = self.told(x), self.told(y)
        rows = [
            (turn_of(told[0], p.rows), turn_of(told[1], p.rows)) for p in self.phrases if self.telling(p, (x,), (y,))
        ]
        return any(a and a == b for a, b in rows)

    def _go_back(self, x: Item, y: Item) -> bool:
        """Whether both are the way back of one branch: below modules of the same words."""
        if not self.phrases or len({self._above(x, 0), self._above(y, 1)}) > 1:
            return False
        branch = way_back(x, self.sides[0])
        return branch is not None and branch == way_back(y, self.sides[1])

    def _above(self, item: Item, side: int) -> frozenset[str]:
        above = item.path[len(self.place[side]) : -1]
        return frozenset(word for segment in above for word in self.sides[side].lexicon.content(segment))

    def vetoed(self, x: Item, y: Item) -> bool:
        """Whether a tensor beside one of them went elsewhere, or the vocabulary says they stand at different places."""
        there, back = self.modules[0].get(x.path), self.modules[1].get(y.path)
        if (there and there not in (y.path, y.path[:-1])) or (back and back not in (x.path, x.path[:-1])):
            return True
        return self._other_branch(x, y) or self.contradicts(x, y, tells=True)

    def _other_branch(self, x: Item, y: Item) -> bool:
        """Whether one is of the attention and the other of the MLP: `ff_out` is not `self_attn.o_proj`; norms stand between."""
        if not self.phrases or "norm" in self._said[x] | self._said[y]:
            return False
        branches = branches_of(x, self.sides[0]), branches_of(y, self.sides[1])
        return all(branches) and branches[0].isdisjoint(branches[1])

    def telling(self, phrase: Phrase, xs: Iterable[Item], ys: Iterable[Item]) -> bool:
        """Whether a phrase is evidence for pairs: the ends of a stack are in no block, and a block's two norms are two."""
        if not phrase.tells or (phrase.of_stack and any(index_positions(item.path) for item in (*xs, *ys))):
            return False
        here, there = (
            {n for i in items for n in _norms(i, side)} for items, side in zip((xs, ys), self.sides, strict=True)
        )
        kept = here & there - _IN_BLOCKS if self._beside.keys().isdisjoint((*xs, *ys)) else set()
        return not phrase.of_two or max(len(here - kept), len(there - kept)) <= 2

    def contradicts(self, x: Item, y: Item, *, tells: bool) -> bool:
        """Whether the vocabulary says that the two stand at different places of a row."""
        turns = (self._turns(x, y, p) for p in self.phrases if p.tells is tells)
        return any(a and b and a != b for a, b in turns)

    def _turns(self, x: Item, y: Item, phrase: Phrase) -> tuple[tuple[int, ...], ...]:
        return self.turn(x, phrase), self.turn(y, phrase)

    def turn(self, item: Item, phrase: Phrase) -> tuple[int, ...]:
        """Which place of a row the words of an item name, or those of its last segment; nothing if none."""
        above, last = ([], *(self.sides[0].lexicon.content(segment) for segment in item.path))[-2:]
        own = frozenset((*above, *last) if last == ("norm",) else last)  # `embedding.norm`
        return turn_of(self.told(item), phrase.rows) or turn_of(self._beside.get(item, own), phrase.rows)


def _norms(item: Item, side: Side) -> set[Bag]:
    """The names of an item and of the norms beside it."""
    names = (side.lexicon.content(segment) for segment in side.children[item.path[:-1]])
    return {tuple(sorted(name)) for name in names if "norm" in name}


@lru_cache(maxsize=1 << 14)
def turn_of(words: frozenset[str], rows: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    if all(word[0].isdecimal() and not word.endswith(" of 1-2") for word in words):
        return ()  # a number that says it all is of a row of two: the first of three may be another map
    words = frozenset(word.partition(" ")[0] if " of 1-" in word else word for word in words)
    return tuple(sorted({turn for row in rows for turn, text in enumerate(row) if words == frozenset(text.split())}))
