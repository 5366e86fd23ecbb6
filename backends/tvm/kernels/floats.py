"""Float32 products: linear layers with float32 weights, and batched matrix products.

One tile emitter: rows of the left factor are broadcast against vectors of the right one, sums stay in registers. Every
output is one chain of fused multiply-adds over the reduction, in order, whatever the tile.
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
    lanes_before,
    load,
    load_partial,
    prim_func,
    product,
    row_chunks,
    static,
    store,
    store_partial,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, Isa
from t3c_compile.backends.tvm.kernels.pack import lanes_of_matrix


@dataclass(frozen=True)
class Right:
    """The right factor: ``read(column, k)`` is a float32 vector; ``overlap``: not to be read past the last column."""

    read: Callable[[Index, Index], Expr]
    overlap: bool


def tile_shape(isa: Isa, vectors: int, lanes: int, few_rows: bool = False) -> tuple[int, int]:
    """Rows and vectors of a register tile, for products ``vectors`` wide."""
    roomy = isa.registers >= 24
    # Vectors wider or narrower than the target's take more or fewer registers.
    width = min(vectors, max(1, ((8 if few_rows else 4) if roomy else 2) * isa.lanes // lanes))
    return max(1, min(12, (24 if roomy else 12) // width)), width


def multiply_tile(
    height: int,
    places: list[Index],
    lanes: int,
    inputs: Index,
    left: Callable[[int, Index], Expr],
    right: Callable[[Index, Index], Expr],
) -> list[list[Buffer]]:
    """Emit ``height`` rows times the vectors of columns at ``places``: the accumulators, by row and vector.

    ``left(row, k)`` is a scalar, ``right(place, k)`` a vector.
    """
    acc = accumulators(height, len(places), lanes, "float32")
    for line in acc:
        for cell in line:
            store(cell, 0, fill(T.float32(0), lanes), lanes)
    with T.serial(0, inputs) as k:
        values = [T.bind(right(place, k)) for place in places]
        for row, line in enumerate(acc):
            value = T.bind(fill(left(row, k), lanes))
            for cell, part in zip(line, values, strict=True):
                store(cell, 0, T.fma(value, part, load(cell, 0, lanes)), lanes)
    return acc


def float_product(
    isa: Isa,
    batch: Index,
    rows: Index,
    columns: Index,
    inputs: Index,
    left: Callable[[Index, Index], Index],
    x: Buffer,
    right: Callable[[Index], Right],
    epilogue: Callable[[Index, Index, Index, Expr], None],
    lanes: int,
) -> None:
    """Emit ``batch`` products of ``rows x columns`` over ``inputs``, in vectors of ``lanes`` columns.

    ``left(batch, row)`` is where that row of ``x`` starts. ``epilogue(batch, row, column, sums)``.
    """
    count, wide = static(rows), static(columns)
    few = count is not None and count <= 2
    if wide is None and lanes == 1:
        most, vectors = 4, 1  # columns fewer than a vector's lanes
    else:
        most, vectors = tile_shape(isa, 8 if wide is None else ceil_div(wide, lanes), lanes, few)
    width = vectors * lanes
    panels, parts = ceil_div(columns, width), row_chunks(rows)

    @for_each(batch * panels * parts, product((batch, rows, columns, inputs)))
    def _(task: Index) -> None:
        b = T.bind(task // (panels * parts))
        first = T.bind(task % parts * CHUNK_ROWS)
        column = T.bind(task // parts % panels * width)
        factor = right(b)
        places = [column + v * lanes for v in range(vectors)]
        if factor.overlap and (wide is None or wide % width):
            # A ragged last vector moves left to end at the last column: some are computed twice, none out of bounds.
            places = [T.bind(T.min(place, columns - lanes)) for place in places]
        last = T.min(first + CHUNK_ROWS, rows)

        def sweep(height: int) -> None:
            with T.serial(0, ceil_div(last - first, height)) as tile:
                row = T.bind(first + tile * height)
                starts = [T.bind(left(b, T.min(row + r, last - 1))) for r in range(height)]
                acc = multiply_tile(height, places, lanes, inputs, lambda r, k: x[starts[r] + k], factor.read)
                for r, line in enumerate(acc):

                    def finish(r: int = r, line: list[Buffer] = line) -> None:
                        for place, cell in zip(places, line, strict=True):
                            epilogue(b, row + r, place, load(cell, 0, lanes))

                    when(row + r < last, finish)

        by_rows(rows, most, sweep)


@cache
def float_linear(isa: Isa, lead: tuple[int | str, ...], inputs: int, outputs: int, has_bias: bool) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, n], weight, bias [m] if any, float32 y [*lead, m]): ``y = x @ weight.T + bias``.

    ``weight`` is float32 [m, n] packed by ``lanes_of_matrix``.
    """
    with prim_func("float_linear") as function:
        x, weight, bias, y = function.args(
            x=((*lead, inputs), "float32"),
            weight=(lanes_of_matrix((outputs, inputs), "float32").shape, "float32"),
            bias=((outputs,), "float32") if has_bias else None,
            y=((*lead, outputs), "float32"),
        )
        lanes = isa.lanes

        def read(column: Index, k: Index) -> Expr:
            # A panel's last vectors may lie past the last block; they are read from the first one and never stored.
            block = T.min(column // BLOCK, ceil_div(outputs, BLOCK) - 1)
            return load(weight, (block * inputs + k) * BLOCK + column % BLOCK, lanes)

        def epilogue(b: Index, row: Index, column: Index, total: Expr) -> None:
            def finish(valid: int) -> None:
                value = total if bias is None else total + load_partial(bias, column, lanes, valid)
                store_partial(y, row * outputs + column, value, lanes, valid)

            lanes_before(outputs, column, lanes, finish)

        def left(b: Index, row: Index) -> Index:
            return row * inputs

        rows = function.size(lead)
        float_product(isa, 1, rows, outputs, inputs, left, x, lambda b: Right(read, False), epilogue, lanes)
    return function.func


@cache
def matmul(
    isa: Isa, batch: tuple[int | str, ...], rows: tuple[int | str, ...], inputs: int | str, columns: int | str
) -> tvm.tirx.PrimFunc:
    """(float32 a [*batch, *rows, inputs], b [*batch, inputs, columns], y [*batch, *rows, columns]).

    ``t3c::matmul_f32``.
    """
    with prim_func("matmul") as function:
        a, b, y = function.args(
            a=((*batch, *rows, inputs), "float32"),
            b=((*batch, inputs, columns), "float32"),
            y=((*batch, *rows, columns), "float32"),
        )
        count, many, wide = function.size(rows), function.size((inputs,)), function.size((columns,))

        def emit(lanes: int) -> None:
            def right(n: Index) -> Right:
                base = n * (many * wide)
                return Right(lambda column, k: load(b, base + k * wide + column, lanes), True)

            def left(n: Index, row: Index) -> Index:
                return (n * count + row) * many

            def epilogue(n: Index, row: Index, column: Index, total: Expr) -> None:
                store(y, (n * count + row) * wide + column, total, lanes)

            float_product(isa, function.size(batch), count, wide, many, left, a, right, epilogue, lanes)

        known = static(wide)
        if known is None:
            when(wide >= isa.lanes, lambda: emit(isa.lanes), lambda: emit(1))
        else:
            emit(lanes_for(isa, known))
    return function.func


def lanes_for(isa: Isa, columns: int) -> int:
    """Lanes of a vector that is no wider than ``columns``."""
    return int(min(isa.lanes, 1 << (columns.bit_length() - 1)))
