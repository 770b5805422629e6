"""Weights behind a URL: safetensors tensor by tensor, each by its own range of bytes; any other format by a kept copy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import unquote

from torch import Tensor

from warmstart.checkpoints.base import Checkpoint, Index
from warmstart.checkpoints.folders.sharded import INDEX_SUFFIX, MAX_INDEX, ShardedCheckpoint, read_index
from warmstart.checkpoints.leaves import Leaf, LeafCheckpoint
from warmstart.checkpoints.remote.fetching import Remote
from warmstart.checkpoints.remote.spool import Spool
from warmstart.checkpoints.safetensors_file import read_layout
from warmstart.errors import CheckpointError
from warmstart.locations import public, sibling
from warmstart.showing import counted, listed, shown

# No safetensors file with a tensor in it has a shorter header, so that looking at so much fetches nothing in vain.
HEAD: Final = 64

T = TypeVar("T")


class RangedCheckpoint(LeafCheckpoint):
    """A safetensors file elsewhere, of which only what is read is fetched, and fetched once."""

    def __init__(self, spool: Spool, leaves: Mapping[str, Leaf], metadata: Mapping[str, str]) -> None:
        location = spool.remote.location
        super().__init__(leaves, location=location, format="safetensors", files=[spool.stamp], metadata=metadata)
        self._spool = spool

    def changed(self) -> str | None:
        """What changed about the file since it was opened, in words; None if nothing did, or nobody can tell.

        What is here already is read from here and needs no answer of the server.
        """
        return None if self._spool.is_whole else self._spool.remote.changed(self._spool.seen)

    def sha256(self) -> str:
        """The digest of the file, all of which is fetched for it and kept.

        Raises:
            CheckpointError: It cannot be had.
        """
        return self._spool.sha256()


class CopiedCheckpoint(Checkpoint):
    """A file from elsewhere, read from its copy on this machine and known by where it came from.

    Whether it changed is asked of the copy: what is read is what was planned, whatever the server has by now.
    """

    def __init__(self, spool: Spool, copy: Checkpoint) -> None:
        super().__init__(
            location=spool.remote.location,
            format=copy.format,
            infos={key: copy.info(key) for key in copy.keys()},
            files=copy.files,
            checkpoint_key=copy.checkpoint_key,
            metadata=copy.metadata,
            versions=copy.versions,
            notes=copy.notes,
        )
        self.callbacks = copy.callbacks
        self._spool = spool
        self._copy = copy

    def _read(self, key: str, index: Index | None) -> Tensor:
        return _renamed(self._spool, lambda: self._copy.read(key, index))


class ShardsCheckpoint(ShardedCheckpoint):
    """Shards elsewhere, joined by an index that lies beside them."""

    def __init__(self, index: Spool, shards: Mapping[str, Checkpoint], weight_map: Mapping[str, str]) -> None:
        notes = list(dict.fromkeys(note for shard in shards.values() for note in shard.notes))
        beside = sum(len(shard) for shard in shards.values()) - len(weight_map)
        if beside:
            notes.append(f"{counted(beside, 'tensor')} of the shards that the index does not name there: left out")
        super().__init__(index.stamp, shards, weight_map, notes=notes)
        self.location = index.remote.location
        self._parts = tuple(shards.values())

    def changed(self) -> str | None:
        """What changed about a shard since it was opened, in words; None if nothing did, or nobody can tell."""
        return next((what for part in self._parts if (what := part.changed())), None)


def open_remote(
    url: str,
    *,
    checkpoint_key: str | None,
    open_file: Callable[[Path], Checkpoint],
    refuse: Callable[[bytes, str], None],
    revision: str | None = None,
    subfolder: str | None = None,
) -> Checkpoint:
    """Open weights by their URL: `https://`, `s3://`, `gs://`, or any other protocol that fsspec has a package for.

    The index of a sharded checkpoint stands for all of it: its shards are looked for beside it.

    Args:
        url: Where the file lies. What is secret in it (user, password, query) is used and never shown or kept.
        checkpoint_key: The tree to take, where the file holds several.
        open_file: Opens the copy of a file on this machine, whatever format it has.
        refuse: Raises for the first bytes of a file that cannot be read, so that it is not downloaded first; its second
            argument is how messages name the file.
        revision: Must be None: a URL says what it means.
        subfolder: Must be None.

    Raises:
        CheckpointError: The file cannot be had, is damaged or hostile, or holds several trees.
    """
    for name, value in (("revision", revision), ("subfolder", subfolder)):
        if value is not None:
            raise CheckpointError(
                f"{public(url)}: {name}={shown(value)} is for a model of the hub, and a URL names one file; leave {name} out"
            )
    spool, head = _look(url, refuse)
    text = head.lstrip().startswith(b"{") and not _is_safetensors(head)
    if text and spool.size <= MAX_INDEX and _is_index(spool):
        return _open_shards(spool, checkpoint_key, lambda shard: _open(*_look(shard, refuse), None, open_file))
    return _open(spool, head, checkpoint_key, open_file)


def _look(url: str, refuse: Callable[[bytes, str], None]) -> tuple[Spool, bytes]:
    remote = Remote(url)
    seen, head = remote.probe(HEAD)
    if not head:
        raise CheckpointError(f"{remote.location}: the file is empty (0 bytes); upload it again")
    refuse(head, remote.location)
    spool = Spool(remote, seen)
    if seen.ranges:
        spool.keep(head)
    return spool, head


def _open(
    spool: Spool, head: bytes, checkpoint_key: str | None, open_file: Callable[[Path], Checkpoint]
) -> RangedCheckpoint | CopiedCheckpoint:
    if _is_safetensors(head) and spool.seen.ranges and not spool.is_whole:
        leaves, metadata = read_layout(spool, spool.remote.location, checkpoint_key)
        return RangedCheckpoint(spool, leaves, metadata)
    path = spool.whole()
    return CopiedCheckpoint(spool, _renamed(spool, lambda: open_file(path)))


def _is_safetensors(head: bytes) -> bool:
    # A header is at most 100 MB long, so that the upper bytes of its length are zero.
    return head[4:9] == b"\0\0\0\0{"


def _is_index(spool: Spool) -> bool:
    return spool.remote.name.endswith(INDEX_SUFFIX) or b'"weight_map"' in spool.whole().read_bytes()


def _open_shards(spool: Spool, checkpoint_key: str | None, open_shard: Callable[[str], Checkpoint]) -> Checkpoint:
    where, path = spool.remote.location, spool.whole()
    weight_map = _renamed(spool, lambda: read_index(path))
    if checkpoint_key is not None:
        raise CheckpointError(
            f"{where}: an index describes one tree, so checkpoint_key={shown(checkpoint_key)} names nothing in it; leave "
            "checkpoint_key out"
        )
    shards = {name: open_shard(sibling(spool.remote.url, name)) for name in sorted(set(weight_map.values()))}
    lacking = [key for key, name in weight_map.items() if key not in shards[name]]
    if lacking:
        raise CheckpointError(
            f"{where}: its shards lack {counted(len(lacking), 'tensor')} that it says they hold: {listed(lacking)}; index and "
            "shards are not of one save: upload all of them again"
        )
    return ShardsCheckpoint(spool, shards, weight_map)


def local_path(url: str) -> Path | None:
    """The path that a `file://` URL names; None for any other URL."""
    match = re.match(r"(?:file|local)://(?:localhost(?=/))?", url, re.IGNORECASE)
    if match is None:
        return None
    raw = url[match.end() :]
    if os.name == "nt":
        raw = re.sub(r"^/(?=[a-zA-Z]:)", "", raw)
    # People write paths as they are, programs write %20 for a blank: what exists is what is meant.
    return next((path for path in (Path(raw), Path(unquote(raw))) if path.exists()), Path(raw)).expanduser()


def _renamed(spool: Spool, step: Callable[[], T]) -> T:
    """What `step` gives; its errors name the URL instead of the copy."""
    try:
        return step()
    except CheckpointError as error:
        message = str(error)
    raise CheckpointError(message.replace(str(spool.path), spool.remote.location))
