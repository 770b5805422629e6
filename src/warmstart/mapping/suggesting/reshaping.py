"""Where names fit and shapes do not: one tensor for three, one for all experts, or a transposed one, as conversions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.ops.base import Op
from warmstart.mapping.conversions.ops.joining import Concat, Split
from warmstart.mapping.conversions.ops.layout import Transpose
from warmstart.mapping.conversions.ops.stacking import Stack, Unstack
from warmstart.mapping.planning.renames import Renamer
from warmstart.mapping.suggesting.inference import Guess, Inference, Match
from warmstart.mapping.suggesting.shifts import literal
from warmstart.mapping.suggesting.templates import Path, Template, index_positions
from warmstart.mapping.suggesting.vocabulary import FUSED
from warmstart.mapping.suggesting.words import INDEX, Lexicon

Words = frozenset[tuple[str, int]]

_FUSED, _PARTS = FUSED
_FIRST = 900_000  # indices of the example name by which a template is renamed


@dataclass(frozen=True, slots=True)
class Reshaping:
    """One conversion and what it does.

    Attributes:
        mapping: Entry to the keys it is made of, in order.
        doubt: Why it is not sure; empty if it is.
    """

    conversion: Conversion
    mapping: Mapping[str, tuple[str, ...]]
    why: str
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class _Side:
    path: Path
    template: Template

    @property
    def names(self) -> Mapping[tuple[int, ...], str]:
        return self.template.names


def reshapings(found: Inference, rules: Mapping[str, str], *, vocabulary: bool = True) -> list[Reshaping]:
    """Conversions between templates that nothing has paired, on names as the rename rules leave them."""
    keys, entries = found.left()
    renamer, lexicon = Renamer([rules]), Lexicon(vocabulary)
    a = _by_words((_Side(_renamed(t, renamer), t) for t in keys), lexicon)
    b = _by_words((_Side(t.spelled, t) for t in entries), lexicon)
    return [*_transposed(a, b, lexicon), *_stacked(a, b), *_unstacked(a, b), *_split(a, b), *_joined(a, b)]


def _renamed(template: Template, renamer: Renamer) -> Path:
    count = 0
    out = []
    for segment in template.spelled:
        if segment.endswith(INDEX):
            segment = f"{segment[:-1]}{_FIRST + count}"
            count += 1
        out.append(segment)
    name = renamer(".".join(out))
    for turn in range(count):
        name = name.replace(str(_FIRST + turn), INDEX)
    return tuple(name.split("."))


def _by_words(sides: Iterable[_Side], lexicon: Lexicon) -> dict[Words, list[_Side]]:
    out: dict[Words, list[_Side]] = defaultdict(list)
    for side in sides:
        out[frozenset(Counter(_words(side.path, lexicon)).items())].append(side)
    return out


def _words(path: Path, lexicon: Lexicon) -> list[str]:
    return [word for segment in path for word in lexicon.content(segment) if word != "weight"]


def _instead(words: Words, *, less: str, more: str = "") -> Words:
    counts = Counter(dict(words))
    counts[less] -= 1
    if more:
        counts[more] += 1
    return frozenset((+counts).items())


def _pairs(a: Mapping[Words, list[_Side]], b: Mapping[Words, list[_Side]], less: str) -> Iterator[tuple[_Side, _Side]]:
    """Items of `a` whose words but one are all those of exactly one item of `b`, and the other way round."""
    for words, sides in a.items():
        if not less or less in dict(words):
            there = b.get(_instead(words, less=less) if less else words, [])
            if len(sides) == len(there) == 1:
                yield sides[0], there[0]


def _transposed(
    a: Mapping[Words, list[_Side]], b: Mapping[Words, list[_Side]], lexicon: Lexicon
) -> Iterator[Reshaping]:
    """Pairs of the same words in the same order: `dense_h_to_4h` is not `dense_4h_to_h`."""
    named = {side.path: side for sides in b.values() for side in sides}
    same = [(key, named[key.path]) for sides in a.values() for key in sides if key.path in named]
    met = {side.path for two in same for side in two}
    others = [two for two in _pairs(a, b, "") if not met & {side.path for side in two}]
    ordered = [two for two in others if _words(two[0].path, lexicon) == _words(two[1].path, lexicon)]
    for key, entry in [*same, *ordered]:
        shape = key.template.shape
        if len(shape) == 2 and shape != shape[::-1] == entry.template.shape and key.names.keys() == entry.names.keys():
            mapping = {name: (key.names[indices],) for indices, name in entry.names.items()}
            yield Reshaping(_conversion([key], [entry], Transpose(0, 1)), mapping, "the shape is transposed")


def _stacked(a: Mapping[Words, list[_Side]], b: Mapping[Words, list[_Side]]) -> Iterator[Reshaping]:
    for key, entry in _pairs(a, b, INDEX):
        parts = _gathered(key, entry)
        if parts and entry.template.shape == (len(next(iter(parts.values()))), *key.template.shape):
            yield Reshaping(_conversion([key], [entry], Stack("e", 0)), parts, "one tensor holds all of a list")


def _unstacked(a: Mapping[Words, list[_Side]], b: Mapping[Words, list[_Side]]) -> Iterator[Reshaping]:
    for entry, key in _pairs(b, a, INDEX):
        parts = _gathered(entry, key)
        if parts and key.template.shape == (len(next(iter(parts.values()))), *entry.template.shape):
            mapping = {name: (whole,) for whole, names in parts.items() for name in names}
            yield Reshaping(_conversion([key], [entry], Unstack("e", 0)), mapping, "one tensor holds all of a list")


def _gathered(many: _Side, one: _Side) -> dict[str, tuple[str, ...]]:
    """Each name of the one side to those of the other that differ in their last index; nothing if some are missing."""
    by_rest: dict[tuple[int, ...], dict[int, str]] = defaultdict(dict)
    for indices, name in many.names.items():
        by_rest[indices[:-1]][indices[-1]] = name
    sizes = {tuple(sorted(items)) for items in by_rest.values()}
    if by_rest.keys() != one.names.keys() or sizes != {tuple(range(len(next(iter(by_rest.values())))))}:
        return {}
    return {one.names[rest]: tuple(items[e] for e in sorted(items)) for rest, items in by_rest.items()}


def _split(a: Mapping[Words, list[_Side]], b: Mapping[Words, list[_Side]]) -> Iterator[Reshaping]:
    for fused, parts in _fused(a, b):
        mapping = {name: (fused.names[indices],) for part in parts for indices, name in part.names.items()}
        yield Reshaping(
            _conversion([fused], parts, Split(0)), mapping, "three in one, in the order of its name", _order(fused)
        )


def _joined(a: Mapping[Words, list[_Side]], b: Mapping[Words, list[_Side]]) -> Iterator[Reshaping]:
    for fused, parts in _fused(b, a):
        mapping = {name: tuple(part.names[indices] for part in parts) for indices, name in fused.names.items()}
        yield Reshaping(
            _conversion(parts, [fused], Concat(0)), mapping, "three in one, in the order of its name", _order(fused)
        )


def _fused(one: Mapping[Words, list[_Side]], three: Mapping[Words, list[_Side]]) -> Iterator[tuple[_Side, list[_Side]]]:
    for words, sides in one.items():
        found = [three.get(_instead(words, less=_FUSED, more=part), []) for part in _PARTS]
        if len(sides) != 1 or _FUSED not in dict(words) or any(len(part) != 1 for part in found):
            continue
        whole, parts = sides[0], [part[0] for part in found]
        shapes = [part.template.shape for part in parts]
        size = (sum(shape[0] for shape in shapes if shape), *shapes[0][1:])
        if whole.template.shape == size and all(part.names.keys() == whole.names.keys() for part in parts):
            yield whole, parts


def _order(fused: _Side) -> str:
    """GPT-NeoX, BLOOM and Falcon call it `query_key_value` and interleave its rows by head."""
    if any("query" in segment for segment in fused.path):
        return "its rows may be interleaved by head"
    return ""


def _conversion(keys: list[_Side], entries: list[_Side], op: Op) -> Conversion:
    least = min(len(index_positions(side.path)) for side in (*keys, *entries))
    return Conversion([_text(side.path, least) for side in keys], [_text(side.path, least) for side in entries], [op])


def _text(path: Path, shared: int) -> str:
    """A path with placeholders: `{i0}`, `{i1}` for the indices that both sides have, `{e}` for the one more."""
    out = []
    turn = 0
    for segment in path:
        if segment.endswith(INDEX):
            out.append(literal(segment[:-1]) + (f"{{i{turn}}}" if turn < shared else "{e}"))
            turn += 1
        else:
            out.append(literal(segment))
    return ".".join(out)


def doubt_squares(found: Inference, made: Iterable[Reshaping]) -> None:
    """Square matrices beside transposed ones may be transposed as well: their shapes do not tell."""
    transposed = {
        key for r in made if r.conversion.steps == (Transpose(0, 1),) for keys in r.mapping.values() for key in keys
    }
    blocks = {_block(t) for t in found.keys if transposed & set(t.names.values())}
    doubted = [
        m for m in found.sure if len(m.key.shape) == 2 and m.key.shape[0] == m.key.shape[1] and _block(m.key) in blocks
    ]
    found.sure = [match for match in found.sure if match not in doubted]
    found.guesses += [_square(match) for match in doubted]


def _square(match: Match) -> Guess:
    return Guess(((match,),), "the names", "it is square, and matrices beside it are transposed")


def _block(template: Template) -> tuple[Path, str]:
    """The list item that a tensor stands in, and its own name."""
    positions = index_positions(template.path)
    return template.path[: positions[0] + 1] if positions else (), template.path[-1]
