"""Where files from elsewhere are kept on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from warmstart.checkpoints.remote.transports import Seen
from warmstart.errors import CheckpointError


def cache_folder() -> Path:
    """Where remote files are kept: `WARMSTART_CACHE`, else the folder of fsspec's `filecache`, else the user's own cache."""
    import fsspec

    if given := os.environ.get("WARMSTART_CACHE"):
        return Path(given).expanduser() / "remote"
    configured = fsspec.config.conf.get("filecache", {}).get("cache_storage")
    if isinstance(configured, str) and configured != "TMP":
        return Path(configured).expanduser() / "warmstart"
    user = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(user) if user else Path.home() / ".cache") / "warmstart" / "remote"


def shared_folder(url: str, seen: Seen) -> Path | None:
    """The folder of this version of the file, the same in every process; None if it cannot be made."""
    names = (hashlib.sha256(text.encode()).hexdigest()[:32] for text in (url, f"{seen.size} {seen.tag}"))
    try:
        folder = cache_folder().joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # which fails where nothing can be written
    except (OSError, RuntimeError):
        return None
    return folder


def private_folder(location: str) -> Path:
    """A new folder for this process alone.

    Raises:
        CheckpointError: There is no place for one.
    """
    for parent in (cache_folder, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):
            folder = parent()
            folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=folder, prefix="unversioned-"))
    raise CheckpointError(
        f"{location}: there is no folder to keep it in while it is read; name one: export WARMSTART_CACHE=/path/with/room"
    )
