"""One SHA-256 of nested values, so that what is read again can be compared with what was written."""

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def digest(value: Any) -> str:
    """Hexadecimal SHA-256 of numbers, strings and tensors in lists, tuples and mappings, in their order."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)};".encode())
        held = value.detach().cpu().contiguous()
        # Not by way of numpy: a storage that numpy has seen cannot be freed, as FSDP frees gathered parameters.
        found.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr()) if held.nbytes else b"")
    elif isinstance(value, Mapping | list | tuple):
        found.update(f"{'{' if isinstance(value, Mapping) else '['}{len(value)};".encode())
        for item in value.items() if isinstance(value, Mapping) else value:
            _add(found, item)
    else:
        found.update(f"{type(value).__name__} {value!r};".encode(errors="backslashreplace"))
