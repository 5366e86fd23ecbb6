"""The int8 row-by-column product every quantized linear layer is made of.

Activations lie row-major as int8 (or uint8 with 128 added, where the dot product wants it), weights in the ``quads``
layout. A tile of rows x vectors of int32 accumulators stays in registers for the whole reduction. Because activations
carry an offset, each tile starts from ``-offset * sum(weights)``, summed once per panel by the same dot instruction:
that holds for any rank prefix and any width, and needs nothing stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    CHUNK_ROWS,
    Buffer,
    Index,
    accumulators,
    by_rows,
    ceil_div,
    chunks,
    fill,
    for_each,
    int32,
    load,
    product,
    row_chunks,
    static,
    store,
    top_bits,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa
from t3c_compile.backends.tvm.kernels.tile import Tile

# store(row, column, valid lanes, int32 sums)
Epilogue = Callable[[Index, Index, int, Expr], None]

SPARE_ROWS = 16  # rows past the end that a tile may read


@dataclass(frozen=True)
class Product:
    """``rows x columns`` over ``inputs``; ``stored_inputs`` is the packed buffer's full reduction length."""

    rows: Index
    columns: int
    inputs: int
    stored_inputs: int
    zero_point: Index
    bits: int


def row_stride(inputs: int) -> int:
    """Bytes a row of prepared activations."""
    return ceil_div(inputs, BLOCK) * BLOCK


def prepare_rows(isa: Isa, x: Buffer, rows: Index, inputs: int) -> Buffer:
    """Copy int8 ``x`` [rows, inputs] to the form ``multiply`` reads: offset added, rows padded."""
    stride, lanes = row_stride(inputs), isa.lanes * QUAD
    prepared = T.alloc_buffer(((rows + SPARE_ROWS) * stride,), isa.activation_dtype)

    def convert(value: Expr, n: int) -> Expr:
        if not isa.unsigned:
            return value
        return T.reinterpret(vec("uint8", n), value) ^ fill(T.uint8(128), n)

    @for_each(rows, product((rows, inputs)))
    def _(row: Index) -> None:
        chunks(
            inputs, lanes, lambda i, n: store(prepared, row * stride + i, convert(load(x, row * inputs + i, n), n), n)
        )
        if inputs % QUAD:
            with T.serial(0, QUAD - inputs % QUAD) as i:
                T.buffer_store(prepared, T.cast(0, isa.activation_dtype), [row * stride + inputs + i])

    return prepared


def weight_words(isa: Isa, weights: Buffer, index: Index, bits: int) -> Expr:
    """A vector of weight words at byte ``index``, rounded to ``bits``."""
    lanes = isa.lanes * QUAD
    return T.bind(top_bits(load(weights, index, lanes), bits, lanes))


def spread_word(isa: Isa, buffer: Buffer, index: Index) -> Expr:
    """The four bytes at ``index`` in every lane."""
    word = T.reinterpret("int32", load(buffer, index, QUAD))
    return T.reinterpret(vec(buffer.dtype, isa.lanes * QUAD), T.broadcast(word, isa.lanes))


def weight_sums(
    isa: Isa, weights: Buffer, at: Callable[[int, Index, Index], Index], taps: int, quads: int, vectors: int, bits: int
) -> list[Buffer]:
    """Per lane sums of the weight words ``at(vector, tap, quad)``, one small int32 buffer a vector."""
    lanes = isa.lanes
    sums = accumulators(1, vectors, lanes, "int32")[0]
    ones = fill(T.cast(1, isa.activation_dtype), lanes * QUAD)
    for total in sums:
        store(total, 0, fill(T.int32(0), lanes), lanes)
    with T.serial(0, taps) as tap, T.serial(0, quads) as k:
        for v, total in enumerate(sums):
            word = weight_words(isa, weights, at(v, tap, k), bits)
            store(total, 0, isa.dot(load(total, 0, lanes), ones, word), lanes)
    return sums


def rows_for(isa: Isa, vectors: int) -> int:
    """Rows of a register tile ``vectors`` wide."""
    return min(12, isa.registers // vectors)


def default_tile(isa: Isa) -> Tile:
    """The tile of a product that was not tuned."""
    return Tile(rows_for(isa, isa.panel()), isa.panel(), CHUNK_ROWS)


def multiply(isa: Isa, p: Product, tile: Tile, activations: Buffer, weights: Buffer, epilogue: Epilogue) -> None:
    """Emit the product; ``epilogue`` gets each vector of ``sum((x - zero_point) * weight)``."""
    width = tile.vectors * isa.lanes
    whole, rest = divmod(p.columns, width)
    panels = ceil_div(p.columns, width)
    parts = row_chunks(p.rows, tile.chunk)

    @for_each(panels * parts, product((p.rows, p.columns, p.inputs)))
    def _(task: Index) -> None:
        panel = T.bind(task // parts)
        first = T.bind((task % parts) * tile.chunk)

        def emit(columns: int) -> None:
            _panel(isa, p, tile, activations, weights, epilogue, panel * width, columns, first)

        if whole and rest:
            when(panel < whole, lambda: emit(width), lambda: emit(rest))
        else:
            emit(width if whole else rest)


def _panel(
    isa: Isa,
    p: Product,
    tile: Tile,
    activations: Buffer,
    weights: Buffer,
    epilogue: Epilogue,
    column: Index,
    columns: int,
    first: Index,
) -> None:
    lanes, stride = isa.lanes, row_stride(p.inputs)
    vectors = ceil_div(columns, lanes)
    block_bytes = ceil_div(p.stored_inputs, QUAD) * BLOCK * QUAD
    quads = ceil_div(p.inputs, QUAD)
    offset = isa.offset + p.zero_point

    def at(v: int, tap: Index, k: Index) -> Index:
        lane = column + v * lanes
        return (lane // BLOCK) * block_bytes + k * (BLOCK * QUAD) + (lane % BLOCK) * QUAD

    sums = weight_sums(isa, weights, at, 1, quads, vectors, p.bits) if static(offset) != 0 else None
    count = static(p.rows)
    last = T.min(first + tile.chunk, p.rows) if count is None or count > tile.chunk else count

    def sweep(rows: int) -> None:
        with T.serial(0, ceil_div(last - first, rows)) as number:
            row = T.bind(first + number * rows)
            acc = accumulators(rows, vectors, lanes, "int32")
            for line in acc:
                for v, cell in enumerate(line):
                    start = T.int32(0) if sums is None else load(sums[v], 0, lanes)
                    store(
                        cell, 0, fill(start, lanes) if sums is None else start * fill(int32(-1 * offset), lanes), lanes
                    )
            with T.serial(0, quads) as k:
                words = [weight_words(isa, weights, at(v, 0, k), p.bits) for v in range(vectors)]
                for r, line in enumerate(acc):
                    x = T.bind(spread_word(isa, activations, (row + r) * stride + k * QUAD))
                    for cell, word in zip(line, words, strict=True):
                        store(cell, 0, isa.dot(load(cell, 0, lanes), x, word), lanes)
            for r, line in enumerate(acc):

                def finish(r: int = r, line: list[Buffer] = line) -> None:
                    for v, cell in enumerate(line):
                        epilogue(row + r, column + v * lanes, min(lanes, columns - v * lanes), load(cell, 0, lanes))

                always = count is not None and count % rows == 0 and tile.chunk % rows == 0
                when(True if always else row + r < last, finish)

    # The last panel may be narrower than the others.
    by_rows(p.rows, tile.rows if vectors == tile.vectors else rows_for(isa, vectors), sweep, tile.chunk)
