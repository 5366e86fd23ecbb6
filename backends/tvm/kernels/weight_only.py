"""``t3c::weight_only_linear`` and ``t3c::svd_weight_only_linear``: integer weights times float32 activations.

Decoding a token multiplies one row, and then a weight is read once and used once: what counts is bytes. Up to
:data:`_FEW_ROWS` rows go through a kernel that keeps the sums of a panel of outputs in registers and streams the
panel's weights; more go through the float product. Both read one packed buffer, ``lanes`` or, at 4 bits, ``nibbles``,
and form each output as one chain of fused multiply-adds over the reduction, so results do not depend on the number of
rows or on the target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    accumulators,
    ceil_div,
    fill,
    for_each,
    lanes_before,
    load,
    load_partial,
    prim_func,
    static,
    store,
    store_partial,
    top_bits,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.floats import Right, float_product
from t3c_compile.backends.tvm.kernels.isa import BLOCK, NIBBLES, Isa
from t3c_compile.backends.tvm.kernels.pack import Packing, lanes_of_matrix, nibbles_of_matrix

# put(row, column, sums): what becomes of a vector of sums.
Put = Callable[[Index, Index, Expr], None]

_FEW_ROWS = 4
# Inputs that one turn of the loop takes at least: a cache line of int8 weights.
_UNROLL = 4


@dataclass(frozen=True)
class WeightOnlySpec:
    """A weight-only linear: ``lead`` dimensions (a name is a symbolic one) and sizes.

    ``max_rank`` and ``rank`` are those of ``svd_weight_only_linear`` and 0 for ``weight_only_linear``.
    """

    lead: tuple[int | str, ...]
    inputs: int
    outputs: int
    bits: int
    bias: bool = False
    max_rank: int = 0
    rank: int = 0
    finish: Finish = PLAIN


def weight_packing(shape: tuple[int, ...], bits: int, transposed: bool = False) -> Packing:
    """How weight-only kernels want int8 [outputs, inputs] (the other way round when ``transposed``)."""
    return nibbles_of_matrix(shape, transposed) if bits == 4 else lanes_of_matrix(shape, "int8", transposed)


@cache
def weight_only_linear(isa: Isa, s: WeightOnlySpec) -> tvm.tirx.PrimFunc:
    """(float32 x [..., n], weight, float32 scale [m], float32 bias [m] if any, ``finish``).

    ``weight`` is int8 [m, n] packed by :func:`weight_packing`.
    """
    packing = weight_packing((s.outputs, s.inputs), s.bits)
    with prim_func("weight_only_linear") as function:
        x, weight, scale, bias, *ends = function.args(
            x=((*s.lead, s.inputs), "float32"),
            weight=(packing.shape, packing.packed_dtype),
            scale=((s.outputs,), "float32"),
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((*s.lead, s.outputs)),
        )
        writer, lanes, rows = Writer(s.finish, ends), isa.lanes, function.size(s.lead)

        def put(row: Index, column: Index, sums: Expr) -> None:
            def finish(valid: int) -> None:
                gain = load_partial(scale, column, lanes, valid)
                shift = None if bias is None else load_partial(bias, column, lanes, valid)
                value = sums * gain if shift is None else T.fma(sums, gain, shift)
                writer.put(row * s.outputs + column, value, lanes, valid)

            lanes_before(s.outputs, column, lanes, finish)

        _multiply(isa, rows, s.outputs, s.inputs, x, Weight(weight, s.inputs, s.bits), put)
    return function.func


@cache
def svd_weight_only_linear(isa: Isa, s: WeightOnlySpec) -> tvm.tirx.PrimFunc:
    """(float32 x [..., n], v, u, float32 mid_scale [R], float32 bias [m] if any, ``finish``).

    ``v`` is int8 [R, n] and ``u`` int8 [R, m], packed by :func:`weight_packing`, ``u`` as transposed.
    """
    packings = weight_packing((s.max_rank, s.inputs), s.bits), weight_packing((s.max_rank, s.outputs), s.bits, True)
    with prim_func("svd_weight_only_linear") as function:
        x, v, u, mid_scale, bias, *ends = function.args(
            x=((*s.lead, s.inputs), "float32"),
            v=(packings[0].shape, packings[0].packed_dtype),
            u=(packings[1].shape, packings[1].packed_dtype),
            mid_scale=((s.max_rank,), "float32"),
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((*s.lead, s.outputs)),
        )
        writer, lanes, rows = Writer(s.finish, ends), isa.lanes, function.size(s.lead)
        middle = T.alloc_buffer((rows * s.rank,), "float32")

        def keep(row: Index, column: Index, sums: Expr) -> None:
            def finish(valid: int) -> None:
                h = sums * load_partial(mid_scale, column, lanes, valid)
                store_partial(middle, row * s.rank + column, h, lanes, valid)

            lanes_before(s.rank, column, lanes, finish)

        def put(row: Index, column: Index, sums: Expr) -> None:
            def finish(valid: int) -> None:
                value = sums if bias is None else sums + load_partial(bias, column, lanes, valid)
                writer.put(row * s.outputs + column, value, lanes, valid)

            lanes_before(s.outputs, column, lanes, finish)

        _multiply(isa, rows, s.rank, s.inputs, x, Weight(v, s.inputs, s.bits), keep)
        _multiply(isa, rows, s.outputs, s.rank, middle, Weight(u, s.max_rank, s.bits), put)
    return function.func


@dataclass(frozen=True)
class Weight:
    """A packed weight; ``inputs`` is the reduction's full length in it."""

    buffer: Buffer
    inputs: int
    bits: int

    @property
    def group(self) -> int:
        """Inputs a packed element holds."""
        return NIBBLES if self.bits == 4 else 1

    @property
    def unit(self) -> float:
        """What one step of the values read stands for, in stored integers; a power of two, so sums stay exact."""
        return 16.0 if self.bits == 4 else 1.0

    def load(self, block: Index, group: Index, offset: Index, lanes: int) -> Expr:
        """Packed elements of ``lanes`` outputs from ``offset`` on in a block."""
        return load(self.buffer, (block * ceil_div(self.inputs, self.group) + group) * BLOCK + offset, lanes)

    def values(self, isa: Isa, packed: Expr, i: Index, lanes: int) -> Expr:
        """Input ``i`` of each of the elements ``packed``, as float32 in steps of ``unit``."""
        if self.bits == 4:
            return isa.nibble(packed, i)
        return T.cast(top_bits(packed, self.bits, lanes), vec("float32", lanes))


def _multiply(isa: Isa, rows: Index, outputs: int, inputs: int, x: Buffer, weight: Weight, put: Put) -> None:
    """Emit ``x [rows, inputs]`` times the first ``outputs`` and ``inputs`` of a weight."""

    def scaled(row: Index, column: Index, sums: Expr) -> None:
        put(row, column, sums if weight.unit == 1 else sums * fill(T.float32(weight.unit), isa.lanes))

    def few(most: int) -> None:
        _few_rows(isa, most, rows, outputs, inputs, x, weight, scaled)

    def many() -> None:
        # The same number here; said so, that no body for one row is emitted.
        count = static(rows) or T.max(rows, _FEW_ROWS + 1)
        last = ceil_div(outputs, BLOCK) - 1

        def read(column: Index, k: Index) -> Expr:
            # A panel's last vectors may lie past the last block; they are read from that one and never stored.
            packed = weight.load(T.min(column // BLOCK, last), k // weight.group, column % BLOCK, isa.lanes)
            return weight.values(isa, packed, T.cast(k % weight.group, "int32"), isa.lanes)

        float_product(
            isa,
            1,
            count,
            outputs,
            inputs,
            lambda _, row: row * inputs,
            x,
            lambda _: Right(read, False),
            lambda _, *result: scaled(*result),
            isa.lanes,
        )

    count = static(rows)
    if count is None:
        when(rows == 1, lambda: few(1), lambda: when(rows <= _FEW_ROWS, lambda: few(_FEW_ROWS), many))
    elif count <= _FEW_ROWS:
        few(count)
    else:
        many()


def _few_rows(isa: Isa, most: int, rows: Index, outputs: int, inputs: int, x: Buffer, weight: Weight, put: Put) -> None:
    """Emit the product of at most ``most`` rows; where there are fewer, the last stands for those missing."""
    lanes, blocks = isa.lanes, ceil_div(outputs, BLOCK)
    # Eight sums at once hide the time of a multiply-add.
    panel = max(1, min(8, isa.registers // most) * lanes // BLOCK)
    group = max(weight.group, _UNROLL)

    @for_each(ceil_div(blocks, panel), outputs * inputs)
    def _(task: Index) -> None:
        first = T.bind(task * panel)
        starts = [T.bind(T.min(r, rows - 1) * inputs) for r in range(most)]
        # Of a ragged last panel the last block is done more than once, and stored once.
        places = [T.bind(T.min(first + b, blocks - 1)) for b in range(panel)]
        vectors = [(place, offset) for place in places for offset in range(0, BLOCK, lanes)]
        sums = accumulators(most, len(vectors), lanes, "float32")
        for line in sums:
            for cell in line:
                store(cell, 0, fill(T.float32(0), lanes), lanes)

        def add(k: Index, count: int) -> None:
            """The ``count`` inputs from ``k`` on."""
            for i in range(count):
                values = [T.bind(fill(x[start + k + i], lanes)) for start in starts]
                for v, (place, offset) in enumerate(vectors):
                    packed = weight.load(place, (k + i) // weight.group, offset, lanes)
                    part = T.bind(weight.values(isa, packed, i % weight.group, lanes))
                    for line, value in zip(sums, values, strict=True):
                        store(line[v], 0, T.fma(value, part, load(line[v], 0, lanes)), lanes)

        with T.serial(0, inputs // group) as turn:
            add(turn * group, group)
        if inputs % group:
            add(inputs // group * group, inputs % group)
        for r, line in enumerate(sums):

            def finish(r: int = r, line: list[Buffer] = line) -> None:
                for b in range(panel):
                    for v in range(BLOCK // lanes):
                        cell = line[b * (BLOCK // lanes) + v]
                        column = (first + b) * BLOCK + v * lanes
                        put(r, column, load(cell, 0, lanes))

            when(r < rows, finish)
