"""Kernels that move whole rows of any dtype: running sums along an axis, and rows written by index."""

from functools import cache

import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import Index, chunks, for_each, load, prim_func, product, store
from t3c_compile.backends.tvm.kernels.isa import Isa

Sizes = tuple[int | str, ...]


@cache
def cumsum(isa: Isa, lead: Sizes, count: int | str, inner: Sizes, dtype: str) -> tvm.tirx.PrimFunc:
    """(x, y [*lead, count, *inner] of ``dtype``): running sums along ``count``, in order."""
    with prim_func("cumsum") as function:
        x, y = function.args(x=((*lead, count, *inner), dtype), y=((*lead, count, *inner), dtype))
        (length,), width = function.dims((count,)), function.size(inner)

        @for_each(function.size(lead), product((function.size(lead), length, width)))
        def _(outer: Index) -> None:
            start = T.bind(outer * length * width)
            chunks(width, isa.lanes, lambda i, n: store(y, start + i, load(x, start + i, n), n))
            with T.serial(1, length) as k:
                row = T.bind(start + k * width)

                def add(i: Index, n: int) -> None:
                    store(y, row + i, load(y, row - width + i, n) + load(x, row + i, n), n)

                chunks(width, isa.lanes, add)

    return function.func


@cache
def index_copy(
    isa: Isa, lead: Sizes, count: int | str, written: int | str, inner: Sizes, dtype: str
) -> tvm.tirx.PrimFunc:
    """(x [*lead, count, *inner], int64 index [written], source [*lead, written, *inner], y like x).

    ``y`` is ``x`` with the rows at ``index`` taken from ``source``; of rows written twice the last stays.
    """
    with prim_func("index_copy") as function:
        x, index, source, y = function.args(
            x=((*lead, count, *inner), dtype),
            index=((written,), "int64"),
            source=((*lead, written, *inner), dtype),
            y=((*lead, count, *inner), dtype),
        )
        (length, rows), width = function.dims((count, written)), function.size(inner)

        @for_each(function.size(lead), product((function.size(lead), length, width)))
        def _(outer: Index) -> None:
            start, first = T.bind(outer * length * width), T.bind(outer * rows * width)
            chunks(length * width, isa.lanes, lambda i, n: store(y, start + i, load(x, start + i, n), n))
            with T.serial(0, rows) as k:
                row = T.bind(start + T.cast(index[k], "int64") * width)
                chunks(width, isa.lanes, lambda i, n: store(y, row + i, load(source, first + k * width + i, n), n))

    return function.func
