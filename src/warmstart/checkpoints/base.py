"""What every source becomes: names, shapes and dtypes at once, and tensors one at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from warmstart.checkpoints.files import FileStamp, Place
from warmstart.errors import CheckpointError

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class TensorInfo(NamedTuple):
    """What a checkpoint says of one tensor before it is read.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, as torch spells it.
        offset: Where its bytes start in `file`, or -1 where it has no place of its own.
        file: Index into `Checkpoint.files`, or -1 for a tensor in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = -1
    file: int = -1

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return self.numel * self.dtype.itemsize


class Checkpoint(ABC):
    """A tree of named tensors that lies somewhere, read lazily.

    Making one reads names, shapes and dtypes and checks that every tensor lies inside its file; no tensor data is read
    until `read`. Formats subclass this: they fill `_infos` and give `_read`.
    """

    def __init__(
        self,
        *,
        location: str,
        format: str,
        infos: Mapping[str, TensorInfo],
        files: Sequence[FileStamp] = (),
        checkpoint_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        versions: Mapping[str, Mapping[str, object]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Fields shared by all formats.

        Args:
            location: What the user gave, resolved: a path, or words such as `a state dict in memory`.
            format: The container, in words: `safetensors`, `torch zip`, `numpy npz`, ...
            infos: Name to shape, dtype and place, in the source's own order.
            files: The files the tensors lie in; empty for tensors in memory.
            checkpoint_key: The tree of the file that was taken, dotted; None where the file holds just one.
            metadata: Text entries of the container (safetensors' `__metadata__`).
            versions: A state dict's `_metadata`: module path to its `{"version": n}`.
            notes: What the reader of a report should know (stubbed classes, skipped entries).
        """
        self.location = location
        self.format = format
        self.files = tuple(files)
        self.checkpoint_key = checkpoint_key
        self.metadata = dict(metadata or {})
        self.versions = {path: dict(value) for path, value in (versions or {}).items()}
        self.notes = tuple(notes)
        # Of a model from the hub: the commit, and the hub's own hash of each file by its name in the repository.
        self.revision: str | None = None
        self.file_hashes: dict[str, str] = {}
        # What a trainer's callbacks saved beside the weights, unbuilt: a lineage may stand in it.
        self.callbacks: object = None
        self._infos = dict(infos)
        self.bytes_read = 0

    @abstractmethod
    def _read(self, key: str, index: Index | None) -> Tensor:
        """One tensor, or a slice of it, on the CPU. May share memory with the source: callers do not write to it."""

    def place(self, key: str) -> Place | None:
        """Where in a mapped file a tensor lies as `read` gives it; None where it is made anew."""
        return None

    @property
    def at_hand(self) -> Checkpoint | None:
        """Where this process reads from; None where another process reads for it."""
        return self

    @property
    def lasting(self) -> bool:
        """Whether it can be read again later: what was in memory may have trained by then, or be gone."""
        return bool(self.files)

    def keys(self) -> tuple[str, ...]:
        return tuple(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, key: object) -> bool:
        return key in self._infos

    def leave_out(self, keys: Iterable[str]) -> None:
        """Forget keys: they are neither listed nor read from now on."""
        for key in keys:
            del self._infos[key]

    def info(self, key: str) -> TensorInfo:
        """Shape, dtype and size in bytes of one tensor.

        Raises:
            KeyError: There is no such key.
        """
        return self._infos[key]

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """One tensor as a CPU tensor, or the slice `index` of it; treat it as read-only.

        Raises:
            KeyError: There is no such key.
            CheckpointError: Its bytes cannot be read.
        """
        info = self._infos[key]
        # A host may call us inside torch.device("meta") or under another default device: we always read to the CPU.
        try:
            with torch.device("cpu"), torch.no_grad():
                tensor = self._read(key, index)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self.location}: cannot read '{key}': {error}") from error
        if index is None and (tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype):
            raise CheckpointError(
                f"{self.location}: '{key}' was announced as {info.shape} {info.dtype} and read as "
                f"{tuple(tensor.shape)} {tensor.dtype}; the file changed or is damaged"
            )
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def header_digest(self) -> str:
        """A SHA-256 of all names, shapes, dtypes and offsets: tells two files apart without reading their tensors."""
        lines = (f"{k}\0{i.shape}\0{i.dtype}\0{i.file}\0{i.offset}\n" for k, i in sorted(self._infos.items()))
        return hashlib.sha256("".join(lines).encode("utf-8", "replace")).hexdigest()

    def changed(self) -> str | None:
        """What changed on disk since this checkpoint was opened, in words; None if nothing did."""
        for stamp in self.files:
            try:
                now = FileStamp.of(stamp.path)
            except OSError:
                return f"{stamp.path} is gone"
            if now.size != stamp.size:
                return f"{stamp.path} had {stamp.size} bytes when it was opened and has {now.size} now"
            if now.mtime_ns != stamp.mtime_ns:
                return f"{stamp.path} was written to after it was opened"
        return None

    def check_sha256(self, wanted: str | None) -> None:
        """Refuse a file that is not the one meant; None means any.

        Raises:
            CheckpointError: Its SHA-256 is another, or the source is not one file.
        """
        if wanted is not None and (found := self.sha256()) != wanted.lower():
            raise CheckpointError(
                f"{self.location}: its SHA-256 is {found}, not the {wanted.lower()} asked for; get the right file, or write "
                f'sha256="{found}" if this is the one you mean'
            )

    def sha256(self) -> str:
        """The digest of the source's one file, in one sequential pass.

        Raises:
            CheckpointError: The source is not exactly one file, or cannot be read.
        """
        if len(self.files) != 1:
            raise CheckpointError(f"{self.location}: sha256= needs a source of exactly one file, not {len(self.files)}")
        try:
            with self.files[0].path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{self.location}: cannot be read: {error}") from error

    def __repr__(self) -> str:
        tree = f" [{self.checkpoint_key}]" if self.checkpoint_key else ""
        size = sum(info.nbytes for info in self._infos.values())
        return f"<Checkpoint {self.location}{tree}: {self.format}, {len(self)} tensors, {size:,} bytes>"
