"""A node of an ONNX graph, and the two kinds of value that go along its edges: tensors, and numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t3c_compile.passes.errors import T3CError

Numbers = np.ndarray[Any, Any]
"""Sizes, and what follows from sizes and constants: Python or symbolic numbers in an array of objects."""

Function = Callable[..., Any]
"""Takes the node, then its inputs (None where one is left out); gives its output or a tuple of them."""


class UnsupportedOnnxError(T3CError):
    """An ONNX file cannot be read, or says something that has no torch form here."""


@dataclass(frozen=True)
class OnnxNode:
    """A node with its attributes as Python values; ``opset`` is the graph's."""

    op_type: str
    name: str
    opset: int
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def refusal(self, what: str) -> UnsupportedOnnxError:
        return UnsupportedOnnxError(f"{self}: {what} has no torch form here: export the model without it")

    def __str__(self) -> str:
        return f"ONNX node {self.name!r} ({self.op_type}, opset {self.opset})"


def to_numbers(values: Any) -> Numbers:
    """A number, a flat list of numbers or an array of them as :data:`Numbers`."""
    if isinstance(values, np.ndarray):
        return values.astype(object)
    found = np.empty(len(values) if isinstance(values, list) else (), object)
    if isinstance(values, list):
        for index, value in enumerate(values):
            found[index] = value
    else:
        found[()] = values
    return found


def to_list(values: Numbers | None) -> list[Any]:
    """The numbers as a flat list."""
    return [] if values is None else values.reshape(-1).tolist()


def is_static(values: Numbers | None) -> bool:
    """Whether no number is symbolic."""
    return all(type(value) in (int, float, bool) for value in to_list(values))


def to_tensor(value: Any) -> Tensor:
    """A tensor as it is; numbers as a tensor of int64, float32 or bool."""
    if not isinstance(value, np.ndarray):
        return value  # type: ignore[no-any-return]
    numbers = to_list(value)
    if is_static(value):
        kind = type(numbers[0]) if numbers else int
        dtype = {bool: torch.bool, int: torch.int64, float: torch.float32}[kind]
        return torch.tensor(numbers, dtype=dtype).reshape(value.shape)
    return torch.stack([torch.scalar_tensor(number, dtype=torch.int64) for number in numbers]).reshape(value.shape)
