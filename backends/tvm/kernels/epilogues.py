"""What becomes of a product's int32 sums: the layer's float32 results, or a chain's int8 middle."""

from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    ceil_div,
    fill,
    load_partial,
    store,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import Writer, bounded_int32, narrowed
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.product import Epilogue


def dense(isa: Isa, writer: Writer, outputs: int, x_scale: Expr, scale: Buffer, bias: Buffer | None) -> Epilogue:
    """``sums * (scale * x_scale) + bias``, finished by ``writer`` as [rows, outputs]."""
    lanes = isa.lanes

    def store_all(rows: Sequence[Index], column: Index, valid: int, sums: Sequence[Expr]) -> None:
        gain = T.bind(load_partial(scale, column, lanes, valid) * fill(x_scale, lanes))
        values = [T.cast(acc, vec("float32", lanes)) * gain for acc in sums]
        if bias is not None:
            added = T.bind(load_partial(bias, column, lanes, valid))
            values = [value + added for value in values]
        writer.put_all([row * outputs + column for row in rows], values, lanes, valid)

    return Epilogue(store_all, isa.side_by_side if writer.has_function else 1)


def chain_end(
    isa: Isa, writer: Writer, outputs: int, h_scale: Expr, gain: Buffer | None, bias: Buffer | None
) -> Epilogue:
    """``sums * h_scale * gain + bias``, finished by ``writer`` as [rows, outputs]."""
    lanes = isa.lanes

    def store_all(rows: Sequence[Index], column: Index, valid: int, sums: Sequence[Expr]) -> None:
        values = [T.cast(acc, vec("float32", lanes)) * fill(h_scale, lanes) for acc in sums]
        if gain is not None:
            factor = T.bind(load_partial(gain, column, lanes, valid))
            values = [value * factor for value in values]
        if bias is not None:
            added = T.bind(load_partial(bias, column, lanes, valid))
            values = [value + added for value in values]
        writer.put_all([row * outputs + column for row in rows], values, lanes, valid)

    return Epilogue(store_all, isa.side_by_side if writer.has_function else 1)


def middle(
    isa: Isa, target: Buffer, place: Callable[[Index], Index], rank: int, scale: Buffer, factor: Expr, end: int = 0
) -> Epilogue:
    """``sums * (scale * factor)`` in int8, as the next product reads it: ``rank`` of a row from ``place(row)`` on, and
    zeros to its last word, or to element ``end``."""
    lanes = isa.lanes
    rest = max(end, ceil_div(rank, isa.word) * isa.word) - ceil_div(rank, lanes) * lanes

    def one(row: Index, column: Index, valid: int, acc: Expr) -> None:
        value = T.cast(acc, vec("float32", lanes)) * (load_partial(scale, column, lanes, valid) * fill(factor, lanes))
        # Symmetric. Lanes past the rank are zero (their scale is), as the next product needs.
        h = bounded_int32(value, T.float32(-127), None if isa.offset else T.float32(127), lanes)
        store(target, place(row) + column, narrowed(h + fill(T.int32(isa.offset), lanes), isa.offset, lanes), lanes)
        if rest > 0:
            zeros = fill(T.cast(isa.offset, isa.activation_dtype), rest)
            when(column + lanes >= rank, lambda: store(target, place(row) + column + lanes, zeros, rest))

    def store_all(rows: Sequence[Index], column: Index, valid: int, sums: Sequence[Expr]) -> None:
        for row, acc in zip(rows, sums, strict=True):
            one(row, column, valid, acc)

    return Epilogue(store_all)
