"""What a pickle may build here: inert descriptions of storages, tensors and arrays, and stubs for everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch

from warmstart.errors import CheckpointError


class Sealed(type):
    """A class whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError("a pickle may not change a class")

    def __delattr__(cls, name: str) -> None:
        raise TypeError("a pickle may not change a class")


class Inert:
    """What a global of a pickle resolves to: called with its arguments, it describes what the real one would make."""

    __slots__ = ("make", "name")
    name: str
    make: Callable[..., object]

    def __init__(self, name: str, make: Callable[..., object]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "make", make)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a pickle may not change a global")

    def __call__(self, *args: object) -> object:
        return self.make(*args)


class TorchConstant:
    """A dtype, layout or device, by name."""

    __slots__ = ("value",)
    value: object

    def __init__(self, value: object) -> None:
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a pickle may not change a constant")


class StorageType:
    """A storage class: the dtype its elements have, or None where torch has no plain dtype for them."""

    __slots__ = ("dtype", "name")
    name: str
    dtype: torch.dtype | None

    def __init__(self, name: str, dtype: torch.dtype | None) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a pickle may not change a class")


class OrderedDictRef(dict[Any, Any], metaclass=Sealed):
    """An `OrderedDict`, with the one attribute of it that matters: a state dict's `_metadata`."""

    __slots__ = ("versions",)
    versions: object

    def __new__(cls, *args: object) -> OrderedDictRef:
        self = super().__new__(cls)
        self.versions = None
        return self

    def __setstate__(self, state: object) -> None:
        if type(state) is dict:
            self.versions = state.get("_metadata")


class Stub(metaclass=Sealed):
    """An object whose class is not built: it keeps what was put into it and does nothing."""

    __slots__ = ("entries", "sequence", "state")
    qualified_name: ClassVar[str] = ""
    entries: dict[object, object] | None
    sequence: list[object] | None
    state: object

    def __new__(cls, *args: object, **kwargs: object) -> Stub:
        self = object.__new__(cls)
        self.entries = self.sequence = self.state = None
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> Stub:
        return type(self)()

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        if self.entries is None:
            self.entries = {}
        self.entries[key] = value

    def append(self, value: object) -> None:
        if self.sequence is None:
            self.sequence = []
        self.sequence.append(value)

    def extend(self, values: list[object]) -> None:
        if self.sequence is None:
            self.sequence = []
        self.sequence.extend(values)

    def add(self, value: object) -> None:
        self.append(value)


class SetRef(Stub):
    """A set, kept as the list it was made from, so that nothing is hashed."""

    __slots__ = ()


class Unreadable:
    """A tensor of a kind that has no plain bytes here: fine to pass by, an error to take."""

    __slots__ = ("reason",)
    reason: str
    shape: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, reason: str) -> None:
        object.__setattr__(self, "reason", reason)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a pickle may not change a tensor")

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """A storage, by the name it has in its file, or by its bytes where the pickle holds them."""

    dtype: torch.dtype
    key: str
    numel: int
    data: bytes | None = None
    start: int = 0
    swapped: bool = False

    # A frozen dataclass with slots would get a __setstate__ that sets any field to anything.
    def __setstate__(self, state: object) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor: a storage and the layout over it. `dtype` may differ from the storage's."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conjugate: bool = False
    negative: bool = False

    def __setstate__(self, state: object) -> None:
        pass


class DtypeRef:
    """A numpy dtype: its code, then its byte order."""

    __slots__ = ("code", "order", "plain")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "="
        self.plain = True

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, itemsize, alignment, flags[, metadata])
        if type(state) is not tuple or len(state) < 8 or state[1] not in {"<", ">", "=", "|"}:
            raise CheckpointError("a numpy dtype with a damaged description")
        self.order = state[1]
        self.plain = state[2] is None and state[3] is None and state[4] is None
        # Strings and voids carry their length here, and datetimes their unit: none of them is a weight.
        if self.code in {"S0", "U0", "V0", "S", "U", "V"} and type(state[5]) is int:
            self.code = f"{self.code[0]}{max(state[5], 0)}"

    @property
    def is_object(self) -> bool:
        return self.code in {"O", "O8", "O4"}


class ArrayRef:
    """A numpy array: raw bytes, or a list where its elements are objects."""

    __slots__ = ("data", "dtype", "fortran", "shape")
    shape: tuple[int, ...]
    dtype: DtypeRef | None
    fortran: bool
    data: bytes | bytearray | list[object]

    def __init__(self) -> None:
        self.shape, self.dtype, self.fortran, self.data = (0,), None, False, b""

    @classmethod
    def of(cls, shape: object, dtype: object, fortran: bool, data: object) -> ArrayRef:
        self = cls()
        self.__setstate__((1, shape, dtype, fortran, data))
        return self

    def __setstate__(self, state: object) -> None:
        if type(state) is tuple and len(state) == 4:
            state = (1, *state)
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not DtypeRef:
            raise CheckpointError("a numpy array with a damaged description")
        _, shape, dtype, fortran, data = state
        if type(data) is str:
            # Python 2 strings are decoded without loss, so that they can be turned back.
            data = data.encode("utf-8", "surrogateescape")
        if type(data) not in {bytes, bytearray, list}:
            raise CheckpointError("a numpy array whose data is neither bytes nor a list")
        if (type(data) is list) is not dtype.is_object:
            raise CheckpointError("a numpy array whose data does not fit its dtype")
        self.shape, self.dtype, self.fortran, self.data = integers(shape), dtype, bool(fortran), data


def integers(value: object) -> tuple[int, ...]:
    """A tuple of plain integers that fit a tensor's sizes.

    Raises:
        CheckpointError: It is anything else.
    """
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        raise CheckpointError("a shape that is not a short tuple of integers")
    if value and not ({*map(type, value)} == {int} and min(value) > -(1 << 62) and max(value) < 1 << 62):
        raise CheckpointError("a shape with entries that are not integers of at most 62 bits")
    return tuple(value)


NUMPY_DTYPES: Final = {
    "b1": torch.bool,
    "?": torch.bool,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}

# Extension types of ml_dtypes that torch has too; numpy itself calls them void once they are on disk.
ML_DTYPES: Final = {
    name: getattr(torch, name)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
}


def torch_dtype(code: str) -> torch.dtype | None:
    """The torch dtype of a numpy type code such as `f4`, or of a name of ml_dtypes; None if torch has none."""
    return NUMPY_DTYPES.get(code) or ML_DTYPES.get(code)


def why_not(code: str) -> str:
    """Why a numpy dtype is not read, in words."""
    kind = code[:1]
    if kind == "V":
        return (
            "numpy spells bfloat16 and float8 arrays of ml_dtypes as raw void, which does not say which of them it was; "
            "save them as float32, or as safetensors"
        )
    if kind in "SUa":
        return "strings are no weights"
    if kind in "Mm":
        return "dates and times are no weights"
    if kind == "O":
        return "Python objects are no weights"
    return "torch has no such dtype; save the array as float64 or complex128"


def numpy_code(dtype: np.dtype[Any]) -> str:
    """A numpy dtype's type code without its byte order: `f4`, `u2`, `V2`."""
    return dtype.str.lstrip("<>|=")
