"""The weight store: a safetensors file, mapped rather than read.

The format is a length, a JSON header and the bytes (https://huggingface.co/docs/safetensors). Reading it here keeps
the runtime at numpy and TVM's runtime alone; writing it here puts tensors where they can be used as they are mapped.
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from t3c_compile.manifest import ArtifactError

_DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64}
_DTYPES |= {"F64": np.float64, "BOOL": np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


# Where tensors begin, in bytes: what vectors of compiled code may assume.
ALIGNMENT = 64


def write_store(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write ``tensors``; all whose size is a multiple of 64 bytes begin at one.

    The format has no room between tensors, so the others come last.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).data)


class Store(dict[str, np.ndarray[Any, Any]]):
    """Tensors by name, views of a mapped file. Writing to one changes this process's copy, never the file."""

    def __init__(self, mapped: mmap.mmap, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        super().__init__(tensors)
        self._mapped = mapped

    def drop_pages(self) -> None:
        """Give back the memory that reading took; what is read again comes from the file again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


def read_store(file: BinaryIO) -> Store:
    """Map an open file. Raises :class:`ArtifactError` when it is not well formed."""
    try:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = np.frombuffer(mapped, np.uint8)
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        body = data[8 + length :]
        return Store(mapped, {name: _tensor(body, **entry) for name, entry in header.items()})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        raise ArtifactError(f"{file.name} is damaged: {error}") from error


def _tensor(body: np.ndarray[Any, Any], dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray[Any, Any]:
    begin, end = data_offsets
    kind = np.dtype(_DTYPES[dtype])
    if min([begin, *shape]) < 0 or end > len(body) or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"bytes {begin} to {end} of {len(body)} are no {dtype} tensor of shape {shape}")
    return body[begin:end].view(kind).reshape(shape)
