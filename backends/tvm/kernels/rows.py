"""Kernels over the last axis, a row at a time: softmax and layer norm."""

from collections.abc import Callable
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels import vmath
from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    chunks,
    fill,
    for_each,
    load,
    prim_func,
    product,
    store,
)
from t3c_compile.backends.tvm.kernels.isa import Isa


def reduce_row(
    lanes: int, count: Index, start: float, read: Callable[[Index, int], Expr], join: Callable[[Expr, Expr], Expr]
) -> Expr:
    """``join`` over ``count`` elements, kept in a vector until the end."""
    wide = T.alloc_buffer((lanes,), "float32")
    result = T.alloc_buffer((1,), "float32")
    store(wide, 0, fill(T.float32(start), lanes), lanes)
    T.buffer_store(result, T.float32(start), [0])

    def step(i: Index, n: int) -> None:
        if n == lanes:
            store(wide, 0, join(load(wide, 0, lanes), read(i, lanes)), lanes)
        else:
            T.buffer_store(result, join(result[0], read(i, 1)), [0])

    chunks(count, lanes, step)
    for lane in range(lanes):
        T.buffer_store(result, join(result[0], wide[lane]), [0])
    return result[0]


def softmax_row(lanes: int, count: Index, x: Buffer, y: Buffer, source: Index, target: Index) -> None:
    """Softmax of ``count`` elements of ``x`` at ``source`` to ``y`` at ``target``; a row of -inf gives zeros."""
    low = -3.402823466e38
    top = T.bind(T.max(reduce_row(lanes, count, low, lambda i, n: load(x, source + i, n), T.max), T.float32(low)))

    def exponential(i: Index, n: int) -> None:
        store(y, target + i, vmath.exp(load(x, source + i, n) - fill(top, n), n), n)

    chunks(count, lanes, exponential)
    total = reduce_row(lanes, count, 0.0, lambda i, n: load(y, target + i, n), lambda a, b: a + b)
    inverse = T.bind(T.float32(1.0) / T.max(total, T.float32(1e-38)))
    chunks(count, lanes, lambda i, n: store(y, target + i, load(y, target + i, n) * fill(inverse, n), n))


@cache
def softmax(isa: Isa, lead: tuple[int | str, ...], count: int) -> tvm.tirx.PrimFunc:
    """(float32 x, y [*lead, count]): softmax over the last axis."""
    with prim_func("softmax") as function:
        x, y = function.args(x=((*lead, count), "float32"), y=((*lead, count), "float32"))
        rows = function.size(lead)

        @for_each(rows, product((rows, count, 8)))
        def _(row: Index) -> None:
            softmax_row(isa.lanes, count, x, y, row * count, row * count)

    return function.func


@cache
def layer_norm(isa: Isa, lead: tuple[int | str, ...], count: int, epsilon: float) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, count], gamma [count], beta [count], y like x): over the last axis, biased variance."""
    with prim_func("layer_norm") as function:
        x, gamma, beta, y = function.args(
            x=((*lead, count), "float32"),
            gamma=((count,), "float32"),
            beta=((count,), "float32"),
            y=((*lead, count), "float32"),
        )
        rows, lanes = function.size(lead), isa.lanes

        @for_each(rows, product((rows, count, 4)))
        def _(row: Index) -> None:
            start = T.bind(row * count)
            total = reduce_row(lanes, count, 0.0, lambda i, n: load(x, start + i, n), lambda a, b: a + b)
            mean = T.bind(total * T.float32(1 / count))

            def squared(i: Index, n: int) -> Expr:
                difference = load(x, start + i, n) - fill(mean, n)
                return difference * difference

            variance = reduce_row(lanes, count, 0.0, squared, lambda a, b: a + b) * T.float32(1 / count)
            gain = T.bind(T.float32(1.0) / T.sqrt(variance + T.float32(epsilon)))

            def normalize(i: Index, n: int) -> None:
                value = (load(x, start + i, n) - fill(mean, n)) * fill(gain, n)
                store(y, start + i, value * load(gamma, i, n) + load(beta, i, n), n)

            chunks(count, lanes, normalize)

    return function.func
