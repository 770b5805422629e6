"""Which tree of a source holds the weights: the only one there is, or the one that was asked for, never a guess."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from warmstart.checkpoints.walking import Branch, Raw, Walker, clean_versions, is_optimizer, is_optimizer_name
from warmstart.errors import CheckpointError
from warmstart.showing import counted, listed, shown

MAX_NAME_BYTES: Final = 64 << 20
MAX_SHOWN: Final = 20

_CONTAINER: Final = re.compile(
    r"state_dicts?|state_dict_.*|.*_state_dict|models?|modules?|model_states?|model_state_.*|model_weights|model_dict"
    r"|nets?|networks?|weights|params|parameters|variables|(teacher|student|generator|discriminator)(_model)?|net[gd]"
    r"|averaged|swa|swa_model|best_model|(?!.*(schema|semant)).*ema.*",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree that was taken.

    Attributes:
        key: Its dotted path, None for the whole source.
        tensors: Its tensors by dotted name, in the source's order.
        versions: A state dict's `_metadata`.
        notes: What was left out.
    """

    key: str | None
    tensors: dict[str, Raw]
    versions: dict[str, dict[str, object]]
    notes: list[str]


@dataclass(slots=True)
class _Candidate:
    path: str
    branch: Branch
    apart: list[Branch] = field(default_factory=list)
    scalars_apart: bool = False

    def items(self) -> Iterator[tuple[str, Raw]]:
        return _flat(self.branch, "", self.apart, self.scalars_apart)


def take_tree(source: object, *, location: str, checkpoint_key: str | None) -> Tree:
    """The one tree of weights in a source, or the one that `checkpoint_key` names.

    Raises:
        CheckpointError: There is none, there are several, or it is an optimizer's state.
    """
    if is_optimizer(source):
        raise CheckpointError(
            f"{location}: is an optimizer's state, not weights; save the model's: torch.save(model.state_dict(), path)"
        )
    root = Walker(location).walk(source)
    candidates = _candidates(root, "")
    if any(_ndim(raw) for candidate in candidates for _, raw in candidate.items()):
        candidates = [c for c in candidates if any(_ndim(raw) for _, raw in c.items())]
    if checkpoint_key is not None:
        chosen = _Candidate(checkpoint_key, _resolve(root, checkpoint_key, candidates, location))
    elif len(candidates) == 1:
        chosen = candidates[0]
    elif candidates:
        raise CheckpointError(
            f"{location}: holds {counted(len(candidates), 'tree')} of tensors; say which one to take, with one of:\n"
            + _menu(candidates)
        )
    else:
        raise CheckpointError(f"{location}: holds no weights; {_what_there_is(root)}")
    tensors = _collect(chosen, location)
    if not tensors:
        raise CheckpointError(
            f"{location}: {shown(chosen.path) if chosen.path else 'the source'} holds no tensors; {_ways(candidates, root)}"
        )
    return Tree(chosen.path or None, tensors, clean_versions(chosen.branch.versions), _notes(root, chosen))


def _candidates(branch: Branch, path: str) -> list[_Candidate]:
    kids = {
        name: child
        for name, child in branch.children.items()
        if isinstance(child, Branch) and child.role == "tree" and child.tensors
    }
    direct = [raw for raw in branch.children.values() if not isinstance(raw, Branch)]
    aside = [
        found
        for name, child in branch.children.items()
        if isinstance(child, Branch) and child.role == "aside" and name == "callbacks"
        for found in _averages(child, _join(path, name))
    ]
    if any(_ndim(raw) for raw in direct):
        apart = {name: kid for name, kid in kids.items() if _is_container(name)}
        own = _Candidate(path, branch, [*apart.values(), *_not_weights(branch)])
        return [own, *_below(apart, path), *aside]
    if not kids:
        return [_Candidate(path, branch), *aside] if direct else aside
    if any(_stands_alone(name, kid) for name, kid in kids.items()):
        return [*_below(kids, path), *aside]
    return [_Candidate(path, branch, _not_weights(branch), scalars_apart=True), *aside]


def _below(kids: dict[str, Branch], path: str) -> list[_Candidate]:
    return [found for name, kid in kids.items() for found in _candidates(kid, _join(path, name))]


def _averages(branch: Branch, path: str) -> list[_Candidate]:
    # A callback's state is a tree only if it is shaped like a model: an average of the weights.
    tensors = [(name, raw) for name, raw in branch.children.items() if not isinstance(raw, Branch)]
    wide = [name for name, raw in tensors if _ndim(raw)]
    if len(wide) > 1 or any("." in name for name in wide):
        return [_Candidate(path, branch)]
    return [
        found
        for name, child in branch.children.items()
        if isinstance(child, Branch) and child.role != "optimizer"
        for found in _averages(child, _join(path, name))
    ]


def _stands_alone(name: str, branch: Branch) -> bool:
    if _is_container(name):
        return True
    for key, child in branch.children.items():
        if isinstance(child, Branch):
            if child.role == "tree" and child.tensors and _stands_alone(key, child):
                return True
        elif "." in key:
            return True
    return False


def _is_container(name: str) -> bool:
    return len(name) < 200 and _CONTAINER.fullmatch(name) is not None


def _not_weights(branch: Branch) -> list[Branch]:
    return [child for child in branch.children.values() if isinstance(child, Branch) and child.role != "tree"]


def _resolve(root: Branch, key: str, candidates: list[_Candidate], location: str) -> Branch:
    if key == "":
        return root
    found = _find(root, key)
    if (isinstance(found, Branch) and found.role == "optimizer") or (found is None and _in_optimizer(root, key)):
        raise CheckpointError(
            f"{location}: {shown(key)} is an optimizer's state, not weights; {_ways(candidates, root)}"
        )
    if isinstance(found, Branch):
        return found
    if found is not None:
        raise CheckpointError(f"{location}: {shown(key)} is one tensor, not a tree; {_ways(candidates, root)}")
    near = difflib.get_close_matches(key[:200], [path for path in _paths(root, "") if len(path) < 200][:5000], n=3)
    hint = f" (did you mean {' or '.join(shown(name) for name in near)}?)" if near else ""
    raise CheckpointError(f"{location}: there is no tree {shown(key)}{hint}; {_ways(candidates, root)}")


def _find(branch: Branch, key: str) -> Branch | Raw | None:
    if key in branch.children:
        return branch.children[key]
    fitting = [name for name in branch.children if key.startswith(name + ".")]
    for name in sorted(fitting, key=len, reverse=True):
        child = branch.children[name]
        if isinstance(child, Branch):
            found = _find(child, key[len(name) + 1 :])
            if found is not None:
                return found
    return None


def _in_optimizer(branch: Branch, key: str) -> bool:
    for name, child in branch.children.items():
        if isinstance(child, Branch) and key.startswith(name + "."):
            return child.role == "optimizer" or _in_optimizer(child, key[len(name) + 1 :])
    return is_optimizer_name(key) and any(
        is_optimizer_name(name) and key.startswith(name + ".") for name in branch.others
    )


def _paths(branch: Branch, path: str) -> Iterator[str]:
    for name, child in branch.children.items():
        if isinstance(child, Branch) and child.role != "optimizer" and child.tensors:
            yield _join(path, name)
            yield from _paths(child, _join(path, name))


def _flat(branch: Branch, prefix: str, apart: list[Branch], scalars_apart: bool = False) -> Iterator[tuple[str, Raw]]:
    for name, child in branch.children.items():
        if not isinstance(child, Branch):
            if not scalars_apart:
                yield prefix + name, child
        elif child.role != "optimizer" and not any(child is other for other in apart):
            yield from _flat(child, f"{prefix}{name}.", [])


def _collect(chosen: _Candidate, location: str) -> dict[str, Raw]:
    tensors: dict[str, Raw] = {}
    room = MAX_NAME_BYTES
    for name, raw in chosen.items():
        room -= len(name)
        if room < 0:
            raise CheckpointError(
                f"{location}: its names take more than {MAX_NAME_BYTES >> 20} MiB; save it with shorter ones"
            )
        if name in tensors:
            raise CheckpointError(
                f"{location}: two keys are both spelled {shown(name)}; rename one of them and save the file again"
            )
        tensors[name] = raw
    return tensors


def _notes(root: Branch, chosen: _Candidate) -> list[str]:
    notes = []
    if chosen.branch.other_count:
        one = "1 entry is not a tensor and was"
        many = f"{chosen.branch.other_count:,} entries are not tensors and were"
        notes.append(f"{one if chosen.branch.other_count == 1 else many} left out: {listed(chosen.branch.others)}")
    if chosen.scalars_apart:
        scalars = [name for name, child in chosen.branch.children.items() if not isinstance(child, Branch)]
        if scalars:
            notes.append(f"single numbers beside the tree were left out: {listed(scalars)}")
    if chosen.branch is not root:
        scalars = [n for n, c in root.children.items() if not isinstance(c, Branch) and not _ndim(c)]
        if scalars:
            notes.append(f"single numbers beside the tree were left out: {listed(scalars)}")
    states = [name for name, child in root.children.items() if isinstance(child, Branch) and child.role == "optimizer"]
    if states:
        notes.append(f"an optimizer's state was left out: {listed(states)}")
    aside = [n for n, c in root.children.items() if isinstance(c, Branch) and c.role == "aside" and c.tensors]
    if aside and not chosen.path.startswith(tuple(aside)):
        notes.append(f"not weights by their name, left out: {listed(aside)}")
    return notes


def _ways(candidates: list[_Candidate], root: Branch) -> str:
    return "take one of:\n" + _menu(candidates) if candidates else _what_there_is(root)


def _menu(candidates: list[_Candidate]) -> str:
    lines = []
    for candidate in candidates[:MAX_SHOWN]:
        # The empty path takes everything as one tree, the other candidates included.
        whole = _flat(candidate.branch, "", []) if candidate.path == "" else candidate.items()
        raws = [raw for _, raw in whole]
        elements = sum(math.prod(raw.shape) for raw in raws)
        quoted = shown(candidate.path, 200)[1:-1].replace('"', '\\"')
        lines.append(f'  checkpoint_key="{quoted}"  ({counted(len(raws), "tensor")}, {counted(elements, "element")})')
    if len(candidates) > MAX_SHOWN:
        lines.append(f"  and {len(candidates) - MAX_SHOWN:,} more")
    return "\n".join(lines)


def _what_there_is(root: Branch) -> str:
    paths = list(_paths(root, ""))
    if paths:
        lines = "\n".join(f'  checkpoint_key="{shown(path, 200)[1:-1]}"' for path in paths[:MAX_SHOWN])
        return f"tensors lie only where weights usually do not; if they are, take one of:\n{lines}"
    names = [*root.children, *root.others]
    inside = f"it holds {listed(names, 8)}" if names else "it is empty"
    return f'{inside}; save the weights: torch.save(model.state_dict(), "weights.pt")'


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _ndim(raw: Raw) -> int:
    return len(raw.shape)
