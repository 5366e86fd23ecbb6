"""Each channel alone with its window: lanes are channels, one widened product a tap."""

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    CHUNK_ROWS,
    Buffer,
    Index,
    accumulators,
    ceil_div,
    fill,
    for_each,
    int32,
    load,
    product,
    store,
    top_bits,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, Isa
from t3c_compile.backends.tvm.kernels.product import Epilogue, Rows

_PIXELS = 8  # a tile, for which a tap's weights are read once


def depthwise(
    isa: Isa, rows: Index, channels: int, x: Rows, weights: Buffer, zero_point: Index, bits: int, epilogue: Epilogue
) -> None:
    """``rows`` pixels of ``channels``; ``weights`` are packed by ``lanes_of_depthwise``."""
    lanes, taps = isa.lanes, x.kernel[0] * x.kernel[1]
    work = product((rows, channels, taps))

    @for_each(ceil_div(rows, CHUNK_ROWS), 16 * work)
    def _(task: Index) -> None:
        first = T.bind(task * CHUNK_ROWS)
        last = T.bind(T.min(first + CHUNK_ROWS, rows))
        with T.serial(0, ceil_div(last - first, _PIXELS)) as tile:
            row = T.bind(first + tile * _PIXELS)
            places = [T.bind(x.place(row + r)) for r in range(_PIXELS)]
            whole, valid = divmod(channels, lanes)

            def block(column: Index, valid: int) -> None:
                *sums, total = accumulators(1, _PIXELS + 1, lanes, "int32")[0]
                for cell in (*sums, total):
                    store(cell, 0, fill(T.int32(0), lanes), lanes)
                with x.taps() as (tap, shift):
                    at = (column // BLOCK * taps + tap) * BLOCK + column % BLOCK
                    weight = T.bind(_wide(top_bits(load(weights, at, lanes), bits, lanes), lanes))
                    store(total, 0, load(total, 0, lanes) + weight, lanes)
                    for cell, place in zip(sums, places, strict=True):
                        value = _wide(load(x.buffer, place + shift + column, lanes), lanes)
                        store(cell, 0, load(cell, 0, lanes) + value * weight, lanes)
                # Activations carry an offset: each sum has it once for each weight.
                extra = T.bind(load(total, 0, lanes) * fill(int32(isa.offset + zero_point), lanes))
                for r, cell in enumerate(sums):

                    def finish(r: int = r, cell: Buffer = cell) -> None:
                        epilogue.store([row + r], column, valid, [load(cell, 0, lanes) - extra])

                    when(row + r < last, finish)

            if whole:
                with T.serial(0, whole) as i:
                    block(i * lanes, lanes)
            if valid:
                block(whole * lanes, valid)


def _wide(value: Expr, lanes: int) -> Expr:
    return T.cast(value, vec("int32", lanes))
