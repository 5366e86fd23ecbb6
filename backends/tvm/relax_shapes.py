"""Shapes of Relax tensors, as kernels take them."""

from typing import Any

import tvm
from tvm import relax


def shape_of(value: relax.Expr) -> list[Any]:
    """The shape of a Relax tensor: ints where known, else TIR expressions."""
    return [int(d.value) if isinstance(d, tvm.tirx.IntImm) else d for d in value.ty.shape.values]


def dims(shape: list[Any]) -> tuple[int | str, ...]:
    """``shape`` as kernels take it: a symbolic dimension by name."""
    return tuple(d if isinstance(d, int) else str(d) for d in shape)
