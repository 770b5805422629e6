"""Where ranks meet: short words left in the store of their process group, never a collective, so that none can hang in one.

Who does not come in time, or has ended, is named to all the others. The words are read by one rank, the last to come,
and its answer is everybody's: n ranks cost the store a few requests each.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from warmstart import errors
from warmstart.errors import CheckpointError, MappingError, TimingError, WarmStartError

TIMEOUT_VARIABLE: Final = "WARMSTART_TIMEOUT"
TIMEOUT_SECONDS: Final = 600.0
_WORKING: Final = 6  # a rank that is known to be at work gets so many times the time
_PROBE_SECONDS: Final = 1.0
_PARTING_SECONDS: Final = 5.0
_SHARED: Final = "_raised_on_all_ranks"

# How often the ranks of a group have met. A store may outlive a process group, so the count is kept by the group's name.
_meetings: dict[str, int] = {}
_at_work: Counter[str] = Counter()
_enrolled: set[tuple[str, int]] = set()


class StoppedError(WarmStartError):
    """Another rank has failed, and says itself how."""


Decide = Callable[[list[Any]], Any]


class Ranks:
    """The ranks of a process group of more than one, seen from one of them.

    Attributes:
        index: This rank's place in the group.
        members: The global rank of each place.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.index = dist.get_rank(group)
        self.members = tuple(dist.get_process_group_ranks(group))
        self._name = f"warmstart/{group.group_name}/{'-'.join(_spans(self.members))}"
        self._store = dist.distributed_c10d.PrefixStore(self._name, dist.distributed_c10d._get_default_store())
        self._limit = _limit(_own_timeout(group))

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> Ranks | None:
        """The ranks of `group` (None: all of them); None if there is no process group, or one rank alone in it.

        Raises:
            TimingError: This process is not in the group.
        """
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if group is None else group
        if dist.get_rank(group) < 0:
            raise TimingError(
                f"rank {dist.get_rank()} is not in the process group that was given; let only its ranks call this, each "
                "with its own group="
            )
        # The other ranks of the fake backend do not exist.
        if dist.get_world_size(group) == 1 or dist.get_backend(group) == "fake":
            return None
        assert group is not None
        return cls(group)

    @property
    def number(self) -> int:
        """How many meetings there have been for this rank."""
        return _meetings.get(self._name, 0)

    @property
    def patience(self) -> datetime.timedelta:
        """How long a rank that is at work is waited for."""
        return datetime.timedelta(seconds=_WORKING * self._limit)

    def store(self, name: str) -> dist.distributed_c10d.Store:
        """A part of the store for these ranks alone."""
        return dist.distributed_c10d.PrefixStore(name, self._store)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """A stretch of work in which the others know that this rank will come to the next meeting, however long it takes."""
        _at_work[self._name] += 1
        try:
            self._announce()
            yield
        finally:
            _at_work[self._name] -= 1

    def _announce(self) -> None:
        with _store_at_hand():
            self._pass_over()
            self._store.set(f"{self.number}/coming/{self.index}", "")

    def meet(
        self, step: str, word: Any = None, decide: Decide | None = None, own: Exception | None = None, hint: str = ""
    ) -> Any:
        """Wait until every rank has come, and return the answer that all of them get.

        Args:
            step: What the ranks are about to do: at one meeting they must be at the same.
            word: What this rank has to say, as plain JSON types.
            decide: Makes the answer of all words, in the group's order; may raise. Called on one rank only.
            own: What went wrong on this rank: then all ranks raise it.
            hint: What can be done about a checkpoint that only some ranks cannot read.

        Raises:
            WarmStartError: What went wrong on some rank, of the type it has there; or a rank has ended.
            TimingError: A rank did not come, or is at another step.
        """
        said = {"step": step, "word": word, "error": None if own is None else _portable(own, hint)}
        with _store_at_hand():
            self._enrol()
            self._pass_over()
            number = self.number
            _meetings[self._name] = number + 1
            self._store.set(f"{number}/{self.index}", json.dumps(said))
            if self._store.add(f"{number}/count", 1) == len(self.members):
                words = [json.loads(self._store.get(f"{number}/{i}")) for i in range(len(self.members))]
                self._answer(number, **self._answered(words, decide))
                if number:  # all have left the meeting before this one
                    self._store.delete_key(f"{number - 1}/answer")
                    self._store.delete_key(f"{number - 1}/count")
            answer = self._wait(number, step)
        if answer["error"] is not None:  # one that comes too late will still look for this rank's word: it stays
            self._leave_together(number)
            raise _here(answer["error"], own)
        with _store_at_hand():
            self._store.delete_key(f"{number}/{self.index}")
            self._store.delete_key(f"{number}/coming/{self.index}")
        if _at_work[self._name]:
            self._announce()
        return answer["value"]

    def _leave_together(self, number: int) -> None:
        """Wait until all that came have the answer, an error: it ends processes, and with one of them the store."""
        until, pause = time.monotonic() + _PARTING_SECONDS, 0.001
        with contextlib.suppress(dist.DistError):
            self._store.add(f"{number}/told", 1)
            while self._store.add(f"{number}/told", 0) < self._store.add(f"{number}/count", 0):
                if time.monotonic() > until:
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.25)

    def named(self, places: Sequence[int]) -> str:
        """Ranks in words: `rank 1`, `ranks 0-3, 7`, by their global numbers."""
        found = sorted(self.members[i] for i in places)
        return f"rank{'s' if len(found) > 1 else ''} {', '.join(_spans(found))}"

    def _answered(self, words: list[dict[str, Any]], decide: Decide | None) -> dict[str, Any]:
        try:
            self._raise_failures([word["error"] for word in words])
            self._raise_disorder([word["step"] for word in words])
            value = decide([word["word"] for word in words]) if decide is not None else None
        except WarmStartError as error:
            return {"error": _portable(error), "value": None}
        return {"error": None, "value": value}

    def _raise_failures(self, failures: list[dict[str, Any] | None]) -> None:
        where: dict[str, list[int]] = {}
        found = [failure for failure in failures if failure is not None]
        first = next((failure for failure in found if not failure["follows"]), found[0] if found else None)
        for place, failure in enumerate(failures):
            if failure is not None and (first is None or failure["follows"] == first["follows"]):
                where.setdefault(failure["message"], []).append(place)
        if first is None:
            return
        message = first["message"]
        if len(where[message]) < len(failures):
            world = dist.get_world_size()
            message = "\n".join(
                f"on {self.named(places)} of {world}: {text}" for text, places in list(where.items())[:3]
            )
            message += f"\n  -> {first['hint']}" if first["hint"] else ""
        raise _made({**first, "message": message})

    def _raise_disorder(self, steps: list[str]) -> None:
        where: dict[str, list[int]] = {}
        for place, step in enumerate(steps):
            where.setdefault(step, []).append(place)
        if len(where) > 1:
            raise TimingError(
                f"the ranks are not at the same step: {', '.join(f'{self.named(p)} at {s!r}' for s, p in where.items())}; "
                "let every rank make the same calls in the same order"
            )

    def _answer(self, number: int, value: Any, error: dict[str, Any] | None, without: Sequence[int] = ()) -> None:
        """Give the answer, unless somebody has given one; `without` are the places of those that were given up."""
        answer = {"value": value, "error": error, "without": list(without)}
        self._store.compare_set(f"{number}/answer", "", json.dumps(answer))

    def _pass_over(self) -> None:
        """Leave out the meetings that were given up for want of this rank: who waited there is at the next one by now."""
        while self._store.check([key := f"{self.number}/answer"]):
            if self.index not in json.loads(self._store.get(key))["without"]:
                return
            _meetings[self._name] = self.number + 1

    def _wait(self, number: int, step: str) -> dict[str, Any]:
        key = f"{number}/answer"
        started, probed, pause = time.monotonic(), 0.0, 0.001
        while not self._store.check([key]):
            waited = time.monotonic() - started
            if waited > probed + _PROBE_SECONDS:
                probed = waited
                error, without = self._ended(step), list[int]()
                if error is None and waited >= self._limit:
                    error, without = self._late(number, step, waited)
                if error is not None:
                    self._answer(number, None, _portable(error), without)
                    continue
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        answer: dict[str, Any] = json.loads(self._store.get(key))
        return answer

    def _late(self, number: int, step: str, waited: float) -> tuple[WarmStartError | None, list[int]]:
        """What is said of the ranks that are too late by now, and which of them the meeting is given up for."""
        places = list(range(len(self.members)))
        missing = self._absent(f"{number}/", places)
        idle = self._absent(f"{number}/coming/", missing)
        if not idle and waited < _WORKING * self._limit:
            return None, []
        late = self.named(idle or missing or places)
        if idle:
            error: WarmStartError = TimingError(
                f"{late} of {dist.get_world_size()} did not come to {step!r} within {waited:.0f} s while the others waited; "
                "let every rank of the group call it, not under `if rank == 0:`. Where ranks come that late for a good "
                f"reason, set {TIMEOUT_VARIABLE} to more seconds"
            )
            return error, idle
        error = WarmStartError(
            f"{late} did not finish {step!r} within {waited:.0f} s while the others waited; if its disk or "
            f"network is that slow, set {TIMEOUT_VARIABLE} to more seconds"
        )
        return error, []

    def _absent(self, prefix: str, places: list[int]) -> list[int]:
        if not places or self._store.check([f"{prefix}{place}" for place in places]):
            return []
        if len(places) == 1:
            return places
        half = len(places) // 2
        return [*self._absent(prefix, places[:half]), *self._absent(prefix, places[half:])]

    def _enrol(self) -> None:
        """Leave this process's number where the ranks of the same machine find it."""
        if (me := (self._name, os.getpid())) not in _enrolled:
            _enrolled.add(me)
            place = self._store.add(f"{node()}/count", 1)
            self._store.set(f"{node()}/{place}", json.dumps([self.index, os.getpid(), _born(os.getpid())]))

    def _ended(self, step: str) -> WarmStartError | None:
        """The ranks of this machine whose process is no more."""
        latest: dict[int, tuple[int, str]] = {}
        for place in range(1, self._store.add(f"{node()}/count", 0) + 1):
            if self._store.check([f"{node()}/{place}"]):
                index, pid, born = json.loads(self._store.get(f"{node()}/{place}"))
                latest[index] = (pid, born)
        ended = [index for index, (pid, born) in latest.items() if born and _born(pid) != born]
        if not ended:
            return None
        processes = ", ".join(f"{latest[index][0]}" for index in ended)
        return WarmStartError(
            f"{self.named(ended)} of {dist.get_world_size()} (process {processes} on {socket.gethostname()}) has ended while "
            f"the others waited at {step!r}; its own output says why"
        )


def is_shared(error: BaseException) -> bool:
    """Whether all ranks have raised this already."""
    return getattr(error, _SHARED, False) is True


def node() -> str:
    """What ranks of one machine have in common, and no two machines have."""
    return f"{socket.gethostname()}/{_text('/proc/sys/kernel/random/boot_id')}/{_namespace()}"


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; empty if it is no more, or nothing is known of it."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _own_timeout(group: dist.ProcessGroup) -> float:
    """Seconds after which the group's own collectives give up; infinite where it does not say."""
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            return float(timeout.total_seconds())
    return math.inf


def _limit(group_timeout: float = math.inf) -> float:
    """How long a rank that does not come is waited for: not so long that those who wait for us elsewhere give up first."""
    given = os.environ.get(TIMEOUT_VARIABLE)
    try:
        seconds = min(TIMEOUT_SECONDS, group_timeout / 2) if given is None else float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise MappingError(f"{TIMEOUT_VARIABLE}={given!r}: a number of seconds, such as {TIMEOUT_VARIABLE}=1200")
    return seconds


def _spans(numbers: Sequence[int]) -> list[str]:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return [str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in spans]


@contextlib.contextmanager
def _store_at_hand() -> Iterator[None]:
    """Says in words that the store does not answer: whoever held it, mostly rank 0, has ended."""
    try:
        yield
    except dist.DistError as error:
        raise WarmStartError(
            "the process group's store does not answer any more, so the process that held it, mostly rank 0 or the "
            f"launcher, has ended; its own output says why ({str(error).splitlines()[0]})"
        ) from error


def _portable(error: Exception, hint: str = "") -> dict[str, Any]:
    """What another process can be told of an error: no plan and no model."""
    ours = isinstance(error, WarmStartError)
    return {
        "type": type(error).__name__ if ours else "WarmStartError",
        "message": str(error) if ours else f"{type(error).__name__}: {error}",
        "facts": {k: list(v) for k, v in vars(error).items() if k in ("tensors", "written")} if ours else {},
        "follows": isinstance(error, StoppedError) or isinstance(error.__cause__, StoppedError),
        "hint": hint if isinstance(error, CheckpointError) else "",
    }


def _made(said: dict[str, Any]) -> WarmStartError:
    kind: type[WarmStartError] = getattr(errors, said["type"], WarmStartError)
    made = kind(said["message"])
    vars(made).update({name: tuple(value) for name, value in said["facts"].items()})
    return made


def _here(said: dict[str, Any], own: Exception | None) -> Exception:
    """The error that all ranks raise, as this one raises it: with what only this one knows."""
    if own is not None and not isinstance(own, WarmStartError) and _portable(own)["message"] == said["message"]:
        made: Exception = own  # all of them failed alike
    else:
        made = _made(said)
        made.__cause__ = own
        if own is not None and type(own) is type(made):
            vars(made).update({name: vars(own)[name] for name in ("plan", "report") if name in vars(own)})
    setattr(made, _SHARED, True)
    return made
