"""``t3c::weight_only_linear`` and ``t3c::svd_weight_only_linear``: integer weights times float32 activations.

Decoding a token multiplies one row, and then a weight is read once and used once: what counts is bytes. A row of
activations becomes whole numbers of 24 bits, three int8 digits each, which the int8 dot product multiplies as three
rows: a vector of weights takes an instruction a digit, where as float32 it would take twelve. Sums are exact, so
results depend on no order, number of rows or target. Weights are read as ``words``, at 4 bits as ``nibbles``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels import vmath
from t3c_compile.backends.tvm.kernels.emit import (
    CHUNK_ROWS,
    Buffer,
    Index,
    accumulators,
    ceil_div,
    chunks,
    fill,
    float32,
    for_each,
    lanes_before,
    load,
    load_partial,
    prefetch,
    prim_func,
    product,
    row_chunks,
    static,
    store,
    store_partial,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa, by_lane
from t3c_compile.backends.tvm.kernels.pack import Packing, nibbles_of_matrix, quads_of_matrix
from t3c_compile.backends.tvm.kernels.product import as_read, row_stride, spread_word, weight_words
from t3c_compile.passes.ops.int8_attention import LEAST_NORM
from t3c_compile.passes.ops.weight_only import MOST, STEP

# put(row, column, sums): what becomes of a vector of sums.
Put = Callable[[Index, Index, Expr], None]

_DIGITS = 3
# Rows that share the weights in a register tile.
_ROWS = 3
# More inputs than these could overflow the sums of a digit.
MOST_INPUTS = 1 << 16


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
    return nibbles_of_matrix(shape, transposed) if bits == 4 else quads_of_matrix(shape, transposed)


@cache
def weight_only_linear(isa: Isa, s: WeightOnlySpec) -> tvm.tirx.PrimFunc:
    """(float32 x [..., n], weight, float32 scale [m], float32 bias [m] if any, ``finish``).

    ``weight`` is int8 [m, n] packed by :func:`weight_packing`.
    """
    packing = weight_packing((s.outputs, s.inputs), s.bits)
    with prim_func("weight_only_linear") as function:
        x, weight, scale, bias, *ends = function.args(
            x=((*s.lead, s.inputs), "float32"),
            weight=(packing.shape, packing.dtype),
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

        _multiply(isa, rows, s.outputs, s.inputs, x, weight, s.inputs, s.bits, put)
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
            v=(packings[0].shape, packings[0].dtype),
            u=(packings[1].shape, packings[1].dtype),
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
                value = sums if bias is None else vmath.rounded(sums, lanes) + load_partial(bias, column, lanes, valid)
                writer.put(row * s.outputs + column, value, lanes, valid)

            lanes_before(s.outputs, column, lanes, finish)

        _multiply(isa, rows, s.rank, s.inputs, x, v, s.inputs, s.bits, keep)
        _multiply(isa, rows, s.outputs, s.rank, middle, u, s.max_rank, s.bits, put)
    return function.func


def _multiply(
    isa: Isa, rows: Index, outputs: int, inputs: int, x: Buffer, weight: Buffer, stored: int, bits: int, put: Put
) -> None:
    """Emit ``x [rows, inputs]`` times the first ``outputs`` and ``inputs`` of a weight that has ``stored`` inputs."""
    isa = by_lane(isa)
    digits, steps = _digits(isa, x, rows, inputs)
    panel = _Panel(isa, rows, outputs, inputs, digits, steps, weight, stored, bits, put)
    count = static(rows)
    if count is None:
        when(rows == 1, lambda: panel.emit(1), lambda: panel.emit(_ROWS))
    else:
        panel.emit(min(count, _ROWS))


def _digits(isa: Isa, x: Buffer, rows: Index, inputs: int) -> tuple[Buffer, Buffer]:
    """Every row as rows of its digits, the lowest first, in the form the dot product reads, and its step."""
    lanes, stride, dtype = isa.lanes, row_stride(inputs), isa.activation_dtype
    digits = T.alloc_buffer((rows * _DIGITS * stride,), dtype)
    steps = T.alloc_buffer((rows,), "float32")

    @for_each(rows, product((rows, inputs)))
    def _(row: Index) -> None:
        greatest, broken = (T.alloc_buffer((lanes,), "float32") for _ in range(2))
        for cell in (greatest, broken):
            store(cell, 0, fill(T.float32(0), lanes), lanes)

        def look(i: Index, n: int) -> None:
            value = T.bind(load(x, row * inputs + i, n))
            store(greatest, 0, T.max(load(greatest, 0, n), T.max(value, fill(T.float32(0), n) - value)), n)
            # Nothing, or not a number: what the integers cannot say.
            store(broken, 0, load(broken, 0, n) + value * fill(T.float32(0), n), n)

        chunks(inputs, lanes, look)
        most: Expr = float32(LEAST_NORM)
        fault: Expr = T.float32(0)
        for lane in range(lanes):
            most, fault = T.max(most, greatest[lane]), fault + broken[lane]
        most = T.bind(most)
        T.buffer_store(steps, most * float32(STEP) + fault, [row])
        ratio = T.bind(T.float32(MOST) / most)

        def split(i: Index, n: int) -> None:
            rest = vmath.nearest(load(x, row * inputs + i, n) * fill(ratio, n), n)
            for place in range(_DIGITS):
                rest = T.bind(rest)
                digit = T.bind(T.cast(rest, vec("int8", n)))
                at = (row * _DIGITS + place) * stride + i
                store(digits, at, as_read(isa, digit, "int8", n), n)
                rest = (rest - T.cast(digit, vec("int32", n))) >> fill(T.int32(8), n)

        chunks(inputs, lanes, split)
        # Of the last word's missing inputs there may be weights: those of greater ranks.
        with T.serial(0, -inputs % QUAD) as i:
            for place in range(_DIGITS):
                T.buffer_store(digits, T.cast(isa.offset, dtype), [(row * _DIGITS + place) * stride + inputs + i])

    return digits, steps


@dataclass(frozen=True)
class _Panel:
    """The product of rows of digits, a task some outputs of some rows."""

    isa: Isa
    rows: Index
    outputs: int
    inputs: int
    digits: Buffer
    steps: Buffer
    weight: Buffer
    stored: int
    bits: int
    put: Put

    @property
    def shared(self) -> int:
        """Registers that a load of weights fills: one, or of nibbles two."""
        return 2 if self.bits == 4 else 1

    def emit(self, height: int) -> None:
        """The product, ``height`` rows a tile."""
        isa, lanes = self.isa, self.isa.lanes
        # Where digits are unsigned, a row of ones takes their offset out.
        lines = height * _DIGITS + (isa.offset > 0)
        loads = 1 << (max(1, isa.registers // lines // self.shared).bit_length() - 1)
        if height == 1 and isa.fetches:
            # One stream of whole cache lines: several at once reached 0.8 of the memory's speed, this one 0.9.
            loads = BLOCK // lanes
        units = ceil_div(self.outputs, BLOCK * self.shared) * (BLOCK // lanes)
        panels, parts = ceil_div(units, loads), row_chunks(self.rows)

        @for_each(panels * parts, product((self.rows, self.outputs, self.inputs)))
        def _(task: Index) -> None:
            first = T.bind(task // parts * loads)
            start = T.bind(task % parts * CHUNK_ROWS)
            last = T.min(start + CHUNK_ROWS, self.rows)
            with T.serial(0, ceil_div(last - start, height)) as group:
                self._tile(first, T.bind(start + group * height), height, lines, loads, units)

    def _tile(self, first: Index, row: Index, height: int, lines: int, loads: int, units: int) -> None:
        isa, lanes = self.isa, self.isa.lanes
        sums = accumulators(lines, loads * self.shared, lanes, "int32")
        for line in sums:
            for cell in line:
                store(cell, 0, fill(T.int32(0), lanes), lanes)
        stride = row_stride(self.inputs)
        # Of missing rows the last stands for them, and of missing outputs the last.
        places = [
            T.bind((T.min(row + r, self.rows - 1) * _DIGITS + place) * stride)
            for r in range(height)
            for place in range(_DIGITS)
        ]
        weights = [T.bind(self._place(T.min(first + u, units - 1))) for u in range(loads)]
        ones = fill(T.cast(1, isa.activation_dtype), lanes * QUAD)
        with T.serial(0, ceil_div(self.inputs, QUAD)) as k:
            if isa.fetches:
                self._fetch(weights, k, loads)
            words = [word for at in weights for word in self._words(at + k * (BLOCK * QUAD))]
            for i, line in enumerate(sums):
                digit = spread_word(isa, self.digits, places[i] + k * QUAD) if i < len(places) else ones
                digit = T.bind(digit)
                for cell, word in zip(line, words, strict=True):
                    store(cell, 0, isa.dot(load(cell, 0, lanes), digit, word), lanes)
        for r in range(height):

            def finish(r: int = r) -> None:
                for u in range(loads):
                    for half in range(self.shared):
                        cells = [line[u * self.shared + half] for line in sums]
                        of_row = cells[r * _DIGITS : (r + 1) * _DIGITS] + cells[height * _DIGITS :]
                        self.put(row + r, self._column(first + u, half), self._value(row + r, of_row))

            when(row + r < self.rows, finish)

    def _place(self, unit: Index) -> Index:
        """Where the weights of a unit begin: ``lanes`` outputs of a block."""
        parts, words = BLOCK // self.isa.lanes, ceil_div(self.stored, QUAD)
        return unit // parts * (words * BLOCK * QUAD) + unit % parts * (self.isa.lanes * QUAD)

    def _fetch(self, weights: list[Index], k: Index, loads: int) -> None:
        """Ask for the next task's words ``k``, as long before they are needed as this task takes."""
        ahead = loads * self.isa.lanes * ceil_div(self.stored, QUAD) * QUAD
        for at in weights[:: BLOCK // self.isa.lanes]:
            prefetch(self.weight, T.min(at + k * (BLOCK * QUAD) + ahead, self.weight.shape[0] - BLOCK * QUAD))

    def _column(self, unit: Index, half: int) -> Index:
        parts = BLOCK // self.isa.lanes
        return (unit // parts * self.shared + half) * BLOCK + unit % parts * self.isa.lanes

    def _words(self, at: Index) -> list[Expr]:
        """The registers of weights at ``at``."""
        isa, lanes = self.isa, self.isa.lanes
        if self.bits != 4:
            return [weight_words(isa, self.weight, at, self.bits)]
        pairs = T.bind(T.reinterpret(vec("int32", lanes), load(self.weight, at, lanes * QUAD)))
        low, high = pairs << fill(T.int32(4), lanes), pairs
        top = fill(T.int32(-0x0F0F0F10), lanes)
        return [T.bind(T.reinterpret(vec("int8", lanes * QUAD), half & top)) for half in (low, high)]

    def _value(self, row: Index, cells: list[Buffer]) -> Expr:
        """A row's sums in float32 from those of its digits; each step is exact but the last two."""
        lanes, dtype = self.isa.lanes, vec("float64", self.isa.lanes)
        total = fill(T.float64(0), lanes)
        for place, cell in reversed(list(enumerate(cells))):
            worth = 256.0**place if place < _DIGITS else -128.0 * sum(256.0**p for p in range(_DIGITS))
            total = total + T.cast(load(cell, 0, lanes), dtype) * fill(T.float64(worth), lanes)
        return T.bind(T.cast(total, vec("float32", lanes)) * fill(self.steps[row], lanes))
