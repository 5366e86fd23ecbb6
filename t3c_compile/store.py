"""Reading the weight store: a safetensors file, mapped rather than read.

The format is a length, a JSON header and the bytes (https://huggingface.co/docs/safetensors); reading it here keeps
the runtime at numpy and TVM's runtime alone.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.manifest import ArtifactError

_DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64}
_DTYPES |= {"F64": np.float64, "BOOL": np.bool_}


def read_store(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors by name, read-only views of the mapped file. Raises :class:`ArtifactError` when it is not well formed."""
    data = np.memmap(path, np.uint8, mode="r")
    try:
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        start = 8 + length
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = data[start + begin : start + end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return tensors
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
