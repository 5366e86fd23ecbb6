"""``t3c::int8_linear`` and ``t3c::svd_linear``: one or two int8 products in one kernel, the middle kept in int8."""

from dataclasses import dataclass
from functools import cache

import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import prim_func, static
from t3c_compile.backends.tvm.kernels.epilogues import chain_end, dense, middle
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.gemm import multiply, tile_for
from t3c_compile.backends.tvm.kernels.isa import Isa, for_middle, for_weights
from t3c_compile.backends.tvm.kernels.pack import words_of_matrix
from t3c_compile.backends.tvm.kernels.product import Product, middle_rows, prepare_rows
from t3c_compile.backends.tvm.kernels.tile import Tiles


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
            weight=(words_of_matrix(isa, (s.outputs, s.inputs)).shape, "int8"),
            scale=((s.outputs,), "float32"),
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((*s.lead, s.outputs)),
        )
        rows = function.size(s.lead)
        isa = for_weights(isa, s.bits, static(rows))
        x_scale, zero_point = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32"))
        writer = Writer(s.finish, ends)
        activations = prepare_rows(isa, x, rows, s.inputs)
        shape = Product(rows, s.outputs, s.inputs, s.inputs, zero_point, s.bits)
        tile = tile_for(isa, tiles, 0, s.lead, s.outputs, s.inputs)
        multiply(isa, shape, activations, weight, dense(isa, writer, s.outputs, x_scale, scale, bias), tile)
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
            v=(words_of_matrix(isa, (s.max_rank, s.inputs)).shape, "int8"),
            u=(words_of_matrix(isa, (s.max_rank, s.outputs), transposed=True).shape, "int8"),
            mid_scale=((s.max_rank,), "float32"),
            out_gain=((s.outputs,), "float32") if s.gain else None,
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((*s.lead, s.outputs)),
        )
        rows = function.size(s.lead)
        isa = for_weights(isa, s.bits, static(rows))
        to_h, zero_point, h_scale = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32")), T.bind(numbers[2])
        writer = Writer(s.finish, ends)
        between = for_middle(isa)
        activations, h = prepare_rows(isa, x, rows, s.inputs), middle_rows(between, rows, s.rank)
        first = Product(rows, s.rank, s.inputs, s.inputs, zero_point, s.bits)
        tile = tile_for(isa, tiles, 0, s.lead, s.rank, s.inputs)
        to_middle = middle(between, h.buffer, h.place, s.rank, mid_scale, to_h, h.end)
        multiply(isa, first, activations, v, to_middle, tile)
        second = Product(rows, s.outputs, s.rank, s.max_rank, 0, s.bits)
        tile = tile_for(isa, tiles, 1, s.lead, s.outputs, s.rank)
        multiply(isa, second, h, u, chain_end(isa, writer, s.outputs, h_scale, gain, bias), tile)
    return function.func
