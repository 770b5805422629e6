"""What names alone leave open: tensors at corresponding places, told apart by shared words, by shapes, or not at all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from warmstart.mapping.suggesting.items import items_of
from warmstart.mapping.suggesting.judging import judged
from warmstart.mapping.suggesting.leaves import LEAVES
from warmstart.mapping.suggesting.linking import Link, Linker, Twins
from warmstart.mapping.suggesting.matching import Candidate, Pairing
from warmstart.mapping.suggesting.siblings import corresponding
from warmstart.mapping.suggesting.side import Side
from warmstart.mapping.suggesting.templates import Path, Place, Template
from warmstart.mapping.suggesting.vocabulary import PHRASES


@dataclass(frozen=True, slots=True)
class Structure:
    """What was found beyond names in context.

    Attributes:
        links: Pairs, each with its evidence.
        twins: What cannot be told apart.
        sure: The links with enough evidence.
    """

    links: list[Link]
    twins: list[Twins]
    sure: set[Link]


def structure(keys: Side, entries: Side, pairing: Pairing) -> Structure:
    """Pairs for what names in context leave open, each with its evidence."""
    pairs = pairing.pairs
    taken = {candidate.entry for candidate in pairs.values()}
    open_keys = items_of(t for t in keys.templates if t not in pairs)
    open_entries = items_of(t for t in entries.templates if t not in taken)
    places = _places(pairing, keys, entries)
    linker = Linker(
        keys, entries, set(open_keys), set(open_entries), PHRASES if keys.lexicon.vocabulary else (), _modules(pairs)
    )
    links = [
        link
        for decide in (linker.by_all_words, linker.by_words, linker.by_shapes)
        for place in places
        for link in decide(place)
    ]
    twins = [twins for place in places for twins in linker.twins(place)]
    return Structure(links, twins, judged(links, twins, keys, entries, pairing))


def _modules(pairs: Mapping[Template, Candidate]) -> tuple[dict[Path, Path], dict[Path, Path]]:
    both = [(c.key.path, c.entry.path) for c in pairs.values()]
    layers = [(key[:-1], entry[:-1]) for key, entry in both if key[-1] in LEAVES and entry[-1] in LEAVES]
    return dict(layers), {b: a for a, b in layers}


def _places(pairing: Pairing, keys: Side, entries: Side) -> list[Place]:
    """Which nodes correspond, by the pairs below them; the deepest first, the roots last."""
    votes: dict[Path, Counter[Path]] = defaultdict(Counter)
    for candidate in pairing.pairs.values():
        for a, b in corresponding(candidate.key, candidate.entry, keys, entries):
            votes[a][b] += 1
    places = [*pairing.landmarks]
    for node, images in votes.items():
        most = max(images.values())
        places += [(node, image) for image, count in images.items() if count == most]
    places.append(((), ()))
    return sorted(set(places), key=lambda place: (-len(place[0]) - len(place[1]), place))
