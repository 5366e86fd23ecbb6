"""Kernels in which each thread makes one result: max pooling, running sums, rows written by index."""

from functools import cache

import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.cuda.threads import for_each_thread
from t3c_compile.backends.tvm.kernels.emit import Index, prim_func, product
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.window import Window

Sizes = tuple[int | str, ...]


@cache
def max_pool2d(
    batch: int | str,
    channels: int,
    window: Window,
    out: tuple[int, int],
    finish: Finish = PLAIN,
    dtype: str = "float32",
) -> tvm.tirx.PrimFunc:
    """(x [N, H, W, C], ``finish`` of [N, *out, C]); no dilation, so that every window holds a pixel.

    Images of another ``dtype`` than float32 are written as they are.
    """
    shape = (batch, *out, channels)
    (height, width), (kh, kw), (sy, sx) = window.size, window.kernel, window.stride
    with prim_func("cuda_max_pool2d") as function:
        x, *ends = function.args(x=((batch, height, width, channels), dtype), **finish.arguments(shape, dtype))
        writer = Writer(finish, ends)

        @for_each_thread(function.size(shape))
        def _(task: Index) -> None:
            channel, pixel = T.bind(task % channels), T.bind(task // channels)
            line = T.bind(pixel // out[1])
            top = T.bind(line % out[0] * sy - window.padding[0])
            left = T.bind(pixel % out[1] * sx - window.padding[1])
            best = T.alloc_buffer((1,), dtype, scope="local")
            least = T.float32(float("-inf")) if dtype == "float32" else tvm.tirx.min_value(dtype)
            T.buffer_store(best, least, [0])
            with T.serial(0, kh) as ky, T.serial(0, kw) as kx:
                # A row or column outside the image is as good as the nearest one in it, which the window holds.
                row = T.bind(T.max(T.min(top + ky, height - 1), 0))
                column = T.bind(T.max(T.min(left + kx, width - 1), 0))
                at = ((line // out[0] * height + row) * width + column) * channels + channel
                T.buffer_store(best, T.max(best[0], x[at]), [0])
            writer.put(task, best[0], 1)

    return function.func


@cache
def cumsum(lead: Sizes, count: int | str, inner: Sizes, dtype: str) -> tvm.tirx.PrimFunc:
    """(x, y [*lead, count, *inner] of ``dtype``): running sums along ``count``, in order."""
    with prim_func("cuda_cumsum") as function:
        x, y = function.args(x=((*lead, count, *inner), dtype), y=((*lead, count, *inner), dtype))
        (length,), width = function.dims((count,)), function.size(inner)

        @for_each_thread(product((function.size(lead), width)))
        def _(task: Index) -> None:
            start = T.bind(task // width * length * width + task % width)
            total = T.alloc_buffer((1,), dtype, scope="local")
            T.buffer_store(total, T.cast(0, dtype), [0])
            with T.serial(0, length) as k:
                T.buffer_store(total, total[0] + x[start + k * width], [0])
                T.buffer_store(y, total[0], [start + k * width])

    return function.func


@cache
def index_copy(lead: Sizes, count: int | str, written: int | str, inner: Sizes, dtype: str) -> tvm.tirx.PrimFunc:
    """(x [*lead, count, *inner], int64 index [written], source [*lead, written, *inner], y like x).

    ``y`` is ``x`` with the rows at ``index`` taken from ``source``; of rows written twice the last stays.
    """
    with prim_func("cuda_index_copy") as function:
        x, index, source, y = function.args(
            x=((*lead, count, *inner), dtype),
            index=((written,), "int64"),
            source=((*lead, written, *inner), dtype),
            y=((*lead, count, *inner), dtype),
        )
        (length, rows), width = function.dims((count, written)), function.size(inner)

        @for_each_thread(product((function.size(lead), length, width)))
        def _(task: Index) -> None:
            outer, row = T.bind(task // (length * width)), T.bind(task // width % length)
            T.buffer_store(y, x[task], [task])
            with T.serial(0, rows) as k, T.If(T.cast(index[k], "int64") == T.cast(row, "int64")), T.Then():
                T.buffer_store(y, source[(outer * rows + k) * width + task % width], [task])

    return function.func
