"""TorchScript archives: the parameters and buffers of a program, without running a line of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from warmstart.checkpoints.archive import Member, inflate
from warmstart.checkpoints.files import MappedFile
from warmstart.checkpoints.leaves import LeafCheckpoint
from warmstart.checkpoints.pickled import pickles
from warmstart.checkpoints.pickled.building import build_checkpoint
from warmstart.checkpoints.pickled.refs import Stub, TensorRef, Unreadable
from warmstart.checkpoints.torch_files.torch_file import unpickle
from warmstart.checkpoints.walking import MAX_DEPTH, MAX_NODES, type_name
from warmstart.errors import CheckpointError

MAX_SOURCE: Final = 16 << 20
MAX_DECLARED: Final = 200_000

_CLASS: Final = re.compile(
    r"^class (?P<name>\w+)(?P<module>\(Module\):\n  __parameters__ = (?P<parameters>\[[^\n]*\])\n"
    r"(?:  __buffers__ = (?P<buffers>\[[^\n]*\])\n)?)?",
    re.MULTILINE,
)
_STRING: Final = re.compile(r'"([^"\n]*)"')


def is_torchscript(members: dict[str, Member], folder: str) -> bool:
    """Whether a torch archive holds a program."""
    return f"{folder}constants.pkl" in members or any(name.startswith(f"{folder}code/") for name in members)


def open_torchscript(
    file: MappedFile, members: dict[str, Member], folder: str, *, checkpoint_key: str | None
) -> LeafCheckpoint:
    """Open a file of `torch.jit.save` as the state dict of its module.

    Raises:
        CheckpointError: It is damaged or hostile, or its module has no parameters and buffers (a frozen program).
    """
    content, stubbed, place = unpickle(file, members, folder)
    if not isinstance(content, Stub) or type(content.state) is not dict:
        raise CheckpointError(
            f"{file.path}: a TorchScript archive of {type_name(content)}, not of a module; save a scripted module: "
            "torch.jit.script(model).save(path)"
        )
    entries = dict(_entries(content, _Declarations(file, members, folder), str(file.path)))
    if not entries:
        raise CheckpointError(
            f"{file.path}: a TorchScript program without parameters: it was frozen, which makes its weights constants of its "
            "code; take the file from before torch.jit.freeze, or the model's own weights"
        )
    return build_checkpoint(
        entries,
        file,
        format="TorchScript",
        checkpoint_key=checkpoint_key,
        place=place,
        notes=pickles.stub_note(
            [name for name in stubbed if not name.startswith(("__torch__.", "torch.jit._pickle."))]
        ),
    )


class _Declarations:
    """What the classes of the program's code declare: which of a module's tensors are in its state dict."""

    def __init__(self, file: MappedFile, members: dict[str, Member], folder: str) -> None:
        self._file = file
        self._members = members
        self._folder = folder
        self._known: dict[str, dict[str, frozenset[str] | None]] = {}
        self._source_room = MAX_SOURCE
        self._room = MAX_DECLARED

    def of(self, qualified: str) -> frozenset[str] | None:
        """Names of parameters and buffers; None where the class declares none of it: then every tensor is taken."""
        module, _, name = qualified.rpartition(".")
        return self._module(module).get(name)

    def _module(self, module: str) -> dict[str, frozenset[str] | None]:
        if module not in self._known:
            member = self._members.get(f"{self._folder}code/{module.replace('.', '/')}.py")
            self._known[module] = self._read(member) if member is not None else {}
        return self._known[module]

    def _read(self, member: Member) -> dict[str, frozenset[str] | None]:
        self._source_room -= member.size
        if self._source_room < 0:
            raise self._too_much(f"{MAX_SOURCE >> 20} MiB of code")
        text = inflate(self._file, member).decode("utf-8", "replace")
        declared: dict[str, frozenset[str] | None] = {}
        for match in _CLASS.finditer(text):
            self._spend()
            # A class that is no module has attributes, never an entry of a state dict.
            declared[match["name"]] = self._names(match) if match["module"] else frozenset()
        return declared

    def _names(self, match: re.Match[str]) -> frozenset[str] | None:
        lists = match["parameters"] + (match["buffers"] or "")
        # Programs of the first versions do not say which attributes are buffers.
        if match["buffers"] is None or "\\" in lists:
            return None
        names = set()
        for string in _STRING.finditer(lists):
            self._spend()
            names.add(string[1])
        return frozenset(names)

    def _spend(self) -> None:
        self._room -= 1
        if self._room < 0:
            raise self._too_much(f"{MAX_DECLARED:,} classes and names of parameters")

    def _too_much(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: a TorchScript archive with more than {what}; save the state dict alone: "
            'torch.save(model.state_dict(), "weights.pt")'
        )


def _entries(root: Stub, declared: _Declarations, location: str) -> Iterator[tuple[str, object]]:
    pending: list[tuple[str, Stub, frozenset[int]]] = [("", root, frozenset())]
    steps = 0
    while pending:
        prefix, stub, above = pending.pop()
        state = stub.state
        if type(state) is not dict or id(stub) in above:
            continue
        steps += 1 + len(state)
        if steps > MAX_NODES or len(above) > 10 * MAX_DEPTH or len(prefix) > 1 << 20:
            raise CheckpointError(
                f"{location}: a TorchScript module that is nested without end; save its state dict alone: "
                'torch.save(model.state_dict(), "weights.pt")'
            )
        names = declared.of(type(stub).qualified_name)
        inside = above | {id(stub)}
        below: list[tuple[str, Stub, frozenset[int]]] = []
        for name, value in state.items():
            if type(name) is not str:
                continue
            if isinstance(value, (TensorRef, Unreadable)):
                if names is None or name in names:
                    yield prefix + name, value
            elif isinstance(value, Stub) and type(value).qualified_name.startswith("__torch__."):
                below.append((f"{prefix}{name}.", value, inside))
        pending += reversed(below)
