"""Says what lies in an HDF5 file: run as a program of its own, because a damaged file can crash the HDF5 library.

`python hdf5_walk.py FILE START SIZE` prints one JSON object; no dataset is read but the few bytes that lie in a header.
Nothing is imported but the standard library, numpy and h5py, so that it starts fast.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from typing import Any

import h5py
import numpy as np

MAX_NODES = 200_000
MAX_CHUNKS = 1_000_000
MAX_NAMES = 32 << 20
MAX_COMPACT = 32 << 20
MEMORY = 2 << 30

_LAYOUTS = {
    h5py.h5d.COMPACT: "compact",
    h5py.h5d.CONTIGUOUS: "contiguous",
    h5py.h5d.CHUNKED: "chunked",
    h5py.h5d.VIRTUAL: "virtual",
}


class Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: str, start: int, size: int) -> None:
        self._file = io.FileIO(path, "r")
        self._start, self._size, self._at = start, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        want = max(0, min(len(view), self._size - self._at))
        self._file.seek(self._start + self._at)
        got = self._file.readinto(view[:want]) or 0
        self._at += got
        return got

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class Walk:
    """One walk over a file's groups; what it found is in `datasets`, `groups` and `links`."""

    def __init__(self) -> None:
        self.datasets: list[dict[str, Any]] = []
        self.groups: list[list[str]] = []
        self.links: list[list[Any]] = []
        self._nodes = self._names = self._chunks = self._compact = 0

    def walk(self, root: Any) -> None:
        pending: list[tuple[Any, list[str], frozenset[int]]] = [(root, [], frozenset())]
        while pending:
            group, path, above = pending.pop()
            if hash(group) in above:
                continue  # a group that holds itself
            inside = above | {hash(group)}
            self.groups.append(path)
            below = []
            for name in group:
                here = [*path, _text(name)]
                self._count(here)
                kind = group.links.get_info(name).type
                if kind == h5py.h5l.TYPE_SOFT:
                    self.links.append([here, "soft", _text(group.links.get_val(name))])
                elif kind != h5py.h5l.TYPE_HARD:
                    self.links.append([here, "external", _text(group.links.get_val(name)[0])])
                else:
                    found = h5py.h5o.open(group, name)
                    if isinstance(found, h5py.h5g.GroupID):
                        below.append((found, here, inside))
                    elif isinstance(found, h5py.h5d.DatasetID):
                        self.datasets.append(self._dataset(h5py.Dataset(found), here))
            pending.extend(reversed(below))

    def _count(self, path: list[str]) -> None:
        self._nodes += 1
        self._names += sum(map(len, path))
        if self._nodes > MAX_NODES or self._names > MAX_NAMES:
            raise ValueError(f"more than {MAX_NODES:,} groups and datasets, or {MAX_NAMES >> 20} MiB of names")

    def _dataset(self, dataset: Any, path: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {"path": path, "shape": None, "dtype": None, "why": None}
        if dataset.shape is None:
            return {**found, "why": "empty"}
        found["shape"] = [int(n) for n in dataset.shape]
        why = _why_not(dataset.id.get_type())
        if why is not None:
            return {**found, "why": why}
        plist = dataset.id.get_create_plist()
        found["dtype"] = dataset.dtype.str
        found["layout"] = _LAYOUTS.get(plist.get_layout(), "unknown")
        if plist.get_external_count():
            found["layout"] = "external"
        elif found["layout"] == "contiguous":
            found["at"], found["size"] = dataset.id.get_offset(), int(dataset.id.get_storage_size())
        elif found["layout"] == "compact":
            found["data"] = base64.b64encode(self._read_compact(dataset)).decode("ascii")
        elif found["layout"] == "chunked":
            found["chunk"] = [int(n) for n in dataset.chunks]
            found["filters"] = [int(plist.get_filter(i)[0]) for i in range(plist.get_nfilters())]
            found["stored"] = self._stored(dataset)
        fill = dataset.fillvalue
        found["fill"] = np.asarray(0 if fill is None else fill).astype(dataset.dtype).tobytes().hex()
        return found

    def _read_compact(self, dataset: Any) -> bytes:
        # The format allows 64 KiB for data in a header.
        self._compact += dataset.id.get_storage_size()
        if dataset.size * dataset.dtype.itemsize > 1 << 16 or self._compact > MAX_COMPACT:
            raise ValueError("data in headers that are larger than a header can be")
        return np.asarray(dataset[()]).astype(dataset.dtype).tobytes()

    def _stored(self, dataset: Any) -> list[int]:
        stored: list[int] = []

        def add(info: Any) -> None:
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                raise ValueError(f"more than {MAX_CHUNKS:,} chunks")
            stored.extend(map(int, (*info.chunk_offset, info.filter_mask, info.byte_offset, info.size)))

        dataset.id.chunk_iter(add)
        return stored


def _text(name: bytes) -> str:
    # Names are bytes that need not be text.
    return name.decode("utf-8", "surrogateescape")


def _why_not(kind: Any) -> str | None:
    if isinstance(kind, h5py.h5t.TypeStringID) or (
        isinstance(kind, h5py.h5t.TypeVlenID) and isinstance(kind.get_super(), h5py.h5t.TypeStringID)
    ):
        return "string"
    if isinstance(kind, h5py.h5t.TypeOpaqueID):
        return "opaque"
    try:
        dtype = kind.dtype
        standard = h5py.h5t.py_create(dtype, logical=True).equal(kind) and kind.get_size() == dtype.itemsize
    except (TypeError, ValueError) as error:
        return f"type {error}"
    if dtype.kind not in "biufc":
        return f"dtype {dtype}"
    # Types such as bfloat16 in the file's own words are read by h5py as a wider one.
    return None if standard else f"bits {dtype}"


def main(path: str, start: int, size: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # a bound that this system does not have
    walk = Walk()
    try:
        with h5py.File(Part(path, start, size), "r") as file:
            walk.walk(file.id)
        answer = {"datasets": walk.datasets, "groups": walk.groups, "links": walk.links}
    # The library reports what is wrong with a file by any kind of exception.
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
