"""Float32 products: linear layers with float32 or int8 (weight-only) weights, and batched matrix products.

One tile emitter: rows of the left factor are broadcast against vectors of the right one, sums stay in registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    CHUNK_ROWS,
    Buffer,
    Index,
    accumulators,
    by_rows,
    ceil_div,
    fill,
    for_each,
    load,
    load_partial,
    prim_func,
    product,
    static,
    store,
    store_partial,
    top_bits,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, Isa
from t3c_compile.backends.tvm.kernels.pack import lanes_of_matrix

_REGISTERS = 24


@dataclass(frozen=True)
class Right:
    """The right factor: ``read(column, k)`` is a float32 vector; ``overlap``: not to be read past the last column."""

    read: Callable[[Index, Index], Expr]
    overlap: bool


def float_product(
    isa: Isa,
    batch: Index,
    rows: Index,
    columns: int,
    inputs: int,
    left: Callable[[Index, Index], Index],
    x: Buffer,
    right: Callable[[Index], Right],
    epilogue: Callable[[Index, Index, Index, Expr], None],
) -> None:
    """Emit ``batch`` products of ``rows x columns`` over ``inputs``.

    ``left(batch, row)`` is where that row of ``x`` starts. ``epilogue(batch, row, column, sums)``.
    """
    lanes = isa.lanes
    count = static(rows)
    few = count is not None and count <= 2
    vectors = min(ceil_div(columns, lanes), (8 if few else 4) if isa.registers >= 24 else 2)
    width = vectors * lanes
    most = min(12, (_REGISTERS if isa.registers >= 24 else isa.registers) // vectors)
    panels, row_chunks = ceil_div(columns, width), ceil_div(rows, CHUNK_ROWS)

    @for_each(batch * panels * row_chunks, product((batch, rows, columns, inputs)))
    def _(task: Index) -> None:
        b = T.bind(task // (panels * row_chunks))
        first = T.bind(task % row_chunks * CHUNK_ROWS)
        column = T.bind(task // row_chunks % panels * width)
        factor = right(b)
        places = [column + v * lanes for v in range(vectors)]
        if factor.overlap and columns % width and columns >= lanes:
            # A ragged last vector moves left to end at the last column: some are computed twice, none out of bounds.
            places = [T.bind(T.min(place, columns - lanes)) for place in places]
        last = T.min(first + CHUNK_ROWS, rows)

        def sweep(height: int) -> None:
            with T.serial(0, ceil_div(last - first, height)) as tile:
                row = T.bind(first + tile * height)
                starts = [T.bind(left(b, T.min(row + r, last - 1))) for r in range(height)]
                acc = accumulators(height, vectors, lanes, "float32")
                for line in acc:
                    for cell in line:
                        store(cell, 0, fill(T.float32(0), lanes), lanes)
                with T.serial(0, inputs) as k:
                    values = [T.bind(factor.read(place, k)) for place in places]
                    for line, start in zip(acc, starts, strict=True):
                        value = T.bind(fill(x[start + k], lanes))
                        for cell, part in zip(line, values, strict=True):
                            store(cell, 0, load(cell, 0, lanes) + value * part, lanes)
                for r, line in enumerate(acc):

                    def finish(r: int = r, line: list[Buffer] = line) -> None:
                        for place, cell in zip(places, line, strict=True):
                            epilogue(b, row + r, place, load(cell, 0, lanes))

                    when(row + r < last, finish)

        by_rows(rows, most, sweep)


@dataclass(frozen=True)
class FloatLinearSpec:
    """``y = x @ weight.T``; ``bits`` 0 for a float32 weight, else an int8 one of that width times a scale an output."""

    lead: tuple[int | str, ...]
    inputs: int
    outputs: int
    bits: int
    bias: bool


@cache
def float_linear(isa: Isa, s: FloatLinearSpec) -> tvm.tirx.PrimFunc:
    """(float32 x [..., n], packed weight, scale [m] if int8, bias [m] if any, float32 y [..., m]).

    The weight is packed by ``lanes_of_matrix``.
    """
    dtype = "int8" if s.bits else "float32"
    with prim_func("weight_only_linear" if s.bits else "float_linear") as function:
        x, weight, scale, bias, y = function.args(
            x=((*s.lead, s.inputs), "float32"),
            weight=(lanes_of_matrix((s.outputs, s.inputs), dtype).shape, dtype),
            scale=((s.outputs,), "float32") if s.bits else None,
            bias=((s.outputs,), "float32") if s.bias else None,
            y=((*s.lead, s.outputs), "float32"),
        )
        lanes = isa.lanes

        def read(column: Index, k: Index) -> Expr:
            # A panel's last vectors may lie past the last block; they are read from the first one and never stored.
            block = T.min(column // BLOCK, ceil_div(s.outputs, BLOCK) - 1)
            value = load(weight, (block * s.inputs + k) * BLOCK + column % BLOCK, lanes)
            return T.cast(top_bits(value, s.bits, lanes), vec("float32", lanes)) if s.bits else value

        def epilogue(b: Index, row: Index, column: Index, total: Expr) -> None:
            def finish(valid: int) -> None:
                value = total
                if scale is not None:
                    value = value * load_partial(scale, column, lanes, valid)
                if bias is not None:
                    value = value + load_partial(bias, column, lanes, valid)
                store_partial(y, row * s.outputs + column, value, lanes, valid)

            rest = s.outputs % lanes
            if s.outputs % (8 * lanes) == 0:
                finish(lanes)
            else:
                tail = (lambda: when(column < s.outputs, lambda: finish(rest))) if rest else None
                when(column + lanes <= s.outputs, lambda: finish(lanes), tail)

        rows = function.size(s.lead)
        float_product(
            isa, 1, rows, s.outputs, s.inputs, lambda b, row: row * s.inputs, x, lambda b: Right(read, False), epilogue
        )
    return function.func


@cache
def matmul(
    isa: Isa, batch: tuple[int | str, ...], rows: tuple[int | str, ...], inputs: int, columns: int
) -> tvm.tirx.PrimFunc:
    """(float32 a [*batch, *rows, inputs], b [*batch, inputs, columns], y [*batch, *rows, columns])."""
    with prim_func("matmul") as function:
        a, b, y = function.args(
            a=((*batch, *rows, inputs), "float32"),
            b=((*batch, inputs, columns), "float32"),
            y=((*batch, *rows, columns), "float32"),
        )
        lanes, count = isa.lanes, function.size(rows)
        valid = min(lanes, columns)

        def right(n: Index) -> Right:
            base = n * (inputs * columns)
            return Right(lambda column, k: load_partial(b, base + k * columns + column, lanes, valid), True)

        def epilogue(n: Index, row: Index, column: Index, total: Expr) -> None:
            store_partial(y, (n * count + row) * columns + column, total, lanes, valid)

        float_product(
            isa,
            function.size(batch),
            count,
            columns,
            inputs,
            lambda n, row: (n * count + row) * inputs,
            a,
            right,
            epilogue,
        )
    return function.func
