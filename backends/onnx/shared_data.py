"""The one file of weights that all profiles read: a tensor, or first rows of one already there, is not written twice.

ONNX gives an external tensor an offset and a length, so a profile's factors can be the first bytes of a greater
profile's. What is stored already is compared with the file itself; nothing is assumed to be nested.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

_ALIGNMENT = 64

Array = np.ndarray[Any, Any]


class SharedData:
    """Writes ``path`` as tensors come; the longest of those that share bytes must come first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        # By name: the offsets and lengths of what was written for it.
        self._placed: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> "SharedData":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def rows(self, name: str, array: Array, bits: int = 8) -> ir.ExternalTensor:
        """``array``, which may be the first rows of one that came under ``name`` before; INT4 where ``bits`` is 4."""
        data = _packed(array) if bits == 4 else array.reshape(-1).view(np.uint8)
        # The last half byte of an odd number of 4-bit integers belongs to the row that follows in a longer tensor.
        whole = array.size // 2 if bits == 4 else len(data)
        offset = self._find(name, data, whole)
        dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.from_numpy(array.dtype)
        return ir.ExternalTensor(
            self._path.name,
            self._write(name, data) if offset is None else offset,
            len(data),
            dtype,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )

    def whole(self, array: Array) -> ir.ExternalTensor:
        """``array``, which is shared where its content is the same."""
        return self.rows(hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest(), array)

    def _find(self, name: str, data: Array, whole: int) -> int | None:
        self._file.flush()
        for offset, length in self._placed.get(name, []):
            if length >= len(data):
                stored = np.memmap(self._path, np.uint8, "r", offset, len(data))
                if np.array_equal(stored[:whole], data[:whole]):
                    return offset
        return None

    def _write(self, name: str, data: Array) -> int:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        data.tofile(self._file)
        self._placed.setdefault(name, []).append((offset, len(data)))
        return offset


def _packed(array: Array) -> Array:
    """Two 4-bit integers a byte, the first one in the low half."""
    flat = array.reshape(-1).astype(np.uint8) & 15
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[::2] | flat[1::2] << 4
