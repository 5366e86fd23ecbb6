"""Kernels that reduce rows: layer norm, RMS norm, softmax and mean.

Half a warp takes a row. Its lanes hold the sixteen partial sums of ``passes.ops.float_math.row_sum``, and an exchange
of halves joins them in that function's order, so sums have the same bits as everywhere.
"""

from collections.abc import Callable
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.cuda.threads import exchange, for_each_thread, grid
from t3c_compile.backends.tvm.kernels.emit import Index, ceil_div, float32, prim_func, product, static, when
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.rows import add, number_of, square_and_add
from t3c_compile.backends.tvm.kernels.vmath import Lanes
from t3c_compile.passes.ops.float_math import PARTIAL_SUMS, fast_exp

_ROWS = 8  # of a block
_ONE = Lanes()

Lead = tuple[int | str, ...]
Step = Callable[[Expr, Expr], Expr]


class Row:
    """A row of ``count`` elements, ``lane`` of the sixteen that share it."""

    def __init__(self, count: Index, lane: Expr) -> None:
        self._count, self.lane = count, lane

    def each(self, body: Callable[[Index], None]) -> None:
        """``body`` for each of this lane's elements."""
        with T.serial(0, ceil_div(self._count, PARTIAL_SUMS)) as i:
            at = T.bind(i * PARTIAL_SUMS + self.lane)
            known = static(self._count)
            when(True if known is not None and known % PARTIAL_SUMS == 0 else at < self._count, lambda: body(at))

    def reduce(self, start: float, read: Callable[[Index], Expr], step: Step, join: Step = add) -> Expr:
        """``step(partial, element)`` over the row, joined over the lanes; every lane has it."""
        partial = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(partial, float32(start), [0])
        self.each(lambda at: T.buffer_store(partial, step(partial[0], read(at)), [0]))
        value, distance = T.bind(partial[0]), PARTIAL_SUMS // 2
        while distance:
            value = T.bind(join(value, exchange(value, distance)))
            distance //= 2
        return value


def for_each_row(rows: Index, count: Index) -> Callable[[Callable[[Row, Index, Expr], None]], None]:
    """Decorator that emits its function for each row: (row, number, whether it is there). A row past the last is the
    last again, so that all lanes of a warp exchange."""

    def emit(body: Callable[[Row, Index, Expr], None]) -> None:
        with grid([ceil_div(rows, _ROWS)], _ROWS * PARTIAL_SUMS) as (block, thread):
            number = T.bind(block * _ROWS + thread // PARTIAL_SUMS)
            body(Row(count, T.bind(thread % PARTIAL_SUMS)), T.bind(T.min(number, rows - 1)), number < rows)

    return emit


@cache
def softmax(lead: Lead, count: int | str) -> tvm.tirx.PrimFunc:
    """(float32 x, y [*lead, count]): ``t3c::softmax_f32``."""
    with prim_func("cuda_softmax") as function:
        x, y = function.args(x=((*lead, count), "float32"), y=((*lead, count), "float32"))
        rows, size = function.size(lead), function.size((count,))

        @for_each_row(rows, size)
        def _(row: Row, number: Index, there: Expr) -> None:
            start = T.bind(number * size)
            top = row.reduce(float("-inf"), lambda i: x[start + i], T.max, T.max)

            def exponential(i: Index) -> Expr:
                return T.bind(fast_exp(_ONE, T.bind(x[start + i] - top)))

            inverse = T.bind(T.float32(1.0) / row.reduce(0.0, exponential, add))
            when(there, lambda: row.each(lambda i: T.buffer_store(y, exponential(i) * inverse, [start + i])))

    return function.func


@cache
def layer_norm(
    lead: Lead, count: int | str, weight: bool, bias: bool, epsilon: float, finish: Finish = PLAIN
) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, count], weight and bias [count] where there are, ``finish``): ``t3c::layer_norm_f32``."""
    with prim_func("cuda_layer_norm") as function:
        x, gamma, beta, *ends = function.args(
            x=((*lead, count), "float32"),
            weight=((count,), "float32") if weight else None,
            bias=((count,), "float32") if bias else None,
            **finish.arguments((*lead, count)),
        )
        rows, size = function.size(lead), function.size((count,))
        writer = Writer(finish, ends)

        @for_each_row(rows, size)
        def _(row: Row, number: Index, there: Expr) -> None:
            start, length = T.bind(number * size), number_of(size)
            mean = T.bind(row.reduce(0.0, lambda i: x[start + i], add) / length)

            def centred(i: Index) -> Expr:
                return T.bind(x[start + i] - mean)

            variance = row.reduce(0.0, centred, square_and_add) / length
            gain = T.bind(T.float32(1.0) / T.sqrt(variance + float32(epsilon)))

            def normalize(i: Index) -> None:
                value, scale = centred(i), gain
                if gamma is not None:
                    value, scale = T.bind(value * scale), gamma[i]
                writer.put(start + i, value * scale if beta is None else T.fma(value, scale, beta[i]), 1)

            when(there, lambda: row.each(normalize))

    return function.func


@cache
def rms_norm(lead: Lead, count: int | str, weight: bool, epsilon: float, finish: Finish = PLAIN) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, count], weight [count] where there is one, ``finish``): ``t3c::rms_norm_f32``."""
    with prim_func("cuda_rms_norm") as function:
        x, gamma, *ends = function.args(
            x=((*lead, count), "float32"),
            weight=((count,), "float32") if weight else None,
            **finish.arguments((*lead, count)),
        )
        rows, size = function.size(lead), function.size((count,))
        writer = Writer(finish, ends)

        @for_each_row(rows, size)
        def _(row: Row, number: Index, there: Expr) -> None:
            start = T.bind(number * size)
            squares = row.reduce(0.0, lambda i: x[start + i], square_and_add)
            gain = T.bind(T.float32(1.0) / T.sqrt(squares / number_of(size) + float32(epsilon)))

            def normalize(i: Index) -> None:
                value = x[start + i] * gain
                writer.put(start + i, value if gamma is None else value * gamma[i], 1)

            when(there, lambda: row.each(normalize))

    return function.func


@cache
def mean(outer: Lead, reduced: Lead, inner: Lead) -> tvm.tirx.PrimFunc:
    """(float32 x [*outer, *reduced, *inner], y [*outer, *inner]): ``t3c::mean_f32`` over the dimensions ``reduced``."""
    with prim_func("cuda_mean") as function:
        x, y = function.args(x=((*outer, *reduced, *inner), "float32"), y=((*outer, *inner), "float32"))
        count, columns = function.size(reduced), function.size(inner)
        tasks = product((function.size(outer), columns))
        if static(columns) == 1:

            @for_each_row(tasks, count)
            def _(row: Row, number: Index, there: Expr) -> None:
                total = row.reduce(0.0, lambda i: x[number * count + i], add)
                when(there, lambda: T.buffer_store(y, total / number_of(count), [number]))

        else:

            @for_each_thread(tasks)
            def _(task: Index) -> None:
                at = T.bind(task // columns * count * columns + task % columns)
                sums = T.alloc_buffer((PARTIAL_SUMS,), "float32", scope="local")
                with T.unroll(0, PARTIAL_SUMS) as lane:
                    T.buffer_store(sums, T.float32(0), [lane])
                with T.serial(0, ceil_div(count, PARTIAL_SUMS)) as i, T.unroll(0, PARTIAL_SUMS) as lane:
                    element = T.bind(i * PARTIAL_SUMS + lane)
                    when(
                        element < count,
                        lambda: T.buffer_store(sums, sums[lane] + x[at + element * columns], [lane]),
                    )
                values = [sums[lane] for lane in range(PARTIAL_SUMS)]
                while len(values) > 1:
                    half = len(values) // 2
                    values = [T.bind(a + b) for a, b in zip(values[:half], values[half:], strict=True)]
                T.buffer_store(y, values[0] / number_of(count), [task])

    return function.func
