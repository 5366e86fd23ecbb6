"""One SHA-256 of nested values, so that what is read again can be compared with what was written."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """Hexadecimal SHA-256 of numbers, strings and tensors in lists, tuples and mappings, in their order."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)};".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping | list | tuple):
        found.update(f"{'{' if isinstance(value, Mapping) else '['}{len(value)};".encode())
        for item in value.items() if isinstance(value, Mapping) else value:
            _add(found, item)
    else:
        found.update(f"{type(value).__name__} {value!r};".encode(errors="backslashreplace"))
