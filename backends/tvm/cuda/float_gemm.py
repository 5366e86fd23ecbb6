"""Float32 products: matrix products, linear layers with float32 or integer weights, attention in float32.

Every output is one chain of fused multiply-adds over the reduction, in order, in one thread, so tensor cores have no
part in it; tiles of both factors are shared by a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.cuda.threads import barrier, grid
from t3c_compile.backends.tvm.kernels.emit import Index, ceil_div, prim_func, static, top_bits, when
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer

_STEP = 16  # of the reduction, and threads along a side of a block
_COLUMNS = 64

# left(batch, row, k) and right(batch, k, column) give factors; epilogue(batch, row, column, sum) takes sums.
Factor = Callable[[Index, Index, Index], Expr]
Epilogue = Callable[[Index, Index, Index, Expr], None]


def float_product(
    batch: Index,
    rows: Index,
    columns: Index,
    inputs: Index,
    left: Factor,
    right: Factor,
    epilogue: Epilogue,
    right_along_inputs: bool = False,
) -> None:
    """Emit ``batch`` products. ``right_along_inputs``: the right factor lies along the reduction."""
    known = static(rows)
    height = 1 if known is not None and known <= 16 else 4
    tile, width, threads = height * _STEP, _COLUMNS // _STEP, _STEP * _STEP
    down, across = ceil_div(rows, tile), ceil_div(columns, _COLUMNS)
    with grid([down, across, batch], threads) as (row_block, column_block, b, thread):
        first, column = T.bind(row_block * tile), T.bind(column_block * _COLUMNS)
        a_tile = T.alloc_buffer((_STEP * (tile + 1),), "float32", scope="shared")
        b_tile = T.alloc_buffer((_STEP * (_COLUMNS + 1),), "float32", scope="shared")
        sums = T.alloc_buffer((height * width,), "float32", scope="local")
        with T.unroll(0, height * width) as i:
            T.buffer_store(sums, T.float32(0), [i])
        down_thread, across_thread = T.bind(thread // _STEP), T.bind(thread % _STEP)
        with T.serial(0, ceil_div(inputs, _STEP)) as step:
            with T.serial(0, tile * _STEP // threads) as n:
                place = T.bind(n * threads + thread)
                line, k = T.bind(place // _STEP), T.bind(place % _STEP)
                row, where = T.bind(first + line), T.bind(step * _STEP + k)
                value = T.if_then_else(T.And(row < rows, where < inputs), left(b, row, where), T.float32(0))
                T.buffer_store(a_tile, value, [k * (tile + 1) + line])
            with T.serial(0, _COLUMNS * _STEP // threads) as n:
                place = T.bind(n * threads + thread)
                if right_along_inputs:
                    line, k = T.bind(place // _STEP), T.bind(place % _STEP)
                else:
                    line, k = T.bind(place % _COLUMNS), T.bind(place // _COLUMNS)
                at, where = T.bind(column + line), T.bind(step * _STEP + k)
                value = T.if_then_else(T.And(at < columns, where < inputs), right(b, where, at), T.float32(0))
                T.buffer_store(b_tile, value, [k * (_COLUMNS + 1) + line])
            barrier()
            left_over = T.min(_STEP, inputs - step * _STEP)
            with T.serial(0, left_over) as k, T.unroll(0, height) as r, T.unroll(0, width) as c:
                x = a_tile[k * (tile + 1) + r * _STEP + down_thread]
                y = b_tile[k * (_COLUMNS + 1) + c * _STEP + across_thread]
                T.buffer_store(sums, T.fma(x, y, sums[r * width + c]), [r * width + c])
            barrier()
        with T.unroll(0, height) as r, T.unroll(0, width) as c:
            row, at = T.bind(first + r * _STEP + down_thread), T.bind(column + c * _STEP + across_thread)
            when(T.And(row < rows, at < columns), lambda: epilogue(b, row, at, sums[r * width + c]))


@cache
def matmul(
    batch: tuple[int | str, ...], rows: tuple[int | str, ...], inputs: int | str, columns: int | str
) -> tvm.tirx.PrimFunc:
    """(float32 a [*batch, *rows, inputs], b [*batch, inputs, columns], y [*batch, *rows, columns])."""
    with prim_func("cuda_matmul") as function:
        a, b, y = function.args(
            a=((*batch, *rows, inputs), "float32"),
            b=((*batch, inputs, columns), "float32"),
            y=((*batch, *rows, columns), "float32"),
        )
        count, many, wide = function.size(rows), function.size((inputs,)), function.size((columns,))
        float_product(
            function.size(batch),
            count,
            wide,
            many,
            lambda n, row, k: a[(n * count + row) * many + k],
            lambda n, k, column: b[(n * many + k) * wide + column],
            lambda n, row, column, total: T.buffer_store(y, total, [(n * count + row) * wide + column]),
        )
    return function.func


@dataclass(frozen=True)
class FloatLayerSpec:
    """``x @ weight.T`` for float32 x [*lead, inputs] and weights [stored, inputs], or [inputs, stored] where ``along``
    outputs; float32, or int8 rounded to ``bits``. Then ``* scale`` and ``+ bias`` where there are, fused where both."""

    lead: tuple[int | str, ...]
    inputs: int
    outputs: int
    weight: tuple[int, ...]
    bits: int = 0
    along_outputs: bool = False
    scale: int = 0
    bias: bool = False
    finish: Finish = PLAIN


@cache
def float_layer(s: FloatLayerSpec) -> tvm.tirx.PrimFunc:
    """(x, weight, scale [``scale``] if any, bias [outputs] if any, ``finish``)."""
    with prim_func("cuda_float_layer") as function:
        x, weight, scale, bias, *ends = function.args(
            x=((*s.lead, s.inputs), "float32"),
            weight=(s.weight, "int8" if s.bits else "float32"),
            scale=((s.scale,), "float32") if s.scale else None,
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((*s.lead, s.outputs)),
        )
        writer = Writer(s.finish, ends)

        def right(_: Index, k: Index, column: Index) -> Expr:
            value = weight[k * s.weight[1] + column] if s.along_outputs else weight[column * s.weight[1] + k]
            return T.cast(top_bits(value, s.bits, 1), "float32") if s.bits else value

        def epilogue(_: Index, row: Index, column: Index, total: Expr) -> None:
            if scale is not None:
                total = total * scale[column] if bias is None else T.fma(total, scale[column], bias[column])
            elif bias is not None:
                total = total + bias[column]
            writer.put(row * s.outputs + column, total, 1)

        def left(_: Index, row: Index, k: Index) -> Expr:
            return x[row * s.inputs + k]

        rows = function.size(s.lead)
        float_product(1, rows, s.outputs, s.inputs, left, right, epilogue, not s.along_outputs)
    return function.func
