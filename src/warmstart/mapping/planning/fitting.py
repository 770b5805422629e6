"""Adapters at their entries: which entry has which, and whether it can make the entry of its key."""

from __future__ import annotations

from collections.abc import Mapping

from warmstart.errors import MappingError
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.rows import MapRows
from warmstart.mapping.grouping import covering, listed, printable
from warmstart.mapping.hints import report_unused
from warmstart.mapping.keys import Key
from warmstart.mapping.model.targets import Target, Targets
from warmstart.mapping.planning.filling import unfillable
from warmstart.mapping.planning.part import PartPlan
from warmstart.mapping.pretrained import Pretrained
from warmstart.patterns import PatternSet
from warmstart.tensors import dtype_name


def adapters_of(pretrained: Pretrained, targets: Targets, out: PartPlan) -> dict[str, Adapter]:
    """Entry to its adapter. What is tied follows, and with the rows of a tied head its bias."""
    adapters = pretrained.adapters
    if not adapters:
        return {}
    texts = list(adapters)
    patterns = PatternSet(texts, where="adapt")
    found: dict[str, Adapter] = {}
    for name in targets.entries:
        first, *others = patterns.which(*targets.spellings(name)) or [-1]
        if first < 0:
            continue
        found[name] = adapters[texts[first]]
        if rival := next((texts[i] for i in others if adapters[texts[i]] != found[name]), None):
            message = (
                f"adapt={texts[first]!r} and adapt={rival!r} both name '{name}'; make one of the patterns more exact"
            )
            out.problem("adapter", message, (name,))
    report_unused(patterns, [target.clean for target in targets.entries.values()], "model entry", out.errors)
    _follow(found, targets, out)
    return found


def _follow(found: dict[str, Adapter], targets: Targets, out: PartPlan) -> None:
    biases = {id(target.owner): name for name, target in targets.entries.items() if target.leaf == "bias"}
    for name, adapter in list(found.items()):
        tied = targets.groups.get(targets.entries[name].canonical, [])
        for other in tied:
            found.setdefault(other, adapter)
        if not isinstance(adapter, MapRows) or adapter.dim != 0:
            continue
        for other in tied:
            bias = biases.get(id(targets.entries[other].owner))
            if bias is not None and bias not in found:
                for each in targets.groups.get(targets.entries[bias].canonical, [bias]):
                    found.setdefault(each, adapter)
                out.notes.append(f"{bias} follows the rows of {name}, which is tied to its head")


class Fitting:
    """Asks adapters whether they fit, and reports those that do not, each reason once."""

    def __init__(self, out: PartPlan, targets: Targets) -> None:
        self._out = out
        self._targets: Mapping[str, Target] = targets.entries
        self._allowed = PatternSet(out.part.pretrained.allow_mismatched, where="allow_mismatched")
        self._refused: dict[str, list[str]] = {}

    def fits(self, key: Key, target: Target, adapter: Adapter, reshaped: bool) -> bool:
        """Whether the adapter makes the entry of the key; if not, that is an error, or allowed as a mismatch."""
        assert key.shape is not None
        why = self._why_not(key, target, adapter, reshaped)
        if not why:
            return True
        if not self._allowed.matches(target.name, target.clean):
            self._refused.setdefault(why, []).append(target.name)
            self._out.reported.add(target.name)
        return False

    def _why_not(self, key: Key, target: Target, adapter: Adapter, reshaped: bool) -> str:
        assert key.shape is not None
        name = type(adapter).__name__
        if reshaped:
            return (
                f"{name} needs the entry's shape, which is not known yet; run one forward pass on a dummy batch first"
            )
        try:
            adapter.check(key.shape, target.shape)
        except MappingError as error:
            return str(error)
        number = key.dtype.is_floating_point or key.dtype.is_complex
        if not number and adapter.computes(key.shape, target.shape):
            return f'{name} cannot compute {dtype_name(key.dtype)} values of others; leave it out: exclude=["<entry>"]'
        if adapter.constant is not None and (why := unfillable(target, adapter.constant)):
            return f"{name}: the entry {why}"
        return ""

    def report(self) -> None:
        for why, names in self._refused.items():
            chosen = set(names)
            others = [target.clean for name, target in self._targets.items() if name not in chosen]
            pattern = covering([self._targets[name].clean for name in names], others)[0]
            many = f"{len(names)} entries\n{listed((name, '') for name in names)}\n"
            shown = f"'{printable(names[0])}': " if len(names) == 1 else many
            self._out.problem("adapter", shown + why.replace("<entry>", printable(pattern)), tuple(names))
