"""Max pooling: the greatest of a window's rows in whole vectors, then of its columns."""

from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Index,
    ceil_div,
    chunks,
    fill,
    float32,
    for_each,
    load,
    prim_func,
    product,
    store,
)
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.window import Window

_LEAST = float("-inf")


@cache
def max_pool2d(isa: Isa, lead: tuple[int | str, ...], window: Window, out: tuple[int, int]) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, H, W], y [*lead, *out]); no dilation, so that every window holds a pixel.

    ``out`` may be greater than ``window.out`` by one (``ceil_mode``).
    """
    (height, width), (kh, kw), (sy, sx) = window.size, window.kernel, window.stride
    top, left = window.padding
    lanes = isa.lanes
    blocks = ceil_div(out[1], lanes)
    # The last vector of columns may reach past the last window.
    columns = max(left + width, (blocks * lanes - 1) * sx + kw)
    with prim_func("max_pool2d") as function:
        x, y = function.args(x=((*lead, height, width), "float32"), y=((*lead, *out), "float32"))
        planes = function.size(lead)

        @for_each(planes, product((planes, height, width, kw)))
        def _(plane: Index) -> None:
            row = T.alloc_buffer((columns,), "float32")
            maxima = T.alloc_buffer((blocks * lanes,), "float32")
            with T.serial(0, columns) as i:
                T.buffer_store(row, float32(_LEAST), [i])
            with T.serial(0, out[0]) as line:
                # A row outside the image is as good as the nearest one in it, which the window holds.
                rows = [T.bind(T.max(T.min(line * sy + ky - top, height - 1), 0)) for ky in range(kh)]

                def read(i: Index, n: int, rows: list[Index] = rows, plane: Index = plane) -> Expr:
                    value = load(x, (plane * height + rows[0]) * width + i, n)
                    for other in rows[1:]:
                        value = T.max(value, load(x, (plane * height + other) * width + i, n))
                    return value

                chunks(width, lanes, lambda i, n: store(row, left + i, read(i, n), n))
                with T.serial(0, blocks) as block:
                    best = fill(float32(_LEAST), lanes)
                    for kx in range(kw):
                        at = block * (lanes * sx) + kx
                        best = T.max(best, row[T.ramp(at, sx, lanes)])
                    store(maxima, block * lanes, best, lanes)
                start = (plane * out[0] + line) * out[1]
                chunks(out[1], lanes, lambda i, n: store(y, start + i, load(maxima, i, n), n))

    return function.func
