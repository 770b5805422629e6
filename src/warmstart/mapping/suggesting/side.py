"""One side: its templates, the modules they make, and what the words of their names say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from warmstart.mapping.suggesting.indices import Children
from warmstart.mapping.suggesting.items import Item
from warmstart.mapping.suggesting.templates import Path, Template, index_positions, numbered
from warmstart.mapping.suggesting.vocabulary import FILLERS, ORDINALS
from warmstart.mapping.suggesting.words import INDEX, Lexicon

Bag = tuple[str, ...]
_ORDINALS = frozenset(ORDINALS)


@dataclass(slots=True)
class Side:
    """The templates of one side and what their words say."""

    templates: Sequence[Template]
    lexicon: Lexicon
    paths: set[Path] = field(default_factory=set)
    names: set[Path] = field(default_factory=set)
    readings: set[tuple[Bag, ...]] = field(default_factory=set)
    segments: set[str] = field(default_factory=set)
    parents: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    tails: dict[Template, list[Bag]] = field(default_factory=dict)
    families: dict[tuple[Path, str], set[int]] = field(default_factory=lambda: defaultdict(set))
    children: Children = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    saying: dict[str, list[Template]] = field(default_factory=lambda: defaultdict(list))
    starts: dict[Path, set[int]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        for template in self.templates:
            self.names.add(template.path)
            self.segments.update(template.path)
            words = [word for segment in template.path for word in self.lexicon.content(segment)]
            self.words.update(words)
            for word in dict.fromkeys(words):
                self.saying[word].append(template)
            for depth, segment in enumerate(template.path):
                self.children[template.path[:depth]][segment].add((template.path[depth + 1 :], template.shape))
                stem, number = numbered(segment)
                if number is not None:
                    self.families[template.path[:depth], stem].add(number)
            self.paths.update(template.path[:i] for i in range(len(template.path) + 1))
            self.tails[template] = list(_tails(template.path, self.lexicon))
        for (parent, stem), numbers in self.families.items():
            if stem and len(numbers) > 1 and (item := item_around(parent)):
                self.starts[item].add(min(numbers))
        self.parents.update(path[-1] for path in self.paths if path)
        self.readings = {self._reading(path) for path in self.paths}

    def first(self, parent: Path, stem: str) -> int:
        """The number from which a row counts; of a row of one, which may have lost its first, those beside it in a layer."""
        row, beside = self.families[parent, stem], self.starts.get(item_around(parent), set())
        return min(beside) if len(row) == len(beside) == 1 else min(row)

    def counts_short(self, path: Path) -> bool:
        """Whether a name on a path counts in words, and others of its row are missing: `first` where there is no `second`."""
        for depth, segment in enumerate(path):
            if not _ORDINALS.isdisjoint(words := set(self.lexicon.segment(segment))):
                rest = words - _ORDINALS
                row = [set(self.lexicon.segment(other)) for other in self.children[path[:depth]]]
                there = {word for other in row for word in other & _ORDINALS if other - _ORDINALS == rest}
                if len(there) == 1 or there != set(ORDINALS[: len(there)]):
                    return True
        return False

    def has_fillers(self, path: Path) -> bool:
        """Whether a name and others beside it say only that there is a layer, so that these words tell: `fc` and `proj`."""
        row = self.children[path[:-1]]
        return self._is_filler(path[-1]) and any(s != path[-1] and self._is_filler(s) for s in row)

    def _is_filler(self, segment: str) -> bool:
        return segment != INDEX and FILLERS.keys() >= set(self.lexicon.segment(segment))

    def _reading(self, path: Path) -> tuple[Bag, ...]:
        return tuple(self.lexicon.content(segment) for segment in path)

    def reads(self, path: Path) -> bool:
        """Whether there is a node of a path's words: `enc` where `encoder` is."""
        return self._reading(path) in self.readings

    def beside(self, place: Path, word: str, item: Item) -> Iterator[Template]:
        """The tensors below a place that say a word, in the same items of lists as another does."""
        lists = len(index_positions(place))
        there = {indices[:lists] for t in item.tensors.values() for indices in t.names}
        for template in self.saying.get(word, ()):
            if template.path[: len(place)] == place and any(indices[:lists] in there for indices in template.names):
                yield template


def item_around(path: Path) -> Path:
    """The list item that a path lies in."""
    return path[: max((i + 1 for i in index_positions(path)), default=0)]


def _tails(path: Path, lexicon: Lexicon) -> Iterator[Bag]:
    """The words of each tail of a path, the longest first, in no order: `a.b_c` and `b.a.c` are alike."""
    for start in range(len(path)):
        yield bag(path[start:], lexicon)


def bag(path: Path, lexicon: Lexicon) -> Bag:
    words: list[str] = []
    for segment in path:
        for word in lexicon.content(segment):
            if word == INDEX or not words or word != words[-1]:
                words.append(word)
    return tuple(sorted(words))
