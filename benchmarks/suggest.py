"""How well `suggest` pairs real names: recall, wrong answers and seconds, beside what loaders do today.

`python benchmarks/suggest.py PAIRS.json.gz [--half developed|aside|all] [--seeds 5] [--quick]`. The file holds
`{pair: {checkpoint: {key: shape}, model: {name: shape}, truth: {name: key}}}`. Half of the pairs were set aside before any
code was written, by the seed below, and scored once when it was done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from warmstart import Checkpoint, MappingError, Pretrained, TensorInfo
from warmstart.mapping.model.names import infer_prefix
from warmstart.mapping.planning.suffixes import match_suffixes
from warmstart.mapping.suggesting.suggesting import suggest_rules

SPLIT_SEED = 21
Shapes = dict[str, tuple[int, ...]]
Answer = tuple[dict[str, str], dict[str, str]]  # sure, proposed: entry to key


class Header(Checkpoint):
    """Names, shapes and dtypes without data."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
        super().__init__(location="header", format="none", infos=infos)

    def _read(self, key: str, index: Any) -> Tensor:
        raise AssertionError(f"{key} was read")


@dataclass(frozen=True)
class Pair:
    """Two spellings of one architecture; `truth` is entry to key."""

    name: str
    checkpoint: Shapes
    model: Shapes
    truth: dict[str, str]

    def swapped(self) -> Pair:
        return Pair(self.name, self.model, self.checkpoint, {key: entry for entry, key in self.truth.items()})

    def shuffled(self, seed: int) -> Pair:
        chance = random.Random(f"{self.name}{seed}")
        sides = [dict(chance.sample(list(side.items()), len(side))) for side in (self.checkpoint, self.model)]
        return Pair(self.name, sides[0], sides[1], self.truth)

    def dropped(self, share: float, what: str, sides: str, seed: int) -> Pair:
        """Without a share of the names, or of the kinds of names (all layers at once), of the model or of both sides."""
        chance = random.Random(f"{self.name}{share}{what}{sides}{seed}")
        model = _without(self.model, share, what, chance)
        checkpoint = _without(self.checkpoint, share, what, chance) if sides == "both" else self.checkpoint
        truth = {entry: key for entry, key in self.truth.items() if entry in model and key in checkpoint}
        return Pair(self.name, checkpoint, model, truth)


def _without(shapes: Shapes, share: float, what: str, chance: random.Random) -> Shapes:
    def kind(name: str) -> str:
        return name if what == "keys" else re.sub(r"(?<![^.])\d+(?![^.])", "#", name)

    gone = {one for one in sorted({kind(name) for name in shapes}) if chance.random() < share}
    return {name: shape for name, shape in shapes.items() if kind(name) not in gone}


def net(shapes: Shapes) -> nn.Module:
    """A model on the meta device with these entries."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for segment in path:
            if segment not in module._modules:
                module.add_module(segment, nn.Module())
            module = module.get_submodule(segment)
        module.register_buffer(leaf, torch.empty(shape, device="meta"))
    return root


def suggested(pair: Pair, *, vocabulary: bool = True) -> Answer:
    return answered(net(pair.model), Header(pair.checkpoint), vocabulary)


def answered(model: nn.Module, checkpoint: Header, vocabulary: bool = True) -> Answer:
    try:
        suggestion = suggest_rules(model, Pretrained(checkpoint), checkpoint, vocabulary=vocabulary)
    except MappingError:
        return {}, {}
    proposed = {entry: keys[0] for p in suggestion.proposed for entry, keys in p.mapping.items()}
    return {entry: keys[0] for entry, keys in suggestion.mapping.items()}, proposed


def exact(pair: Pair) -> Answer:
    return {name: name for name, shape in pair.model.items() if pair.checkpoint.get(name) == shape}, {}


def best_prefix(pair: Pair) -> Answer:
    found = infer_prefix(pair.checkpoint, pair.model)
    sure = exact(pair)[0]
    if len(found) == 1:
        taken = set(sure.values())
        for key, shape in pair.checkpoint.items():
            entry = found[0].rewrite(key)
            if key not in taken and entry is not None and entry not in sure and pair.model.get(entry) == shape:
                sure[entry] = key
    return sure, {}


def longest_suffix(pair: Pair) -> Answer:
    return {entry: key for key, entry in match_suffixes(pair.checkpoint, pair.model).pairs.items()}, {}


@dataclass
class Score:
    """Counts over many pairs."""

    truth: int = 0
    right: int = 0
    wrong: int = 0
    proposed_right: int = 0
    proposed_wrong: int = 0
    pairs: int = 0
    complete: int = 0
    complete_with_proposals: int = 0
    recalls: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, pair: Pair, answer: Answer, seconds: float) -> None:
        sure, proposed = answer
        right = sum(pair.truth.get(entry) == key for entry, key in sure.items())
        maybe = sum(pair.truth.get(entry) == key for entry, key in proposed.items())
        self.truth += len(pair.truth)
        self.right += right
        self.wrong += len(sure) - right
        self.proposed_right += maybe
        self.proposed_wrong += len(proposed) - maybe
        self.pairs += 1
        self.complete += right == len(pair.truth) == len(sure)
        self.complete_with_proposals += right + maybe == len(pair.truth) == len(sure) + len(proposed)
        self.recalls.append(right / max(1, len(pair.truth)))
        self.seconds.append(seconds)

    def line(self, what: str) -> str:
        return (
            f"{what:46} {self.right / self.truth:7.4f} {statistics.mean(self.recalls):7.4f} {self.wrong:6} "
            f"{self.complete:4}/{self.pairs:<4} {self.proposed_right / self.truth:8.4f} {self.proposed_wrong:6} "
            f"{self.complete_with_proposals:4}/{self.pairs:<4} {statistics.median(self.seconds):7.3f} {max(self.seconds):7.3f}"
        )


def scored(pairs: Iterable[Pair], method: Callable[[Pair], Answer]) -> Score:
    score = Score()
    for pair in pairs:
        started = time.process_time()
        answer = method(pair)
        score.add(pair, answer, time.process_time() - started)
    return score


def unrelated(pairs: list[Pair], count: int) -> tuple[int, int, float]:
    """Combinations of one pair's checkpoint and another's model: how many, how many were answered, the slowest."""
    combinations = [(a, b) for a in pairs for b in pairs if a.name != b.name]
    chosen = random.Random(SPLIT_SEED).sample(combinations, min(count, len(combinations)))
    models = {pair.name: net(pair.model) for pair in pairs}
    checkpoints = {pair.name: Header(pair.checkpoint) for pair in pairs}
    answers, slowest = 0, 0.0
    for a, b in chosen:
        started = time.process_time()
        sure, _ = answered(models[b.name], checkpoints[a.name])
        slowest = max(slowest, time.process_time() - started)
        if sure:
            answers += 1
            print(f"    answered: {a.name} into {b.name}, {len(sure)} of {len(b.model)} entries")
    return len(chosen), answers, slowest


def chosen_pairs(path: Path, half: str) -> list[Pair]:
    data = json.loads(gzip.decompress(path.read_bytes()))
    names = sorted(data)
    random.Random(SPLIT_SEED).shuffle(names)
    middle = len(names) // 2
    names = sorted({"developed": names[:middle], "aside": names[middle:], "all": names}[half])
    return [
        Pair(
            name,
            {key: tuple(shape) for key, shape in data[name]["checkpoint"].items()},
            {key: tuple(shape) for key, shape in data[name]["model"].items()},
            data[name]["truth"],
        )
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--half", choices=("developed", "aside", "all"), default="all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the pairs as they are, in both directions")
    arguments = parser.parse_args()
    pairs = chosen_pairs(arguments.pairs, arguments.half)
    print(f"{len(pairs)} pairs ({arguments.half}), {sum(len(p.truth) for p in pairs):,} names")
    print(f"{'':46} {'recall':>7} {'mean':>7} {'wrong':>6} {'complete':>9} {'proposed':>8} {'wrong':>6} {'complete':>9} "
          f"{'median s':>8} {'worst s':>7}")  # fmt: skip
    if not arguments.quick:
        print(scored(pairs, exact).line("exact names"))
        print(scored(pairs, best_prefix).line("one best prefix"))
        print(scored(pairs, longest_suffix).line("longest suffix"))
    print(scored(pairs, suggested).line("suggest"), flush=True)
    print(scored([p.swapped() for p in pairs], suggested).line("suggest, swapped direction"), flush=True)
    if arguments.quick:
        return
    print(scored([p.shuffled(0) for p in pairs], suggested).line("suggest, shuffled order"))
    without = scored(pairs, lambda pair: suggested(pair, vocabulary=False))
    print(without.line("suggest, without the vocabulary"), flush=True)
    for sides in ("model", "both"):
        for what in ("keys", "templates"):
            for share in (0.1, 0.2):
                dropped = [p.dropped(share, what, sides, seed) for seed in range(arguments.seeds) for p in pairs]
                score = scored(dropped, suggested)
                where = "both sides" if sides == "both" else "one side"
                print(score.line(f"suggest, {share:.0%} of {what} dropped on {where}"), flush=True)
    count, answers, slowest = unrelated(pairs, 200)
    print(f"{count} unrelated combinations: {answers} answered, the slowest {slowest:.2f} s")


if __name__ == "__main__":
    main()
