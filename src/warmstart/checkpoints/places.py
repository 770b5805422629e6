"""What the text of a source names: a path on this machine, a model of the Hugging Face hub, or a URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import CheckpointError
from warmstart.showing import shown

# A name that ends like this is a file's, never a model's on the hub.
FILE_SUFFIXES: Final = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar", ".npz", ".npy", ".h5", ".hdf5", ".keras",
    ".gguf", ".json", ".msgpack", ".onnx", ".zip", ".gz", ".txt", ".yaml", ".yml",
)  # fmt: skip

_SCHEME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_HUB_ID: Final = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^\s@\\]+))?", re.ASCII)
_HUB_URI: Final = re.compile(
    r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>(?:refs/\w+/)?[^/@]+))?(?:/(?P<path>.*))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    """A model of the hub.

    Attributes:
        repo: `org/name`.
        revision: A branch, tag or commit; None for the repository's main branch.
        path: A file or folder of it; "" for all of it.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    def within(self, revision: str | None, subfolder: str | None) -> HubPlace:
        """The place with what was given beside it.

        Raises:
            CheckpointError: The revision is given twice and differs, or the folder leads out of the model.
        """
        if revision is not None and self.revision not in {None, revision}:
            raise CheckpointError(
                f"{self.spelled()}: the source names revision {shown(self.revision)} and revision={shown(revision)} another; "
                "give one of them"
            )
        if subfolder is not None and ".." in subfolder.split("/"):
            raise CheckpointError(f"{self.spelled()}: subfolder={shown(subfolder)} leads out of the model")
        path = "/".join(part for part in (self.path, (subfolder or "").strip("/")) if part)
        return HubPlace(repo=self.repo, revision=revision or self.revision, path=path)

    def spelled(self, path: str | None = None, revision: str | None = None) -> str:
        """The place as a source to type, with another path or revision where one is given."""
        revision = revision or self.revision
        at = f"@{revision.replace('/', '%2F')}" if revision else ""
        path = self.path if path is None else path
        return f"hf://{self.repo}{at}{'/' + path if path else ''}"


def has_scheme(text: str) -> bool:
    """Whether a source is spelled as a URL, `hf://` included; a drive letter is no scheme."""
    return _SCHEME.match(text) is not None


def looks_local(source: str | os.PathLike[str]) -> bool:
    """Whether a source can only be a path on this machine: such a source is never looked up anywhere else.

    What is left is a URL, or has the form `org/name` or `org/name@revision` without the suffix of a file.
    """
    if not isinstance(source, str):
        return True
    if has_scheme(source):
        return False
    match = _HUB_ID.fullmatch(source)
    return match is None or ".." in match["repo"] or source.lower().endswith(FILE_SUFFIXES)


def is_gone(source: object) -> bool:
    """Whether a source is a path on this machine at which nothing lies."""
    if not isinstance(source, (str, os.PathLike)) or not looks_local(source):
        return False
    return not Path(source).expanduser().exists()


def hub_place(source: str | os.PathLike[str]) -> HubPlace | None:
    """The model of the hub that a source names; None for paths and other URLs. What exists here is never on the hub.

    Raises:
        CheckpointError: An `hf://` address that names no model.
    """
    if not isinstance(source, str):
        return None
    if source.startswith("hf://"):
        return _parse_uri(source)
    if looks_local(source) or has_scheme(source) or Path(source).exists():
        return None
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    return HubPlace(repo=match["repo"], revision=match["revision"])


def _parse_uri(source: str) -> HubPlace:
    match = _HUB_URI.fullmatch(source)
    kind = source.removeprefix("hf://").partition("/")[0]
    if match is None or kind in {"datasets", "spaces", "buckets"}:
        raise CheckpointError(
            f"{shown(source, 200)}: names no model of the hub; write hf://org/name, hf://org/name@revision or "
            "hf://org/name@revision/path/of/file"
        )
    revision = match["revision"]
    return HubPlace(
        repo=match["repo"], revision=unquote(revision) if revision else None, path=(match["path"] or "").strip("/")
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a model in the hub's cache: `root/snapshots/commit/FILE`, each a link to `root/blobs/HASH`."""

    root: Path
    commit: str

    @property
    def folder(self) -> Path:
        return self.root / "snapshots" / self.commit

    def blob(self, path: Path) -> str | None:
        """The hub's own hash of a file of the snapshot; None where the cache holds a copy instead of a link."""
        target = path.resolve()
        return target.name if target.parent == (self.root / "blobs").resolve() else None


def snapshot_of(path: Path) -> Snapshot | None:
    """The snapshot of the hub's cache that a file or folder lies in; None if it lies elsewhere."""
    path = Path(os.path.abspath(path))  # not resolved: the files of a snapshot are links that lead out of it
    for folder in (path, *path.parents):
        root = folder.parent.parent
        if folder.parent.name == "snapshots" and root.name.startswith("models--"):
            return Snapshot(root, folder.name)
    return None


def record_snapshot(checkpoint: Checkpoint) -> None:
    """Give a checkpoint that lies in the hub's cache its commit and its files' hashes."""
    for stamp in checkpoint.files:
        snapshot = snapshot_of(stamp.path)
        if snapshot is None:
            continue
        checkpoint.revision = snapshot.commit
        blob = snapshot.blob(stamp.path)
        if blob is not None:
            name = Path(os.path.abspath(stamp.path)).relative_to(snapshot.folder).as_posix()
            checkpoint.file_hashes[name] = blob
