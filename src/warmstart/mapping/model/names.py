"""Names: the segments wrappers put into them, and the one prefix by which two trees differ."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from torch import nn

from warmstart.mapping.derivations import Shape
from warmstart.mapping.grouping import printable

# Type of the wrapper -> the child it keeps the wrapped module under. By qualified name along the MRO, so that no engine
# is imported to ask whether it is in use.
WRAPPERS: Mapping[str, str] = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
}
WRAPPER_SEGMENTS = frozenset(WRAPPERS.values())


def wrapped_child(module: nn.Module) -> str | None:
    """The segment under which a wrapper keeps what it wraps; None if the module is no wrapper."""
    return _wrapped_child(type(module))  # type: ignore[arg-type]  # a class has a hash


@functools.cache
def _wrapped_child(kind: type[nn.Module]) -> str | None:
    for cls in kind.__mro__:
        segment = WRAPPERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if segment is not None:
            return segment
    return None


def join(*paths: str) -> str:
    return ".".join(filter(None, paths))


def strip(name: str, prefix: str) -> str | None:
    """`name` without the leading path `prefix`; None if it does not start with it or nothing would be left."""
    if not prefix:
        return name
    rest = name.removeprefix(prefix + ".")
    return rest if rest != name and rest else None


def without_wrappers(key: str, segments: Set[str]) -> str:
    """`key` without the wrapper `segments`, wherever they stand; a key of nothing else is left as it is."""
    parts = key.split(".")
    if segments.isdisjoint(parts):
        return key
    clean = [part for part in parts if part not in segments]
    return ".".join(clean) if clean and len(clean) < len(parts) else key


@dataclass(frozen=True, slots=True)
class Prefix:
    """A (strip, add) pair and the number of keys it puts on an entry of the same shape."""

    strip: str
    add: str
    score: int

    def rewrite(self, name: str) -> str | None:
        rest = strip(name, self.strip)
        return None if rest is None else join(self.add, rest)

    def __str__(self) -> str:
        parts = [f"strip '{printable(self.strip)}'"] if self.strip else []
        parts += [f"add '{printable(self.add)}'"] if self.add else []
        return " and ".join(parts)


Shapes = Mapping[str, Shape]
KeyShapes = Mapping[str, Shape | None]  # None: made for the entry it goes to, so it has that entry's shape


def fits(key: Shape | None, entry: Shape | None) -> bool:
    """Whether a key of this shape goes into an entry of that one (None: there is no such entry)."""
    return entry is not None and (key is None or key == entry)


def matches(keys: KeyShapes, entries: Shapes) -> int:
    """How many keys stand on an entry of the same name and shape."""
    return sum(fits(shape, entries.get(name)) for name, shape in keys.items())


def suffixes(name: str, depth: int) -> Iterator[str]:
    """The dotted suffixes of at most `depth` segments, the longest first."""
    if name.count(".") >= depth:
        name = name[len(name.rsplit(".", depth)[0]) + 1 :]
    yield name
    while (dot := name.find(".")) >= 0:
        name = name[dot + 1 :]
        yield name


def infer_prefix(keys: KeyShapes, entries: Shapes) -> list[Prefix]:
    """The best (strip, add) pair that matches more keys, by name and shape, than the names as they are.

    Candidates come from each unmatched key's longest suffix that ends an unmatched entry of the same shape; the most
    frequent ones are scored exactly. Linear in the number of names.

    Args:
        keys: Checkpoint key to shape; None fits any shape.
        entries: Model entry to shape.

    Returns:
        Nothing, the one best pair, or all the pairs that tie for it and give different names.
    """
    identity = {name for name, shape in keys.items() if fits(shape, entries.get(name))}
    unmatched = [entry for entry in entries if entry not in identity]
    depth = max((entry.count(".") + 1 for entry in unmatched), default=0)
    index: dict[str, list[str]] = {}
    for entry in unmatched:
        for suffix in suffixes(entry, depth):
            found = index.setdefault(suffix, [])
            if len(found) <= _RIVALS:
                found.append(entry)
    votes: Counter[tuple[str, str]] = Counter()
    for key, shape in keys.items():
        if key in identity:
            continue
        for suffix in suffixes(key, depth):
            found = index.get(suffix, [])
            pairs = {
                (key[: -len(suffix)].rstrip("."), entry[: -len(suffix)].rstrip("."))
                for entry in found
                if fits(shape, entries[entry])
            }
            if pairs:
                if len(found) <= _RIVALS:
                    for pair in pairs:
                        votes[pair] += 1
                break
    scored: list[tuple[int, dict[str, str], Prefix]] = []
    for (remove, add), _ in sorted(votes.items(), key=lambda item: (-item[1], item[0]))[:_CANDIDATES]:
        names = _rewritten(keys, entries, remove, add)
        if len(names) > len(identity):
            scored.append((len(names), names, Prefix(remove, add, len(names))))
    if not scored:
        return []
    best = max(score for score, _, _ in scored)
    winners: list[tuple[dict[str, str], Prefix]] = []
    for score, names, prefix in scored:
        if score == best and all(names != other for other, _ in winners):
            winners.append((names, prefix))
    return [prefix for _, prefix in winners]


_RIVALS = 8  # a suffix that more entries share says nothing about which prefix is meant
_CANDIDATES = 24


def _rewritten(keys: KeyShapes, entries: Shapes, remove: str, add: str) -> dict[str, str]:
    prefix = Prefix(remove, add, 0)
    out = {}
    for key, shape in keys.items():
        name = prefix.rewrite(key)
        if name is not None and fits(shape, entries.get(name)):
            out[key] = name
    return out
