"""From the names and shapes of both sides to pairs of templates: what is sure, what is proposed, what is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from warmstart.errors import MappingError
from warmstart.mapping.derivations import Shape
from warmstart.mapping.suggesting.fitting import fitted
from warmstart.mapping.suggesting.indices import ListSets, shift
from warmstart.mapping.suggesting.items import matched
from warmstart.mapping.suggesting.landmarks import landmarks
from warmstart.mapping.suggesting.learning import learned
from warmstart.mapping.suggesting.linking import Evidence, Link, Twins
from warmstart.mapping.suggesting.matching import pair
from warmstart.mapping.suggesting.siblings import Siblings
from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.structure import structure
from warmstart.mapping.suggesting.templates import Template, index_positions, templates
from warmstart.mapping.suggesting.words import INDEX, Lexicon

_KINDS = 5_000  # of names on one side that are compared; real architectures have some hundreds


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A template of the checkpoint that is one of the model's.

    Attributes:
        offsets: What to add to each index of the checkpoint to get the model's.
    """

    key: Template
    entry: Template
    offsets: tuple[int, ...]

    def names(self) -> dict[str, str]:
        """Entry to key, for all names that both sides have."""
        out = {}
        for indices, key in self.key.names.items():
            entry = self.entry.names.get(tuple(i + by for i, by in zip(indices, self.offsets, strict=True)))
            if entry is not None:
                out[entry] = key
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """Pairs that have some evidence, but not enough to be applied.

    Attributes:
        readings: The ways in which the names fit, the more likely one first; each is a list of matches.
        why: What speaks for the first one.
        why_not: What is missing.
    """

    readings: tuple[tuple[Match, ...], ...]
    why: str
    why_not: str


@dataclass(slots=True)
class Inference:
    """What names and shapes say.

    Attributes:
        sure: Pairs with enough evidence.
        guesses: Pairs with less.
        keys: All templates of the checkpoint.
        entries: All templates of the model.
        layers: The sure pairs that layers say, and no names.
    """

    keys: list[Template]
    entries: list[Template]
    sure: list[Match] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)
    layers: frozenset[Match] = frozenset()

    def left(self) -> tuple[list[Template], list[Template]]:
        """The templates of both sides of which no tensor is matched or guessed."""
        every = [*self.sure, *(m for guess in self.guesses for m in guess.readings[0])]
        keys, entries = {m.key for m in every}, {m.entry for m in every}
        return [t for t in self.keys if t not in keys], [t for t in self.entries if t not in entries]


def infer(keys: Mapping[str, Shape], entries: Mapping[str, Shape], *, vocabulary: bool = True) -> Inference:
    """Pair the names of a checkpoint with those of a model.

    Args:
        keys: The checkpoint's names and shapes.
        entries: The model's.
        vocabulary: Whether to use the declared synonyms.

    Raises:
        MappingError: A side has more kinds of names than are compared.
    """
    plain = [{name: shape for name, shape in side.items() if INDEX not in name} for side in (keys, entries)]
    both = templates(*plain, lexicon=Lexicon(vocabulary))
    for what, side in zip(("checkpoint", "model"), both, strict=True):
        if len(side) > _KINDS:
            raise MappingError(
                f"the {what} has {len(side):,} kinds of names (all layers of a list are one kind), more than the {_KINDS:,} "
                "that suggest compares; it says nothing of them\n"
                '  -> narrow both sides, into="..." and select=["..."]; else write the rules by hand, rename={...}'
            )
    found, renamed = _read(both[0], both[1], Lexicon(vocabulary))
    if renamed:
        found = _joined(found, _read(both[0], both[1], Lexicon(vocabulary, renamed))[0])
    known = {entry: key for match in found.sure for entry, key in match.names().items()}
    return _with_layers(found, fitted(both[0], both[1], known, Lexicon(vocabulary)))


def _read(keys: list[Template], entries: list[Template], lexicon: Lexicon) -> tuple[Inference, dict[str, str]]:
    """What names in context and structure say, and the renames that it proves."""
    found = Inference(keys, entries)
    a, b = Side(keys, lexicon), Side(entries, lexicon)
    lists = ListSets.of(keys), ListSets.of(entries)
    pairing = pair(a, b)
    pairs = [(c.key, c.entry) for c in pairing.pairs.values()]
    marks = landmarks(a, b, pairs)
    siblings = Siblings(pairs, a, b, marks)
    along = {key: c for key, c in pairing.pairs.items() if siblings.go_along(key.path, c.entry.path)}
    pairing = replace(pairing, pairs=along, landmarks=marks)
    beyond = structure(a, b, pairing)
    for candidate in pairing.pairs.values():
        _add(found, [(candidate.key, candidate.entry)], lists, None)
    for link in beyond.links:
        _add(found, matched(link.key, link.entry), lists, None if link in beyond.sure else link)
    for twins in beyond.twins:
        guess = _both_ways(twins, lists)
        if guess is not None:
            found.guesses.append(guess)
    return found, learned(a, b, pairing, beyond)


def _joined(first: Inference, second: Inference) -> Inference:
    """What either reading is sure of and the other does not deny; of the rest, what the second one proposes."""
    keys, entries = ({getattr(m, side): m for m in first.sure} for side in ("key", "entry"))
    sure = dict.fromkeys(first.sure)
    for match in second.sure:
        others = {m for m in (keys.get(match.key), entries.get(match.entry)) if m is not None}
        if not others:
            sure[match] = None
        elif any((m.key, m.entry, m.offsets) != (match.key, match.entry, match.offsets) for m in others):
            for m in others:
                sure.pop(m, None)
    taken = {t for m in sure for t in (m.key, m.entry)}
    guesses = [g for g in second.guesses if all(m.key not in taken and m.entry not in taken for m in g.readings[0])]
    return Inference(first.keys, first.entries, list(sure), guesses)


def _with_layers(found: Inference, layers: Mapping[str, str]) -> Inference:
    """With pairs of names (key to entry) that layers say: of whole templates, or of single names where these go apart."""
    known = {name for match in found.sure for two in match.names().items() for name in two}
    pairs = {key: entry for key, entry in layers.items() if key not in known and entry not in known}
    if not pairs:
        return found
    at = [{name: (t, i) for t in side for i, name in t.names.items()} for side in (found.keys, found.entries)]
    groups: dict[tuple[Template, Template], dict[tuple[int, ...], tuple[int, ...]]] = defaultdict(dict)
    for name, other in pairs.items():
        (key, i), (entry, j) = at[0][name], at[1][other]
        groups[key, entry][i] = j
    added = []
    for (key, entry), indices in groups.items():
        if len(indices) == len(key.names) == len(entry.names) and all(i == j for i, j in indices.items()):
            added.append(Match(key, entry, _unshifted(key)))
        else:
            added += [Match(_alone(key, i), _alone(entry, j), ()) for i, j in indices.items()]
    guesses = [
        guess
        for guess in found.guesses
        if all(key not in pairs for reading in guess.readings for match in reading for key in match.names().values())
    ]
    keys = _apart(found.keys, {m.key for m in found.sure}, [m.key for m in added])
    entries = _apart(found.entries, {m.entry for m in found.sure}, [m.entry for m in added])
    return Inference(keys, entries, [*found.sure, *added], guesses, frozenset(added))


def _alone(template: Template, indices: tuple[int, ...]) -> Template:
    """One name of a template, as a template of its own."""
    name = template.names[indices]
    spelled = tuple(name.split("."))
    leaf = spelled[-1] if template.path[-1].endswith(INDEX) else template.path[-1]
    return Template((*spelled[:-1], leaf), template.shape, spelled[-1], {(): name})


def _apart(side: list[Template], known: set[Template], added: list[Template]) -> list[Template]:
    """The templates of a side, those that names were taken from without these."""
    names = {name for template in added for name in template.names.values()}
    out = [*added]
    for template in side:
        left = {i: name for i, name in template.names.items() if name not in names}
        if template in known or len(left) == len(template.names):
            out.append(template)
        elif left:
            out.append(replace(template, names=left))
    return out


def _add(
    found: Inference, two: list[tuple[Template, Template]], lists: tuple[ListSets, ListSets], link: Link | None
) -> None:
    if link is not None:
        matches = tuple(Match(k, e, _offsets(k, e, lists) or _unshifted(k)) for k, e in two)
        found.guesses.append(Guess((matches,), _WHY[link.evidence], _why_not(link)))
        return
    offsets = [_offsets(key, entry, lists) for key, entry in two]
    found.sure += [Match(k, e, by) for (k, e), by in zip(two, offsets, strict=True) if by is not None]
    loose = [both for both, by in zip(two, offsets, strict=True) if by is None]
    readings = tuple(tuple(Match(k, e, by) for k, e in loose) for by in _shifts(loose))
    if readings:
        found.guesses.append(Guess(readings, "the names", "the two lists start at different numbers, with gaps"))


def _offsets(key: Template, entry: Template, lists: tuple[ListSets, ListSets]) -> tuple[int, ...] | None:
    out = []
    for p, q in zip(index_positions(key.path), index_positions(entry.path), strict=True):
        by = shift(lists[0], key.path, p, lists[1], entry.path, q)
        if by is None:
            return None
        out.append(by)
    return tuple(out)


def _unshifted(key: Template) -> tuple[int, ...]:
    return (0,) * len(index_positions(key.path))


def _shifts(loose: list[tuple[Template, Template]]) -> list[tuple[int, ...]]:
    """The two readings of lists that start differently: the numbers as they are, and the first on the first."""
    if not loose:
        return []
    key, entry = loose[0]
    first = tuple(y - x for x, y in zip(min(key.names), min(entry.names), strict=True))
    return list(dict.fromkeys([_unshifted(key), first]))


_WHY = {
    Evidence.ELIMINATION: "the same names, in rows of another length",
    Evidence.SHAPES: "the only tensors of their shapes at corresponding places",
    Evidence.NUMBERS: "rows that count alike",
    Evidence.SOME_WORDS: "words in common at corresponding places",
    Evidence.PHRASE: "names that mean the same at corresponding places",
    Evidence.WORDS: "the same words at corresponding places",
}


def _why_not(link: Link) -> str:
    if not any(link.extra):
        return "the modules above them may as well be others"
    said = [" ".join(sorted(w.partition(" ")[0] for w in words)) for words in link.extra]
    if all(said):
        return f"nothing says that '{said[0]}' is '{said[1]}'"
    return f"nothing explains '{said[0] or said[1]}', which only {'the checkpoint' if said[0] else 'the model'} says"


def _both_ways(twins: Twins, lists: tuple[ListSets, ListSets]) -> Guess | None:
    """The two readings of twins: in this order and in the other."""
    readings = []
    for entries in (twins.entries, twins.entries[::-1]):
        two = [m for x, y in zip(twins.keys, entries, strict=True) for m in matched(x, y)]
        readings.append(tuple(Match(k, e, _offsets(k, e, lists) or _unshifted(k)) for k, e in two))
    if not all(readings):
        return None
    why = twins.why or "the same shapes at corresponding places"
    return Guess(tuple(readings), why, "names and shapes fit both ways")
