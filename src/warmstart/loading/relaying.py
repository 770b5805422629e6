"""Reading for others: one rank of a node reads, and the ranks it reads for get every tensor from it, one at a time.

The ranks that read together go in step: each asks for the same tensors in the same order. Before a tensor is passed on they
tell each other in a few bytes that nobody has failed, so that none waits for one that left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from warmstart.checkpoints.base import Checkpoint, Index, TensorInfo
from warmstart.errors import MappingError, WarmStartError
from warmstart.lineage import recorded
from warmstart.loading.meeting import Ranks, StoppedError, node
from warmstart.mapping.buckets import Part
from warmstart.mapping.plan.plan import Plan, R

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PIECE: Final = 256 << 20
_CARRIED: Final = ("location", "format", "files", "checkpoint_key", "metadata", "versions", "notes")
_ADDED: Final = ("revision", "file_hashes")


class Relay:
    """The ranks for which one of them reads, seen from one of them.

    Attributes:
        reads: Whether this rank reads.
    """

    def __init__(self, ranks: Ranks, members: Sequence[int]) -> None:
        """Connect them.

        Args:
            ranks: All that load.
            members: The places of those that read together, the one that reads first.
        """
        self.reads = ranks.index == members[0]
        # On the CPU, whatever carries the training's collectives, and known to nobody else.
        store = ranks.store(f"relay/{ranks.number}/{members[0]}")
        self._group: Any = dist.ProcessGroupGloo(
            store, members.index(ranks.index), len(members), timeout=ranks.patience
        )
        self._held: tuple[Checkpoint, str, Tensor] | None = None

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """A stretch of work that all ranks of the relay do; one that fails in it takes the others out of it.

        Raises:
            StoppedError: Another rank has failed.
        """
        try:
            yield
        except StoppedError:
            raise
        except Exception:
            with contextlib.suppress(Exception):  # the others may be gone
                self._step("", failed=True)
            raise
        finally:
            self._held = None
        self._step("")

    def tensor(self, checkpoint: RelayedCheckpoint, key: str) -> Tensor:
        """A whole tensor: read here, or passed on by the rank that reads. Every rank of the relay asks for it."""
        if self._held is not None and self._held[:2] == (checkpoint, key):
            return self._held[2]
        self._held = None  # frees it before there is another one
        info = checkpoint.info(key)
        if checkpoint.at_hand is not None:
            whole = checkpoint.at_hand.read(key).contiguous()
            checkpoint.bytes_read += info.nbytes
        else:
            whole = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        self._step(key)
        if whole.numel():
            for piece in torch.split(whole.reshape(-1).view(torch.uint8), PIECE):
                self._group.broadcast(piece, 0).wait()
        self._held = (checkpoint, key, whole)
        return whole

    def facts(self, own: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        """What the rank that reads says of its checkpoints."""
        packed = torch.frombuffer(bytearray(pickle.dumps(own)), dtype=torch.uint8)
        length = torch.tensor([packed.numel()], device="cpu")
        self._group.broadcast(length, 0).wait()
        if not self.reads:
            packed = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        self._group.broadcast(packed, 0).wait()
        found: list[dict[str, Any]] = pickle.loads(packed.numpy().tobytes())  # from a rank of the same run
        return found

    def _step(self, what: str, failed: bool = False) -> None:
        number = zlib.crc32(what.encode("utf-8", "surrogatepass"))
        words = torch.tensor([int(failed), number, -number], device="cpu")
        self._group.allreduce(words, dist.ReduceOp.MAX).wait()
        if words[0]:
            raise StoppedError("another rank of this node has failed")
        if words[1] != -words[2]:
            raise WarmStartError(f"the ranks of this node do not ask for the same tensors; here it is {what!r}")


class RelayedCheckpoint(Checkpoint):
    """A checkpoint that one rank reads for several. What is there is known everywhere; what it holds comes in step.

    Attributes:
        at_hand: The checkpoint itself, on the rank that reads it.
    """

    def __init__(self, relay: Relay, facts: dict[str, Any], at_hand: Checkpoint | None) -> None:
        super().__init__(infos=facts["infos"], **{name: facts[name] for name in _CARRIED})
        for name in _ADDED:
            setattr(self, name, facts[name])
        self.callbacks = facts["callbacks"]
        self.relay = relay
        self._at_hand = at_hand

    @property
    def at_hand(self) -> Checkpoint | None:
        return self._at_hand

    @property
    def lasting(self) -> bool:
        return False  # the ranks do not stay in step

    def read(self, key: str, index: Index | None = None) -> Tensor:
        self.info(key)
        return self._read(key, index)

    def _read(self, key: str, index: Index | None) -> Tensor:
        whole = self.relay.tensor(self, key)
        return whole if index is None else whole[index]

    def changed(self) -> str | None:
        return None if self._at_hand is None else self._at_hand.changed()


def relayed(openers: Sequence[Callable[[], Checkpoint]], gone: bool, group: ProcessGroup | None) -> list[Checkpoint]:
    """The checkpoints, opened on one rank of each node only; a node without them gets them from the first that has them.

    Args:
        openers: What opens each of them.
        gone: Whether one of them is not there on this rank.
        group: The ranks that read together.

    Raises:
        CheckpointError: No rank has them, or the one that reads cannot open them.
        MappingError: One is in memory, where there is nothing to read.
    """
    ranks = Ranks.of(group)
    plan: list[list[int]] = [] if ranks is None else ranks.meet("load: who reads", [node(), gone], _readers)
    mine = [] if ranks is None else next(members for members in plan if ranks.index in members)
    if ranks is None or len(mine) == 1:
        return [opener() for opener in openers]
    relay = Relay(ranks, mine)
    found: list[Checkpoint] = []
    with relay.in_step():
        if relay.reads:
            found = [_of_files(opener()) for opener in openers]
    facts = relay.facts([_facts(each) for each in found] if relay.reads else None)
    return [RelayedCheckpoint(relay, fact, found[i] if found else None) for i, fact in enumerate(facts)]


def shared_reading(plan: Plan[R], group: ProcessGroup | None) -> Plan[R]:
    """The plan of checkpoints that every rank has opened, read by one rank of each node.

    Raises:
        MappingError: As `relayed`.
    """
    openers = [functools.partial(_checkpoint, part) for part in plan.parts]
    parts = zip(plan.parts, relayed(openers, False, group), strict=True)
    return dataclasses.replace(plan, parts=tuple(dataclasses.replace(p, checkpoint=c) for p, c in parts))


def in_step(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """A stretch of work in which the ranks that read together go in step; a plain block where each reads for itself."""
    relays = [part.checkpoint.relay for part in plan.parts if isinstance(part.checkpoint, RelayedCheckpoint)]
    return relays[0].in_step() if relays else contextlib.nullcontext()


def _readers(words: list[tuple[str, bool]]) -> list[list[int]]:
    """Places that read together, the one that reads first."""
    having = [i for i, (_, gone) in enumerate(words) if not gone]
    if not having:
        return [[i] for i in range(len(words))]  # each says what is not there
    reads: dict[str, int] = {}
    for i in having:
        reads.setdefault(words[i][0], i)
    together: dict[int, list[int]] = {i: [i] for i in reads.values()}
    for i, (where, _) in enumerate(words):
        reader = reads.get(where, having[0])
        if i != reader:
            together[reader].append(i)
    return list(together.values())


def _checkpoint(part: Part) -> Checkpoint:
    return part.checkpoint


def _of_files(checkpoint: Checkpoint) -> Checkpoint:
    if not checkpoint.files:
        raise MappingError(
            f'{checkpoint.location}: read="broadcast" passes on what one rank reads from files, and this is in memory; give it '
            "to every rank and leave read= out"
        )
    return checkpoint


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    infos: dict[str, TensorInfo] = {key: checkpoint.info(key) for key in checkpoint.keys()}
    callbacks = [{"lineage": record} for record in recorded(checkpoint)]  # of what they saved, what others ask for
    return {name: getattr(checkpoint, name) for name in (*_CARRIED, *_ADDED)} | {"infos": infos, "callbacks": callbacks}
