"""``t3c::int8_linear`` and ``t3c::svd_linear``: one or two int8 products in one kernel, the middle kept in int8."""

from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Index,
    fill,
    load_partial,
    prim_func,
    requantize,
    store,
    vec,
)
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.gemm import (
    SPARE_ROWS,
    Product,
    default_tile,
    multiply,
    prepare_rows,
    row_stride,
)
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.pack import quads_of_matrix
from t3c_compile.backends.tvm.kernels.tile import Tiles, tile_of


@dataclass(frozen=True)
class LinearSpec:
    """A quantized linear: ``lead`` dimensions (a name is a symbolic one) and sizes.

    ``max_rank`` and ``rank`` are those of ``svd_linear`` and 0 for ``int8_linear``. Scales and zero points are an
    argument (``numbers``), so that layers and profiles of one shape share one kernel.
    """

    lead: tuple[int | str, ...]
    inputs: int
    outputs: int
    bits: int
    gain: bool = True
    bias: bool = False
    max_rank: int = 0
    rank: int = 0
    finish: Finish = PLAIN


@cache
def int8_linear(isa: Isa, s: LinearSpec, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
    """(int8 x [..., n], numbers, packed int8 weight, float32 scale [m], float32 bias [m] if any, ``finish``).

    ``numbers``: float32 x_scale, x_zero_point.
    """
    with prim_func("int8_linear", tiles) as function:
        x, numbers, weight, scale, bias, *ends = function.args(
            x=((*s.lead, s.inputs), "int8"),
            numbers=((2,), "float32"),
            weight=(quads_of_matrix((s.outputs, s.inputs)).shape, "int8"),
            scale=((s.outputs,), "float32"),
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((*s.lead, s.outputs)),
        )
        lanes, rows = isa.lanes, function.size(s.lead)
        x_scale, zero_point = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32"))
        writer = Writer(s.finish, ends)

        def epilogue(row: Index, column: Index, valid: int, acc: Expr) -> None:
            gain = load_partial(scale, column, lanes, valid) * fill(x_scale, lanes)
            value = T.cast(acc, vec("float32", lanes)) * gain
            if bias is not None:
                value = value + load_partial(bias, column, lanes, valid)
            writer.put(row * s.outputs + column, value, lanes, valid)

        activations = prepare_rows(isa, x, rows, s.inputs)
        shape = Product(rows, s.outputs, s.inputs, s.inputs, zero_point, s.bits)
        multiply(isa, shape, tile_of(tiles, 0, default_tile(isa)), activations, weight, epilogue)
    return function.func


@cache
def svd_linear(isa: Isa, s: LinearSpec, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
    """(int8 x [..., n], numbers, packed v, packed u, mid_scale [R], out_gain and bias [m] if any, ``finish``).

    ``numbers``: float32 x_scale / h_scale, x_zero_point, h_scale.
    """
    with prim_func("svd_linear", tiles) as function:
        x, numbers, v, u, mid_scale, gain, bias, *ends = function.args(
            x=((*s.lead, s.inputs), "int8"),
            numbers=((3,), "float32"),
            v=(quads_of_matrix((s.max_rank, s.inputs)).shape, "int8"),
            u=(quads_of_matrix((s.max_rank, s.outputs), transposed=True).shape, "int8"),
            mid_scale=((s.max_rank,), "float32"),
            out_gain=((s.outputs,), "float32") if s.gain else None,
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((*s.lead, s.outputs)),
        )
        lanes, rows, stride = isa.lanes, function.size(s.lead), row_stride(s.rank)
        to_h, zero_point, h_scale = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32")), T.bind(numbers[2])
        writer = Writer(s.finish, ends)
        activations = prepare_rows(isa, x, rows, s.inputs)
        middle = T.alloc_buffer(((rows + SPARE_ROWS) * stride,), isa.activation_dtype)

        def keep(row: Index, column: Index, valid: int, acc: Expr) -> None:
            factor = load_partial(mid_scale, column, lanes, valid) * fill(to_h, lanes)
            h = requantize(acc, factor, lanes)
            # Lanes past the rank are zero (their mid_scale is), as the next product needs.
            h = T.cast(h + fill(T.int32(isa.offset), lanes), vec(isa.activation_dtype, lanes))
            store(middle, row * stride + column, h, lanes)

        def epilogue(row: Index, column: Index, valid: int, acc: Expr) -> None:
            value = T.cast(acc, vec("float32", lanes)) * fill(h_scale, lanes)
            if gain is not None:
                value = value * load_partial(gain, column, lanes, valid)
            if bias is not None:
                value = value + load_partial(bias, column, lanes, valid)
            writer.put(row * s.outputs + column, value, lanes, valid)

        first = Product(rows, s.rank, s.inputs, s.inputs, zero_point, s.bits)
        multiply(isa, first, tile_of(tiles, 0, default_tile(isa)), activations, v, keep)
        second = Product(rows, s.outputs, s.rank, s.max_rank, 0, s.bits)
        multiply(isa, second, tile_of(tiles, 1, default_tile(isa)), middle, u, epilogue)
    return function.func
