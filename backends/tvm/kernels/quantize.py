"""``t3c::quantize_int8`` and ``t3c::dequantize_int8``: element-wise, any shape, dynamic dimensions allowed."""

from collections.abc import Callable
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Index,
    Shape,
    ceil_div,
    chunks,
    fill,
    float32,
    for_each,
    load,
    prim_func,
    store,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import Isa

# Elements a task: small enough to share out, large enough to pay for the hand-over.
_TASK = 16384


def _elementwise(
    name: str, shape: Shape, source: str, result: str, lanes: int, convert: Callable[[Expr, int], Expr]
) -> tvm.tirx.PrimFunc:
    with prim_func(name) as function:
        total = function.size(shape)
        x, y = function.args(x=(shape, source), y=(shape, result))

        def block(start: Index, count: Index) -> None:
            chunks(count, lanes, lambda i, n: store(y, start + i, convert(load(x, start + i, n), n), n))

        @for_each(ceil_div(total, _TASK), total)
        def _(task: Index) -> None:
            start = T.bind(task * _TASK)
            when(start + _TASK <= total, lambda: block(start, _TASK), lambda: block(start, total - start))

    return function.func


@cache
def quantize(isa: Isa, shape: Shape, scale: float, zero_point: int) -> tvm.tirx.PrimFunc:
    """(float32 x, int8 y), both ``shape``: ``clamp(rint(x * float32(1 / scale)) + zero_point, -128, 127)``."""

    def convert(x: Expr, lanes: int) -> Expr:
        # Clamping before the cast keeps huge inputs defined.
        q = T.nearbyint(x * fill(float32(1.0 / scale), lanes)) + fill(T.float32(zero_point), lanes)
        q = T.max(T.min(q, fill(T.float32(127), lanes)), fill(T.float32(-128), lanes))
        return T.cast(T.cast(q, vec("int32", lanes)), vec("int8", lanes))

    return _elementwise("quantize", shape, "float32", "int8", isa.lanes, convert)


@cache
def dequantize(isa: Isa, shape: Shape, scale: float, zero_point: int) -> tvm.tirx.PrimFunc:
    """(int8 q, float32 y), both ``shape``: ``(q - zero_point) * scale``."""

    def convert(q: Expr, lanes: int) -> Expr:
        value = T.cast(q, vec("float32", lanes)) - fill(T.float32(zero_point), lanes)
        return value * fill(float32(scale), lanes)

    return _elementwise("dequantize", shape, "int8", "float32", isa.lanes, convert)
