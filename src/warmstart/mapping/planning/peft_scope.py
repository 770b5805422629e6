"""Which side of a PEFT model a source sees: the base, an adapter, or both."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from warmstart.mapping.grouping import printable
from warmstart.mapping.model.names import strip
from warmstart.mapping.model.peft import is_slot
from warmstart.mapping.model.targets import Target
from warmstart.patterns import nearest

_SHOWN = 8
# What an adapter copies or computes from the base when it is made.
_FROM_BASE = frozenset({"modules_to_save", "trainable_tokens_delta", "lora_magnitude_vector"})


@dataclass(slots=True)
class View:
    """The entries that a source sees.

    Attributes:
        names: Entry to the name under which the source's keys know it.
        problem: Why it cannot be told; empty if it can.
        notes: What the reader should know of the other side.
        hint: What to do about the keys of an adapter that the model does not have; empty if there are none.
    """

    names: dict[str, str]
    problem: str = ""
    notes: list[str] = field(default_factory=list)
    hint: str = ""


def view(scope: Sequence[Target], into: str, keys: Collection[str]) -> View:
    """Narrow a scope to the side of the model that a source's keys are of.

    Keys that carry an adapter's name are a state dict's: they see that adapter and, if there are keys of the base, the
    base. Keys of an adapter without its name are an adapter's own file: they see the one adapter in scope, and of the base
    the entries that the file holds (trained biases, resized embeddings). Other keys see the base alone.

    Args:
        scope: The entries in scope.
        into: The clean path that the keys are relative to.
        keys: The keys' names, after the renames.
    """
    entries = [t.adapter for t in scope if t.adapter]
    if into and len(entries) == len(scope) and all(strip(into, e.holder) for e in entries):
        return View({t.name: t.clean for t in scope})  # `into` names a part of an adapter by itself
    table = _Table(scope)
    found = _Found()
    for key in keys:
        table.sort(key, found)
    if found.named or found.foreign:
        out = _state_dict(scope, table, found)
    elif found.saved:
        out = _adapter_file(scope, into, found)
    else:
        out = View({t.name: t.clean for t in scope if not t.adapter}, notes=_left(scope))
    out.hint = _hint(table, found)
    return out


@dataclass(slots=True)
class _Found:
    """The keys of a source by what they are of.

    Attributes:
        base: No adapter.
        saved: An adapter of the model's kind, without its name: their slots.
        named: Adapters of the model.
        foreign: Adapters that the model does not have, by name, and the slots they were met in.
        unknown: Slots that no adapter of the model has.
    """

    base: set[str] = field(default_factory=set)
    saved: set[tuple[str, str]] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    foreign: dict[str, set[str]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)


class _Table:
    """The model's adapters by what a key can show of them: the end of its name, from the slot on."""

    def __init__(self, scope: Sequence[Target]) -> None:
        self.named: dict[tuple[str, str], set[str]] = {}
        self.saved: dict[str, tuple[str, str]] = {}
        for e in (t.adapter for t in scope if t.adapter):
            self.named.setdefault((e.slot, e.rest), set()).add(e.adapter)
            if e.slot != "modules_to_save":  # its saved names are the base's
                self.saved[strip(e.saved, e.holder) or e.saved] = (e.slot, e.rest)
        self.adapters = sorted({name for names in self.named.values() for name in names if name})
        self._own = {part for t in scope if not t.adapter for part in t.clean.split(".")}
        self._heads = {slot for slot, _ in self.named} | {tail.partition(".")[0] for tail in self.saved}

    def sort(self, key: str, found: _Found) -> None:
        parts = key.split(".")
        for i in reversed(range(len(parts))) if self._heads else ():
            if parts[i] in self._heads:
                tail, slot, rest = ".".join(parts[i:]), parts[i], ".".join(parts[i + 2 :])
                if tail in self.saved:
                    found.saved.add(self.saved[tail])
                elif (slot, rest) not in self.named:
                    continue
                elif parts[i + 1] in self.adapters:
                    found.named.add(parts[i + 1])
                else:
                    found.foreign.setdefault(parts[i + 1], set()).add(slot)
                return
        unknown = set(filter(is_slot, parts)) - self._own
        found.unknown |= unknown
        if not unknown:
            found.base.add(key)


def _state_dict(scope: Sequence[Target], table: _Table, found: _Found) -> View:
    # With a wrong name alone, the adapters it may be meant for stay in scope, to be reported as missing.
    slots = {slot for slots in found.foreign.values() for slot in slots}
    meant = {a for (slot, _), names in table.named.items() if slot in slots for a in names}
    adapters = found.named or meant
    names = {}
    for target in scope:
        if target.adapter.adapter in {"", *adapters} if target.adapter else found.base:
            names[target.name] = target.clean
    return View(names, notes=_left(t for t in scope if t.adapter and t.name not in names))


def _adapter_file(scope: Sequence[Target], into: str, found: _Found) -> View:
    slots = {slot for slot, _ in found.saved}
    adapters = sorted({t.adapter.adapter for t in scope if t.adapter and t.adapter.slot in slots} - {""})
    problem = ""
    if len(adapters) > 1:
        problem = (
            f"the keys are of an adapter without its name, and the model has {_quoted(adapters)}\n"
            f'  -> say which one they are for: include=["*.{printable(adapters[0])}"]'
        )
        del adapters[1:]
    names = {t.name: t.adapter.saved for t in scope if t.adapter and t.adapter.adapter in {"", *adapters}}
    # What modules_to_save trains is saved under the base's name.
    given = {strip(saved, into) or saved for saved in names.values()}
    local = {t.name: strip(t.clean, into) or t.clean for t in scope if not t.adapter}
    held = _held(found.base, {*local.values(), *given}) - given
    names |= {t.name: t.clean for t in scope if not t.adapter and local[t.name] in held}
    return View(names, problem, _left(t for t in scope if t.adapter and t.name not in names))


def apart(scope: Sequence[Target], loaded: Collection[str]) -> list[str]:
    """The coverage of the base and of each adapter, as a note, where a source sees both: the base would drown the rest."""
    if not any(target.adapter for target in scope):
        return []
    given = {target.canonical for target in scope if target.name in loaded}
    elements: dict[str, list[int]] = {}
    for target in {target.canonical: target for target in reversed(scope)}.values():  # each tensor once
        count = elements.setdefault(target.adapter.adapter if target.adapter else "", [0, 0])
        count[0] += target.numel * (target.canonical in given)
        count[1] += target.numel
    if len(elements) < 2:
        return []
    parts = (
        f"{got / max(total, 1):.2%} of " + (f"adapter '{printable(name)}'" if name else "the base")
        for name, (got, total) in sorted(elements.items())
    )
    return [f"loaded, by elements: {', '.join(parts)}"]


def _left(targets: Iterable[Target]) -> list[str]:
    """What is said of adapters that a source does not see."""
    entries = [t.adapter for t in targets if t.adapter]
    if not entries:
        return []
    names = sorted({e.adapter for e in entries} - {""})
    notes = [f"{len(entries)} entries of PEFT's adapter {_quoted(names)} are left as they are: no key is theirs"]
    stale = sorted({e.slot for e in entries} & _FROM_BASE)
    if stale:
        notes.append(
            f"{', '.join(stale)} were made from the base's values at the time and are not made again: load the base before "
            "get_peft_model(model, ...), or the adapter's own file after it"
        )
    return notes


def _hint(table: _Table, found: _Found) -> str:
    if found.foreign and not found.named:
        name = min(found.foreign)
        own = (nearest(name, table.adapters) or table.adapters)[0]
        slots = "|".join(sorted(found.foreign[name]))
        return (
            f"  -> they are of an adapter named {_quoted(sorted(found.foreign))}, and the model has {_quoted(table.adapters)}: "
            f'rename={{r"({slots})\\.{re.escape(printable(name))}": r"\\1.{printable(own)}"}}'
        )
    if found.unknown and table.adapters:
        return (
            f"  -> {_quoted(sorted(found.unknown))} are of another kind of adapter than the model's: give get_peft_model() the "
            "config that the adapter was trained with"
        )
    if found.unknown:
        return (
            "  -> they are of a PEFT adapter, which this model has no place for: merge it where it was trained, "
            "model.merge_and_unload(), and save that; or wrap this model first, get_peft_model(model, config)"
        )
    return ""


def _held(keys: Iterable[str], entries: Collection[str]) -> set[str]:
    """The entries that keys are of, be it under another prefix: those they share their longest ending with."""
    index: dict[str, list[str]] = {}
    for entry in entries:
        for end in _ends(entry):
            index.setdefault(end, []).append(entry)
    held: set[str] = set()
    for key in keys:
        if key in entries:
            held.add(key)
        else:
            held.update(next((index[end] for end in _ends(key) if "." in end and end in index), []))
    return held


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{printable(name)}'" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
