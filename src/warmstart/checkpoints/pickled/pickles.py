"""The restricted unpickler: it resolves names of tensors, storages and containers to inert descriptions, and stubs the rest."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from typing import Final, TypeVar, cast

import torch

from warmstart.checkpoints.pickled import opcodes
from warmstart.checkpoints.pickled.refs import (
    ML_DTYPES,
    ArrayRef,
    DtypeRef,
    Inert,
    OrderedDictRef,
    Sealed,
    SetRef,
    StorageRef,
    StorageType,
    Stub,
    TensorRef,
    TorchConstant,
    Unreadable,
    integers,
)
from warmstart.errors import CheckpointError
from warmstart.showing import counted, listed

T = TypeVar("T")

MAX_STUBS = 2_000
DEEP = 20_000  # tuples in one pickle, from which on they could nest too deep for hashing on an ordinary stack
STACK = 256 << 20

_STORAGES: Final = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
    "QInt8": None,
    "QUInt8": None,
    "QInt32": None,
    "QUInt4x2": None,
    "QUInt2x4": None,
}

_UNREADABLE: Final = {
    "_rebuild_qtensor": "a quantized tensor; dequantize() it and save it again",
    "_rebuild_sparse_tensor": "a sparse tensor; call to_dense() on it and save it again",
    "_rebuild_sparse_csr_tensor": "a sparse tensor; call to_dense() on it and save it again",
    "_rebuild_nested_tensor": "a nested tensor; save its components one by one",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no data; save the model after it got its weights",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device; call cpu() on it and save it again",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device; call cpu() on it and save it again",
    "_rebuild_xla_tensor": "an XLA tensor; call cpu() on it and save it again",
    "_rebuild_wrapper_subclass": "a tensor subclass without data of its own; save plain tensors",
}
_DTENSOR: Final = "a DTensor; save it with full_tensor(), or read the folder that torch.distributed.checkpoint wrote"

# Classes whose absence no report needs to mention: containers and enums of the standard library.
_QUIET: Final = ("builtins.", "__builtin__.", "collections.", "pathlib.", "enum.", "datetime.", "copyreg.", "copy_reg.")


class Globals:
    """The names one pickle may use, and what they cost so far."""

    def __init__(self, size: int, load_bytes: Callable[[bytes], object] | None) -> None:
        self._stubs: dict[str, type[Stub]] = {}
        self._load_bytes = load_bytes
        self._allowance = 2 * size + 4096

    @property
    def stubbed(self) -> list[str]:
        return [name for name in self._stubs if not name.startswith(_QUIET)]

    def spend(self, count: int) -> None:
        # One object of the pickle can be passed to a function again and again.
        self._allowance -= count
        if self._allowance < 0:
            raise CheckpointError("it copies more bytes and entries than the pickle holds")

    def resolve(self, module: str, name: str) -> object:
        if module in {"torch", "torch.storage", "torch.cuda"} and name.endswith("Storage"):
            kind = name.removesuffix("Storage")
            if kind in _STORAGES:
                return StorageType(name, _STORAGES[kind])
        if module == "torch":
            value = getattr(torch, name, None) if name.isidentifier() and not name.startswith("_") else None
            if isinstance(value, (torch.dtype, torch.layout)):
                return TorchConstant(value)
        if module == "ml_dtypes" and name in ML_DTYPES:
            return TorchConstant(ML_DTYPES[name])
        if module in {"torch._utils", "torch._tensor"} and name in _UNREADABLE:
            reason = _UNREADABLE[name]
            return Inert(name, lambda *args: Unreadable(reason))
        if name == "DTensor" and module.startswith("torch.distributed"):
            return Inert(name, lambda *args: Unreadable(_DTENSOR))
        make = self._functions().get((module.replace("numpy._core", "numpy.core"), name))
        if make is not None:
            return Inert(f"{module}.{name}", make)
        return self._stub(f"{module}.{name}")

    def _functions(self) -> dict[tuple[str, str], Callable[..., object]]:
        if not hasattr(self, "_table"):
            self._table: dict[tuple[str, str], Callable[..., object]] = {
                ("torch._utils", "_rebuild_tensor"): _tensor,
                ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
                ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
                ("torch._utils", "_rebuild_parameter"): _first,
                ("torch._utils", "_rebuild_parameter_with_state"): _first,
                ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
                ("torch._tensor", "_rebuild_from_type"): _from_type,
                ("torch.nn.parameter", "Parameter"): _first,
                ("torch.nn.parameter", "Buffer"): _first,
                ("torch", "Size"): lambda *args: integers(args[0]) if args else (),
                ("torch", "device"): lambda *args: TorchConstant(str(args[:1])[:40]),
                ("torch.serialization", "_get_layout"): lambda *args: TorchConstant(str(args[:1])[:40]),
                ("torch.storage", "_load_from_bytes"): self._storage_from_bytes,
                ("collections", "OrderedDict"): self._ordered,
                ("collections", "defaultdict"): lambda *args: OrderedDictRef(),
                ("builtins", "set"): _set,
                ("__builtin__", "set"): _set,
                ("builtins", "frozenset"): _set,
                ("__builtin__", "frozenset"): _set,
                # Protocol 2 spells empty bytes as a call; with an argument it could ask for any amount of memory.
                ("builtins", "bytes"): lambda *args: Stub() if args else b"",
                ("__builtin__", "bytes"): lambda *args: Stub() if args else b"",
                ("copyreg", "_reconstructor"): _reconstructor,
                ("copy_reg", "_reconstructor"): _reconstructor,
                ("_codecs", "encode"): self._encode,
                ("numpy.core.multiarray", "_reconstruct"): lambda *args: ArrayRef(),
                ("numpy.core.multiarray", "scalar"): _scalar,
                ("numpy.core.numeric", "_frombuffer"): _frombuffer,
                ("numpy", "ndarray"): lambda *args: ArrayRef(),
                ("numpy", "dtype"): _dtype,
            }
        return self._table

    def _stub(self, name: str) -> type[Stub]:
        if name not in self._stubs:
            if len(self._stubs) >= MAX_STUBS:
                raise CheckpointError(f"it names more than {MAX_STUBS:,} classes")
            self._stubs[name] = cast(type[Stub], Sealed("Stub", (Stub,), {"__slots__": (), "qualified_name": name}))
        return self._stubs[name]

    def _ordered(self, *args: object) -> OrderedDictRef:
        made = OrderedDictRef()
        if args:
            if not isinstance(args[0], (dict, list, tuple)):
                raise CheckpointError("an OrderedDict made from something that is no list of pairs")
            self.spend(8 * len(args[0]))
            made.update(args[0])
        return made

    def _encode(self, *args: object) -> bytes:
        if len(args) != 2 or type(args[0]) is not str or args[1] not in {"latin1", "latin-1"}:
            raise CheckpointError("_codecs.encode for anything but latin1")
        self.spend(len(args[0]))
        return args[0].encode("latin1")

    def _storage_from_bytes(self, *args: object) -> object:
        if len(args) != 1 or type(args[0]) is not bytes or self._load_bytes is None:
            raise CheckpointError("a storage within a pickle, in a place where none is read")
        self.spend(len(args[0]))
        return self._load_bytes(args[0])


class RestrictedUnpickler(pickle.Unpickler):
    """Python's own unpickler in C, with both of its doors to the outside replaced."""

    def __init__(self, data: bytes, names: Globals, persistent: Callable[[object], object] | None) -> None:
        # Strings of Python 2 become text that can be turned back into their bytes exactly.
        self.raw = io.BytesIO(data)
        super().__init__(io.BufferedReader(self.raw, 1 << 16), encoding="utf-8", errors="surrogateescape")
        self._names = names
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> object:
        return self._names.resolve(module, name)

    def persistent_load(self, pid: object) -> object:
        if self._persistent is None:
            raise CheckpointError("a reference to a storage, in a pickle that comes without any")
        return self._persistent(pid)


def load(
    data: bytes,
    *,
    where: str,
    persistent: Callable[[object], object] | None = None,
    load_bytes: Callable[[bytes], object] | None = None,
    records: int = 0,
    extent: opcodes.Extent | None = None,
) -> tuple[object, list[str]]:
    """Build one pickle, inertly.

    Args:
        data: The pickle, exactly.
        where: File and member, for messages.
        persistent: Makes a storage of a persistent id.
        load_bytes: Makes a storage of the bytes that a tensor pickled outside `torch.save` carries.
        records: How many data records come with it.
        extent: What a scan said of it, if it was scanned already.

    Returns:
        The object, and the names of the classes that were not built.

    Raises:
        CheckpointError: It is damaged or hostile, or needs more than it may.
    """
    extent = extent or opcodes.scan(data, 0, where=where, records=records)
    names = Globals(len(data), load_bytes)
    unpickler = RestrictedUnpickler(data, names, persistent)

    def build() -> object:
        try:
            return unpickler.load()
        # A hostile stream can make the unpickler raise anything; all of it means the same.
        except Exception as error:
            text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{where}: cannot be read as a pickle (near byte {unpickler.raw.tell():,} of {len(data):,}): "
                f"{text[:300].encode('unicode_escape').decode('ascii')}; nothing of it was executed: get the file again "
                "from where it came, or pass trust_pickle=True if you trust it"
            ) from error

    result = build() if extent.tuples < DEEP else _with_deep_stack(build)
    return result, names.stubbed


def stub_note(names: list[str]) -> list[str]:
    """The note that says which classes were not built; empty if there are none."""
    unique = sorted(set(names))
    if not unique:
        return []
    verb = "was" if len(unique) == 1 else "were"
    return [f"{counted(len(unique), 'class')} {verb} not built: {listed(unique).replace(chr(39), '')}"]


def _with_deep_stack(work: Callable[[], T]) -> T:
    # Hashing a tuple recurses in C without a check: on a normal stack a long enough chain of tuples kills the process.
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    before = threading.stack_size(STACK)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _tensor(*args: object, dtype: torch.dtype | None = None, flags: object = None) -> object:
    if len(args) < 4:
        raise CheckpointError("a tensor with too few arguments")
    storage, offset, shape, stride = args[:4]
    if isinstance(storage, Unreadable):
        return storage
    if type(storage) is not StorageRef or type(offset) is not int:
        raise CheckpointError("a tensor without a storage")
    conjugate = negative = False
    if type(flags) is dict:
        conjugate, negative = bool(flags.get("conj")), bool(flags.get("neg"))
    return TensorRef(storage, dtype or storage.dtype, offset, integers(shape), integers(stride), conjugate, negative)


def _tensor_v2(*args: object) -> object:
    return _tensor(*args, flags=args[6] if len(args) > 6 else None)


def _tensor_v3(*args: object) -> object:
    dtype = args[6].value if len(args) > 6 and type(args[6]) is TorchConstant else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            "a tensor of a dtype that this torch does not have; install the version that wrote the file"
        )
    return _tensor(*args, dtype=dtype, flags=args[7] if len(args) > 7 else None)


def _first(*args: object) -> object:
    if not args or not isinstance(args[0], (TensorRef, Unreadable)):
        return Stub()
    return args[0]


def _from_type(*args: object) -> object:
    if len(args) < 3 or type(args[0]) is not Inert or type(args[2]) is not tuple:
        return Stub()
    if args[0].make in {_from_type, _first, _set}:
        raise CheckpointError("a tensor subclass within a tensor subclass")
    return args[0](*args[2])


def _set(*args: object) -> SetRef:
    made = SetRef()
    if args and type(args[0]) is list:
        made.sequence = args[0]
    return made


def _reconstructor(*args: object) -> object:
    cls = args[0] if args else None
    made = cls() if isinstance(cls, type) and issubclass(cls, Stub) else Stub()
    if len(args) > 2 and type(args[2]) is dict:
        made.entries = args[2]
    return made


def _dtype(*args: object) -> DtypeRef:
    # In a pickle, unlike on disk, the types of ml_dtypes are spelled by their class.
    if args and type(args[0]) is TorchConstant and args[0].value in ML_DTYPES.values():
        return DtypeRef(str(args[0].value).removeprefix("torch."))
    if not args or type(args[0]) is not str or len(args[0]) > 16:
        raise CheckpointError("a numpy dtype without a plain code")
    return DtypeRef(args[0].lstrip("<>|="))


def _scalar(*args: object) -> ArrayRef:
    if len(args) != 2:
        raise CheckpointError("a numpy scalar without its bytes")
    if type(args[0]) is DtypeRef and args[0].is_object:
        return ArrayRef.of((), args[0], False, [args[1]])
    return ArrayRef.of((), args[0], False, args[1])


def _frombuffer(*args: object) -> object:
    if len(args) not in {4, 5}:
        raise CheckpointError("a numpy array with a damaged description")
    if args[3] not in {"C", "F"} or (len(args) == 5 and args[4] is not None):
        return Unreadable("a numpy array with transposed axes; save numpy.ascontiguousarray() of it")
    return ArrayRef.of(args[2], args[1], args[3] == "F", args[0])
