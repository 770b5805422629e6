"""Models of the Hugging Face hub: only the files that are needed are fetched, into the hub's own cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Final

from warmstart.checkpoints.base import Checkpoint
from warmstart.checkpoints.folders.folder import Choice, choose
from warmstart.checkpoints.folders.sharded import INDEX_SUFFIX, read_index
from warmstart.checkpoints.places import HubPlace, Snapshot, snapshot_of
from warmstart.errors import CheckpointError
from warmstart.showing import listed, shown

_DEFAULT: Final = "main"


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model's files, on this machine.

    Attributes:
        place: What was asked for, with the path of the file that was chosen.
        snapshot: The commit that they are of.
        notes: What was left aside, and whether the hub was asked.
    """

    place: HubPlace
    snapshot: Snapshot
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.snapshot.folder / self.place.path


def open_hub(place: HubPlace, *, open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Open a model of the hub.

    Args:
        place: The model, and the file or folder of it.
        open_file: Opens the file or index that was fetched.

    Raises:
        CheckpointError: The hub has no such model, revision or file, does not let us have it, or cannot be reached and the
            cache does not hold it; or as `open_file`.
    """
    fetched = fetch(place)
    checkpoint = open_file(fetched.path)
    checkpoint.location = fetched.place.spelled(revision=fetched.snapshot.commit)
    checkpoint.notes = (*checkpoint.notes, *fetched.notes)
    return checkpoint


def fetch(place: HubPlace) -> Fetched:
    """Bring a model's files into the cache: the index first, then the shards it names; nothing else.

    Raises:
        CheckpointError: As `open_hub`.
    """
    hub = _import_hub(place)
    try:
        info = hub.HfApi().model_info(place.repo, revision=place.revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:  # the hub's own errors are of a dozen types, and of three HTTP libraries
        if _is_answer(hub, error):
            raise _in_words(hub, place, error) from error
        return _from_cache(hub, place, error)
    chosen, choice = _choose(place, names)
    try:
        # Asked for by the name of the revision, so that the cache learns it and can answer offline.
        first = hub.hf_hub_download(place.repo, chosen.path, revision=place.revision)
        snapshot = snapshot_of(Path(first))
        assert snapshot is not None
        shards = _shards(snapshot, chosen)
        if shards:
            patterns = [name.replace("[", "[[]") for name in shards]
            hub.snapshot_download(place.repo, revision=snapshot.commit, allow_patterns=patterns)
    except CheckpointError:
        raise
    except Exception as error:
        raise _in_words(hub, chosen, error) from error
    return Fetched(chosen, snapshot, _notes(choice, shards))


def _from_cache(hub: ModuleType, place: HubPlace, cause: Exception) -> Fetched:
    root = Path(hub.constants.HF_HUB_CACHE) / f"models--{place.repo.replace('/', '--')}"
    revision = place.revision or _DEFAULT
    ref = root / "refs" / revision
    offline = isinstance(cause, hub.errors.OfflineModeIsEnabled)
    why = "the hub was not asked, HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({_short(cause)})"
    fix = "unset HF_HUB_OFFLINE" if offline else "check the network (a proxy, HF_ENDPOINT)"
    fix += f", or fetch it where there is a network: hf download {place.repo}"
    fix += f" --revision {place.revision}" if place.revision else ""
    snapshot = Snapshot(root, ref.read_text().strip() if ref.is_file() else revision)
    if ".." in Path(snapshot.commit).parts or not snapshot.folder.is_dir():
        raise CheckpointError(
            f"{place.spelled()}: {why}, and the cache {hub.constants.HF_HUB_CACHE} does not hold it; {fix}{_also_local(place)}"
        ) from cause
    names = [
        found.relative_to(snapshot.folder).as_posix() for found in sorted(snapshot.folder.rglob("*")) if found.is_file()
    ]
    try:
        chosen, choice = _choose(place, names)
        shards = _shards(snapshot, chosen)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{why}, and this is what the cache holds of it; {fix}") from cause
    missing = [name for name in shards if name not in names]
    if missing:
        raise CheckpointError(
            f"{chosen.spelled()}: {why}, and the cache lacks {listed(missing)} of its {len(shards)} shards; {fix}"
        ) from cause
    return Fetched(chosen, snapshot, (*_notes(choice, shards), f"taken from the cache: {why}"))


def _choose(place: HubPlace, names: list[str]) -> tuple[HubPlace, Choice]:
    """The file of the model to take: the one that was named, or the one that its folder's names tell."""
    if place.path in names:
        return place, Choice(place.path, (), ())
    prefix = f"{place.path}/" if place.path else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not inside and place.path:
        raise CheckpointError(
            f"{place.spelled()}: the model {place.repo} has no file or folder {shown(place.path)}; it has {listed(names, 12)}"
        )
    flat = [name for name in inside if "/" not in name]
    try:
        choice = choose(flat, where=place.spelled(), spell=lambda name: place.spelled(prefix + name))
    except CheckpointError as error:
        folders = sorted({name.partition("/")[0] for name in inside if "/" in name})
        beside = f'; its folders are {listed(folders, 8)}: give one as subfolder="{folders[-1]}"' if folders else ""
        raise CheckpointError(
            f"{error}{beside or '; give another model, or the path of a file: hf://org/name/FILE'}"
        ) from None
    return replace(place, path=prefix + choice.main), choice


def _shards(snapshot: Snapshot, chosen: HubPlace) -> list[str]:
    if not chosen.path.endswith(INDEX_SUFFIX):
        return []
    folder = chosen.path.rpartition("/")[0]
    names = sorted(set(read_index(snapshot.folder / chosen.path).values()))
    return [f"{folder}/{name}" if folder else name for name in names]


def _notes(choice: Choice, shards: list[str]) -> tuple[str, ...]:
    taken = {name.rpartition("/")[2] for name in shards}
    other = [name for name in (*choice.others, *choice.strays) if name not in taken]
    return (f"of the model's files, {choice.main} was taken and not {listed(other)}",) if other else ()


def _import_hub(place: HubPlace) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{place.spelled()}: models of the hub are fetched with huggingface_hub, which is not installed; install it with: "
            f"pip install 'warmstart[hub]'{_also_local(place)}"
        ) from error
    return huggingface_hub


def _is_answer(hub: ModuleType, error: Exception) -> bool:
    """Whether the hub said no, as opposed to nothing at all."""
    errors = hub.errors
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)):
        return True
    return 400 <= (_status(error) or 0) < 500 and _status(error) not in {408, 429}


def _in_words(hub: ModuleType, place: HubPlace, error: Exception) -> CheckpointError:
    errors = hub.errors
    name = place.spelled()
    if isinstance(error, errors.GatedRepoError):
        what = (
            f"is a gated model, whose terms are to be accepted first: open {hub.constants.ENDPOINT}/{place.repo}, accept them, "
            "and log in here: hf auth login"
        )
    elif isinstance(error, errors.RepositoryNotFoundError) or _status(error) == 401:
        what = (
            f"the hub has no model {shown(place.repo)}, or it is private; check the name, or log in: hf auth login"
            f"{_also_local(place)}"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        what = (
            f"the model {place.repo} has no revision {shown(place.revision or _DEFAULT)}; give a branch, tag or commit of it, "
            "or leave it out"
        )
    elif isinstance(error, errors.LocalEntryNotFoundError):
        what = (
            "the hub stopped answering and the cache does not hold the file; check the network and start again: what was "
            "fetched is kept"
        )
    elif isinstance(error, errors.EntryNotFoundError):
        what = f"the model {place.repo} has no file {shown(place.path)} any more; it was changed just now: start again"
    elif isinstance(error, errors.HFValidationError):
        what = f"is no name of a model ({_short(error)}); write org/name{_also_local(place)}"
    elif isinstance(error, OSError) and error.errno is not None and _status(error) is None:
        what = (
            f"cannot be fetched into the cache {hub.constants.HF_HUB_CACHE}: {error.strerror or _short(error)}; make room or "
            "choose another folder with HF_HOME"
        )
    else:
        what = f"cannot be fetched from the hub ({_short(error)}); check the network and start again: what was fetched is kept"
    return CheckpointError(f"{name}: {what}")


def _also_local(place: HubPlace) -> str:
    here = f"{place.repo}@{place.revision}" if place.revision else place.repo
    return f"; if a path was meant: there is no {shown(here)} in {Path.cwd()}"


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _short(error: Exception) -> str:
    status = _status(error)
    text = str(error).strip().partition("\n")[0][:160]
    return (
        f"HTTP {status}" if status is not None else f"{type(error).__name__}: {text}" if text else type(error).__name__
    )
