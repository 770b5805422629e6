"""What the files of each format start with, or are called: enough to choose a reader before any reader is imported."""

from __future__ import annotations

from typing import Final

ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06")
H5: Final = b"\x89HDF\r\n\x1a\n"
NPY: Final = b"\x93NUMPY"
TORCH_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
KERAS_MEMBER: Final = "model.weights.h5"
DCP_METADATA: Final = ".metadata"
