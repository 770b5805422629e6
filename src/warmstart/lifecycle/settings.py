"""What a warm start was told: its sources, and how it loads, compares, freezes and releases."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import InitVar, dataclass, field

from warmstart.errors import MappingError
from warmstart.freezing import Held
from warmstart.lifecycle.holding import OnFreezeChange
from warmstart.lifecycle.schedule import Schedule, UnfreezeUnit
from warmstart.mapping.declared import plain
from warmstart.mapping.plan.plan import Read, Verify
from warmstart.mapping.pretrained import Pretrained
from warmstart.patterns import Patterns


@dataclass(frozen=True)
class Settings:
    """What a warm start was told, whatever model it is applied to.

    Attributes:
        parts: The sources.
        verify: How values are compared.
        held: The mode of modules that are frozen as a whole.
        on_freeze_change: What to do where a resumed run had frozen other entries.
        unfreeze_unit: What the schedule counts.
        lock: The lock file that the plan must agree with.
        read: Which ranks read the sources.
        schedule: What to release when, as `unfreeze` says.

    Raises:
        MappingError: A value is not among its choices, or `unfreeze` is no schedule.
    """

    parts: list[Pretrained]
    verify: Verify = "full"
    held: Held = "eval"
    on_freeze_change: OnFreezeChange = "error"
    unfreeze_unit: UnfreezeUnit = "epoch"
    lock: str | os.PathLike[str] | None = None
    read: Read = "local"
    schedule: Schedule = field(init=False)
    unfreeze: InitVar[Mapping[int, Patterns] | None] = None

    def __post_init__(self, unfreeze: Mapping[int, Patterns] | None) -> None:
        for name, choices in (
            ("verify", ("full", "sample", "off")),
            ("held", ("eval", "train")),
            ("on_freeze_change", ("error", "allow")),
            ("unfreeze_unit", ("epoch", "step")),
            ("read", ("local", "broadcast")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise MappingError(f"{name}={value!r}: one of {', '.join(map(repr, choices))}")
        object.__setattr__(self, "schedule", Schedule.of(unfreeze or {}))

    @property
    def identity(self) -> Hashable:
        """What makes two warm starts write the same: their sources and rules, without what is frozen afterwards."""
        sources = [os.fspath(p.source) if isinstance(p.source, str | os.PathLike) else id(p.source) for p in self.parts]
        rules = [{k: v for k, v in p.rules().items() if k != "freeze"} for p in self.parts]
        return tuple((source, repr(sorted(rule.items()))) for source, rule in zip(sources, rules, strict=True))

    @property
    def freeze(self) -> Hashable:
        """What is to be frozen, as it was said."""
        return repr([plain(part.freeze) for part in self.parts])

    @property
    def freezes(self) -> bool:
        """Whether anything is to be frozen."""
        return any(part.freeze for part in self.parts)

    @property
    def freezes_what_loads(self) -> bool:
        """Whether what is to be frozen is known by the source alone."""
        return any(part.freeze is True for part in self.parts)

    @property
    def frozen_patterns(self) -> list[str]:
        """The patterns of what is to be frozen, apart from what is known by the source."""
        given = [part.freeze for part in self.parts if not isinstance(part.freeze, bool)]
        return [pattern for each in given for pattern in ([each] if isinstance(each, str) else each)]
