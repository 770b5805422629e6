"""The one way in: any source a person has, as a `Checkpoint`. A file's format is told by its bytes, never by its name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.folders.sharded import INDEX_SUFFIX, MAX_INDEX, open_sharded
from warmstart.checkpoints.moments import leave_moments
from warmstart.checkpoints.places import has_scheme, hub_place, record_snapshot
from warmstart.checkpoints.refusals import refuse_engine_file, refuse_placeholders
from warmstart.checkpoints.signatures import DCP_METADATA, H5, KERAS_MEMBER, NPY, TORCH_LEGACY, ZIP
from warmstart.checkpoints.tensorflow import refuse_tensorflow
from warmstart.errors import CheckpointError
from warmstart.showing import shown

if TYPE_CHECKING:
    from warmstart.checkpoints.archive import Member

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Checkpoint

_FOREIGN = {
    b"GGUF": "a GGUF file, whose tensors are quantized blocks; use the original weights (safetensors) of that model",
    b"\x1f\x8b": "a gzip file; unpack it first: gunzip FILE (or tar xzf FILE)",
    b"BZh": "a bzip2 file; unpack it first: bunzip2 FILE",
    b"\xfd7zXZ\x00": "an xz file; unpack it first: unxz FILE",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first: unzstd FILE",
    b"version https://git-lfs": "a git-lfs pointer, not the weights themselves; fetch them: git lfs pull",
}
_HTML = (b"<!doctype", b"<html", b"<?xml", b"<head")
_KNOWN = "safetensors, torch (.pt .pth .bin .ckpt), numpy (.npy .npz) and Keras (.h5 .keras) files are read"


def open_checkpoint(
    source: Source,
    *,
    checkpoint_key: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    trust_pickle: bool = False,
) -> Checkpoint:
    """Open pretrained weights: a file or folder, a model of the hub, a state dict, a module, or a checkpoint that is open.

    Args:
        source: A path of a file, of an index of shards or of a folder (`~` is expanded); a model of the Hugging Face hub as
            `org/name`, `org/name@revision` or `hf://org/name[@revision][/path]`; the URL of a file (`https://`, `s3://`, ...);
            a mapping of tensors or numpy arrays, a module, or a `Checkpoint`. What exists as a path is a path.
        checkpoint_key: The tree to take, where the source holds several: its dotted path, such as `state_dict`;
            "" takes all of them as one.
        revision: The branch, tag or commit of a model of the hub.
        subfolder: The folder within a folder or model of the hub, such as `unet`.
        trust_pickle: Run whatever code the file's pickle names. Only for files you would run as a program.

    Returns:
        The checkpoint; no tensor data has been read.

    Raises:
        CheckpointError: The source is not there, unreadable, truncated, hostile, or holds several trees of tensors.
        TypeError: The source is of a type that holds no weights.
    """
    if isinstance(source, Checkpoint):
        if checkpoint_key is not None:
            raise CheckpointError(
                f"{source.location}: is an open checkpoint, whose tree was taken when it was opened; give checkpoint_key to "
                "open_checkpoint(path, checkpoint_key=...) instead"
            )
        return source
    if isinstance(source, (Mapping, nn.Module)):
        from warmstart.checkpoints.memory import open_memory

        _refuse_hub_only(source, revision, subfolder)
        return _checked(open_memory(source, checkpoint_key=checkpoint_key), checkpoint_key)
    if not isinstance(source, (str, os.PathLike)):
        hint = "; pass a mapping: {name: tensor}" if isinstance(source, Tensor) else ""
        raise TypeError(
            "a checkpoint is opened from a path, a mapping of tensors, a module or a Checkpoint, not "
            f"{type(source).__name__}{hint}"
        )
    checkpoint = _open_place(source, checkpoint_key, revision, subfolder, trust_pickle)
    record_snapshot(checkpoint)
    return _checked(checkpoint, checkpoint_key)


def _checked(checkpoint: Checkpoint, key: str | None) -> Checkpoint:
    refuse_placeholders(checkpoint)
    if key != "":
        leave_moments(checkpoint)
    return checkpoint


def _open_place(
    source: str | os.PathLike[str], key: str | None, revision: str | None, subfolder: str | None, trust: bool
) -> Checkpoint:
    def open_file(path: Path) -> Checkpoint:
        return _open_file(_map(path), key, trust)

    def look_at(path: Path) -> Checkpoint:
        return _open_file(_map(path), key, False)

    if not os.fspath(source).strip():
        raise CheckpointError("the source is empty; give the path of the weights (is a variable of the shell not set?)")
    place = hub_place(source)
    if place is None and isinstance(source, str) and has_scheme(source):
        from warmstart.checkpoints.remote.urls import local_path, open_remote

        local = local_path(source)
        if local is None:
            return open_remote(
                source,
                checkpoint_key=key,
                open_file=open_file,
                refuse=_refuse_foreign,
                revision=revision,
                subfolder=subfolder,
            )
        source = local
    path = Path(source).expanduser()
    try:
        if place is not None:
            from warmstart.checkpoints.folders.hub import open_hub

            return open_hub(place.within(revision, subfolder), open_file=open_file)
        _refuse_hub_only(path, revision)
        if path.is_dir():
            return _open_folder(_below(path, subfolder), key, open_file, look_at)
        if subfolder is not None:
            _map(path)
            raise CheckpointError(f"{path}: is a file, which has no subfolder={shown(subfolder)}; leave subfolder out")
        return open_file(path)
    except OSError as error:
        raise CheckpointError(
            f"{place.spelled() if place else path}: cannot be read: {error.strerror or error}; check the path and its "
            "permissions"
        ) from error


def _open_folder(
    path: Path, key: str | None, open_file: Callable[[Path], Checkpoint], look_at: Callable[[Path], Checkpoint]
) -> Checkpoint:
    if (path / DCP_METADATA).is_file():
        from warmstart.checkpoints.torch_files.dcp import open_dcp

        return open_dcp(path, checkpoint_key=key)
    from warmstart.checkpoints.folders.folder import open_folder

    refuse_tensorflow(path)
    return open_folder(path, checkpoint_key=key, open_file=open_file, look_at=look_at)


def _below(path: Path, subfolder: str | None) -> Path:
    if subfolder is None:
        return path
    inside = path / subfolder
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(
            f"{path}: subfolder={shown(subfolder)} leads out of it; give the folder you mean as the source"
        )
    if not inside.is_dir():
        raise CheckpointError(f"{path}: has no folder {shown(subfolder)}{_beside(inside)}; check subfolder=")
    return inside


def _refuse_hub_only(source: object, revision: str | None, subfolder: str | None = None) -> None:
    for name, value in (("revision", revision), ("subfolder", subfolder)):
        if value is not None:
            what = source if isinstance(source, Path) else "a source in memory"
            where = "a model of the hub" if name == "revision" else "a folder or a model of the hub"
            raise CheckpointError(f"{what}: {name}={shown(value)} is for {where}, org/name; leave {name} out")


def _map(path: Path) -> MappedFile:
    if "\0" in str(path):
        raise CheckpointError(f"{shown(str(path))}: is no path (it holds a null byte); check it")
    refuse_tensorflow(path)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(
                f"{path}: a link to {shown(os.readlink(path), 200)}, which is not there; copy the file itself, as cp -L does"
            )
        raise CheckpointError(
            f"{path}: there is no such file{_beside(path)}; check the path (relative to {Path.cwd()})"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file; copy the weights into one")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); copy or download it again")
    return MappedFile(path)


def _open_file(file: MappedFile, key: str | None, trust: bool, shard: bool = False) -> Checkpoint:
    # The reader of a format is imported where a file is of that format: most programs read one.
    head = file.map[:64]
    refuse_engine_file(file.path)
    # Before all others: the first bytes are a length, and may be the magic of another format (0x0480 is a pickle's).
    if head[8:9] == b"{" and _could_be_safetensors(file, head):
        from warmstart.checkpoints.safetensors_file import open_safetensors

        return open_safetensors(file, checkpoint_key=key)
    if head.startswith(ZIP):
        return _open_zip(file, key, trust)
    if head.startswith(H5):
        from warmstart.checkpoints.hdf5.keras_file import open_h5

        return open_h5(file, checkpoint_key=key)
    if head.startswith(NPY):
        from warmstart.checkpoints.numpy_file import open_npy, read_header

        if trust and read_header(file.map[:10_012], str(file.path)).code.startswith("O"):
            return _trusted(file, "numpy npy", key)
        return open_npy(file, checkpoint_key=key)
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        from warmstart.checkpoints.torch_files.torch_legacy import open_plain_pickle, open_torch_legacy

        legacy = head.startswith(TORCH_LEGACY)
        if trust:
            return _trusted(file, "torch legacy" if legacy else "pickle", key)
        return (open_torch_legacy if legacy else open_plain_pickle)(file, checkpoint_key=key)
    if head.lstrip().startswith(b"{") and _is_index(file):
        if shard:
            raise CheckpointError(f"{file.path}: an index where a shard should be; name files of weights in the index")
        return open_sharded(
            file.path, checkpoint_key=key, open_file=lambda path: _open_file(_map(path), None, trust, shard=True)
        )
    from warmstart.checkpoints.torch_files.torch_legacy import TAR_MEMBERS, open_torch_tar, tar_members

    members = tar_members(file)
    if members is not None:
        if members.keys() >= TAR_MEMBERS:
            return _trusted(file, "torch tar", key) if trust else open_torch_tar(file, members, checkpoint_key=key)
        raise CheckpointError(
            f"{file.path}: a tar archive; unpack it first: tar xf FILE, and give the weights inside it"
        )
    refuse_tensorflow(file.path, file)
    raise _unknown(file)


def _is_index(file: MappedFile) -> bool:
    return file.path.name.endswith(INDEX_SUFFIX) or file.map.find(b'"weight_map"', 0, MAX_INDEX) >= 0


def _open_zip(file: MappedFile, key: str | None, trust: bool) -> Checkpoint:
    from warmstart.checkpoints.archive import read_directory
    from warmstart.checkpoints.torch_files.torch_file import find_pickle, open_torch_zip

    members = read_directory(file)
    folder = find_pickle(members)
    if folder is not None:
        from warmstart.checkpoints.torch_files.torchscript import is_torchscript, open_torchscript

        if is_torchscript(members, folder):
            return open_torchscript(file, members, folder, checkpoint_key=key)
        if trust:
            return _trusted(file, "torch zip", key)
        return open_torch_zip(file, members, folder, checkpoint_key=key)
    if members and all(_is_array(file, member) for member in members.values()):
        from warmstart.checkpoints.numpy_file import open_npz

        return open_npz(file, members, checkpoint_key=key)
    if KERAS_MEMBER in members:
        from warmstart.checkpoints.hdf5.keras_file import open_keras

        return open_keras(file, members[KERAS_MEMBER], checkpoint_key=key)
    names = ", ".join(shown(name, 40) for name in list(members)[:4]) or "nothing"
    raise CheckpointError(
        f"{file.path}: a zip archive of neither torch nor numpy: it holds {names}; unpack it and give the weights inside it"
    )


def _trusted(file: MappedFile, name: str, key: str | None) -> Checkpoint:
    from warmstart.checkpoints.pickled.trusting import load_trusted

    return load_trusted(file, name, key)


def _is_array(file: MappedFile, member: Member) -> bool:
    return member.name.endswith(".npy") and not member.name.endswith("/.npy")


def _could_be_safetensors(file: MappedFile, head: bytes) -> bool:
    # A header is at most 100 MB long, so the upper bytes of its length are zero; a text file's are letters.
    return head[4:8] == b"\0\0\0\0"


def _refuse_foreign(head: bytes, where: str) -> None:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise CheckpointError(f"{where}: {what}")
    if head.lstrip()[:200].lower().startswith(_HTML):
        raise CheckpointError(
            f"{where}: an HTML page, not weights: the download was answered with a web page (a login or an error); "
            "download it again from the file's own link"
        )


def _unknown(file: MappedFile) -> CheckpointError:
    head = file.map[:512]
    _refuse_foreign(head, str(file.path))
    try:
        text = head[:-4].decode("utf-8") if len(head) == 512 else head.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if text and all(c.isprintable() or c in "\r\n\t" for c in text):
        return CheckpointError(
            f"{file.path}: a text file that starts with {shown(text[:40])}, not weights; {_KNOWN}: check that the path is right"
        )
    return CheckpointError(
        f"{file.path}: an unknown format (its {file.size:,} bytes start with {head[:8].hex(' ')}); {_KNOWN}: convert it to one "
        "of them, for instance with safetensors.torch.save_file(state_dict, path)"
    )


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in list(path.parent.iterdir())[:2000]], n=3)
    return f" (did you mean {' or '.join(shown(name) for name in near)}?)" if near else ""
