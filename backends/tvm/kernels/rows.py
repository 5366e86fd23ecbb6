"""Kernels that reduce: layer norm, RMS norm, softmax and rounding to int8 over the last axis, and mean.

Sums are those of ``passes.ops.float_math.row_sum`` on every target: sixteen partial sums, then halves.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    accumulators,
    ceil_div,
    chunks,
    fill,
    float32,
    for_each,
    load,
    prim_func,
    product,
    static,
    store,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.vmath import Lanes, nearest
from t3c_compile.passes.ops.float_math import PARTIAL_SUMS, fast_exp
from t3c_compile.passes.ops.int8_attention import LEAST_NORM, MOST, STEP

_WIDE = PARTIAL_SUMS
_TOGETHER = 4  # rows
_ROW_WORK = 16  # of an element of a norm, in multiply-adds of a product
LEAST = -3.4028234663852886e38  # finite, so that a row without a key has no inf - inf
_ARITHMETIC = Lanes(_WIDE)


def add(a: Expr, b: Expr) -> Expr:
    return a + b


def square_and_add(total: Expr, value: Expr) -> Expr:
    return T.fma(value, value, total)


def number_of(count: Index) -> Expr:
    """``count`` as float32."""
    return T.cast(count, "float32") if static(count) is None else T.float32(count)


def join_lanes(value: Expr, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """Sixteen lanes to one, in halves."""
    count = _WIDE // 2
    while count:
        whole = T.bind(value)
        halves = [tvm.tirx.Shuffle([whole], [T.int32(start + i) for i in range(count)]) for start in (0, count)]
        value = join(*halves)
        count //= 2
    return T.bind(value)


def reduce_row(
    count: Index,
    start: float,
    read: Callable[[Index, int], Expr],
    step: Callable[[Expr, Expr], Expr],
    join: Callable[[Expr, Expr], Expr] = add,
) -> Expr:
    """``step(partial, element)`` over ``count`` elements in sixteen partial results, joined at the end."""
    return reduce_rows(count, start, [read], step, join)[0]


def reduce_rows(
    count: Index,
    start: float,
    reads: Sequence[Callable[[Index, int], Expr]],
    step: Callable[[Expr, Expr], Expr],
    join: Callable[[Expr, Expr], Expr] = add,
) -> list[Expr]:
    """:func:`reduce_row` of rows beside each other: a partial result waits for the one before, not for other rows'."""
    partials = accumulators(len(reads), 1, _WIDE, "float32")
    for (wide,) in partials:
        store(wide, 0, fill(T.float32(start), _WIDE), _WIDE)
    whole = count // _WIDE
    if static(whole) != 0:
        with T.serial(0, whole) as i:
            for (wide,), read in zip(partials, reads, strict=True):
                store(wide, 0, step(load(wide, 0, _WIDE), read(i * _WIDE, _WIDE)), _WIDE)
    rest = count - whole * _WIDE
    if static(rest) != 0:
        # In buffers of their own, so that the ones above stay in registers.
        for line, read in zip(partials, reads, strict=True):
            tail = T.alloc_buffer((_WIDE,), "float32")
            store(tail, 0, load(line[0], 0, _WIDE), _WIDE)
            with T.serial(0, rest) as lane:
                T.buffer_store(tail, step(tail[lane], read(whole * _WIDE + lane, 1)), [lane])
            line[0] = tail
    return [join_lanes(load(wide, 0, _WIDE), join) for (wide,) in partials]


def for_rows(rows: Index, work: Index, body: Callable[[list[Index]], None]) -> None:
    """Emit ``body`` over groups of ``rows``, as :func:`emit.for_each` does over tasks; the last group may repeat the
    last row."""

    def groups(height: int) -> None:
        @for_each(ceil_div(rows, height), work)
        def _(task: Index) -> None:
            body([T.bind(T.min(task * height + r, rows - 1)) for r in range(height)])

    count = static(rows)
    if count is None:
        when(rows < _TOGETHER, lambda: groups(1), lambda: groups(_TOGETHER))
    else:
        groups(min(count, _TOGETHER))


def exponentials(
    scores: Buffer, start: Index, blocks: Index, top: Expr, put: Callable[[Index, Expr], None] | None = None
) -> Expr:
    """Replace whole vectors of scores by ``exp(score - top)``, or ``put`` each where vector i of them goes; their
    sum."""
    total = T.alloc_buffer((_WIDE,), "float32")
    store(total, 0, fill(T.float32(0), _WIDE), _WIDE)
    with T.serial(0, blocks) as i:
        at = start + i * _WIDE
        e = T.bind(fast_exp(_ARITHMETIC, T.bind(load(scores, at, _WIDE) - fill(top, _WIDE))))
        if put is None:
            store(scores, at, e, _WIDE)
        else:
            put(i, e)
        store(total, 0, load(total, 0, _WIDE) + e, _WIDE)
    return join_lanes(load(total, 0, _WIDE), add)


@cache
def softmax(isa: Isa, lead: tuple[int | str, ...], count: int | str) -> tvm.tirx.PrimFunc:
    """(float32 x, y [*lead, count]): ``t3c::softmax_f32``."""
    with prim_func("softmax") as function:
        x, y = function.args(x=((*lead, count), "float32"), y=((*lead, count), "float32"))
        rows, size = function.size(lead), function.size((count,))
        blocks = ceil_div(size, _WIDE)

        @for_each(rows, product((rows, size, 8)))
        def _(row: Index) -> None:
            start = T.bind(row * size)
            scores, total = _row_exponentials(x, start, size, blocks, float("-inf"))
            inverse = T.bind(T.float32(1.0) / total)
            chunks(size, isa.lanes, lambda i, n: store(y, start + i, load(scores, i, n) * fill(inverse, n), n))

    return function.func


def _row_exponentials(x: Buffer, start: Index, size: Index, blocks: Index, least: float) -> tuple[Buffer, Expr]:
    """``exp(x - max(x, least))`` of a row of ``x``, in whole vectors, and their sum."""
    scores = T.alloc_buffer((blocks * _WIDE,), "float32")
    store(scores, (blocks - 1) * _WIDE, fill(float32(float("-inf")), _WIDE), _WIDE)
    chunks(size, _WIDE, lambda i, n: store(scores, i, load(x, start + i, n), n))
    top = reduce_row(blocks * _WIDE, least, lambda i, n: load(scores, i, n), T.max, T.max)
    return scores, exponentials(scores, 0, blocks, top)


@cache
def exponential_rows(isa: Isa, lead: tuple[int | str, ...], count: int | str) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, count], y like it, inverse [*lead, 1]): ``t3c::exponentials``."""
    with prim_func("exponentials") as function:
        x, y, inverse = function.args(
            x=((*lead, count), "float32"), y=((*lead, count), "float32"), inverse=((*lead, 1), "float32")
        )
        rows, size = function.size(lead), function.size((count,))
        blocks = ceil_div(size, _WIDE)

        @for_each(rows, product((rows, size, 8)))
        def _(row: Index) -> None:
            start = T.bind(row * size)
            scores, total = _row_exponentials(x, start, size, blocks, LEAST)
            T.buffer_store(inverse, T.float32(1.0) / T.max(total, T.float32(1.0)), [row])
            chunks(size, isa.lanes, lambda i, n: store(y, start + i, load(scores, i, n), n))

    return function.func


def to_whole(greatest: Expr, steps: Buffer, place: Index) -> Expr:
    """What a row of ``greatest`` magnitude is multiplied by for whole numbers; one's worth to ``steps``."""
    greatest = T.bind(T.max(greatest, float32(LEAST_NORM)))
    T.buffer_store(steps, greatest * float32(STEP), [place])
    return T.bind(T.float32(MOST) / greatest)


def whole_numbers(x: Buffer, at: Index, ratio: Expr, n: int) -> Expr:
    """``n`` numbers of ``x`` as whole ones, int32."""
    return nearest(load(x, at, n) * fill(ratio, n), n)


@cache
def integer_rows(isa: Isa, lead: tuple[int | str, ...], count: int | str) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, count], int8 y like it, float32 step [*lead, 1]): ``t3c::integer_rows``."""
    with prim_func("integer_rows") as function:
        x, y, step = function.args(
            x=((*lead, count), "float32"), y=((*lead, count), "int8"), step=((*lead, 1), "float32")
        )
        rows, size = function.size(lead), function.size((count,))

        @for_each(rows, product((rows, size, 2)))
        def _(row: Index) -> None:
            start = T.bind(row * size)

            def magnitude(i: Index, n: int) -> Expr:
                value = T.bind(load(x, start + i, n))
                return T.max(value, fill(T.float32(0), n) - value)

            ratio = to_whole(reduce_row(size, 0.0, magnitude, T.max, T.max), step, row)

            def narrow(i: Index, n: int) -> None:
                store(y, start + i, T.cast(whole_numbers(x, start + i, ratio, n), vec("int8", n)), n)

            chunks(size, _WIDE, narrow)

    return function.func


@cache
def layer_norm(
    isa: Isa,
    lead: tuple[int | str, ...],
    count: int | str,
    weight: bool,
    bias: bool,
    epsilon: float,
    finish: Finish = PLAIN,
) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, count], weight and bias [count] where there are, ``finish``): ``t3c::layer_norm_f32``."""
    with prim_func("layer_norm") as function:
        x, gamma, beta, *ends = function.args(
            x=((*lead, count), "float32"),
            weight=((count,), "float32") if weight else None,
            bias=((count,), "float32") if bias else None,
            **finish.arguments((*lead, count)),
        )
        rows, size = function.size(lead), function.size((count,))
        writer = Writer(finish, ends)

        def normalized(group: list[Index]) -> None:
            starts, number = [T.bind(row * size) for row in group], number_of(size)
            means = [T.bind(total / number) for total in reduce_rows(size, 0.0, _reads(x, starts), add)]

            def centred(start: Index, mean: Expr, i: Index, n: int) -> Expr:
                return T.bind(load(x, start + i, n) - fill(mean, n))

            rest = [partial(centred, *row) for row in zip(starts, means, strict=True)]
            variances = [total / number for total in reduce_rows(size, 0.0, rest, square_and_add)]
            gains = [T.bind(T.float32(1.0) / T.sqrt(variance + float32(epsilon))) for variance in variances]

            def normalize(i: Index, n: int) -> None:
                for start, gain, read in zip(starts, gains, rest, strict=True):
                    value, scale = read(i, n), fill(gain, n)
                    if gamma is not None:
                        value, scale = T.bind(value * scale), load(gamma, i, n)
                    value = value * scale if beta is None else T.fma(value, scale, load(beta, i, n))
                    writer.put(start + i, value, n)

            chunks(size, isa.lanes, normalize)

        for_rows(rows, product((rows, size, _ROW_WORK)), normalized)
    return function.func


@cache
def rms_norm(
    isa: Isa, lead: tuple[int | str, ...], count: int | str, weight: bool, epsilon: float, finish: Finish = PLAIN
) -> tvm.tirx.PrimFunc:
    """(float32 x [*lead, count], weight [count] where there is one, ``finish``): ``t3c::rms_norm_f32``."""
    with prim_func("rms_norm") as function:
        x, gamma, *ends = function.args(
            x=((*lead, count), "float32"),
            weight=((count,), "float32") if weight else None,
            **finish.arguments((*lead, count)),
        )
        rows, size = function.size(lead), function.size((count,))
        writer = Writer(finish, ends)

        def normalized(group: list[Index]) -> None:
            starts = [T.bind(row * size) for row in group]
            squares = reduce_rows(size, 0.0, _reads(x, starts), square_and_add)
            gains = [T.bind(T.float32(1.0) / T.sqrt(total / number_of(size) + float32(epsilon))) for total in squares]

            def normalize(i: Index, n: int) -> None:
                for start, gain in zip(starts, gains, strict=True):
                    value = load(x, start + i, n) * fill(gain, n)
                    writer.put(start + i, value if gamma is None else value * load(gamma, i, n), n)

            chunks(size, isa.lanes, normalize)

        for_rows(rows, product((rows, size, _ROW_WORK)), normalized)
    return function.func


def _reads(x: Buffer, starts: list[Index]) -> list[Callable[[Index, int], Expr]]:
    return [lambda i, n, start=start: T.bind(load(x, start + i, n)) for start in starts]  # type: ignore[misc]


@cache
def mean(
    isa: Isa, outer: tuple[int | str, ...], reduced: tuple[int | str, ...], inner: tuple[int | str, ...]
) -> tvm.tirx.PrimFunc:
    """(float32 x [*outer, *reduced, *inner], y [*outer, *inner]): ``t3c::mean_f32`` over the dimensions ``reduced``."""
    with prim_func("mean") as function:
        x, y = function.args(x=((*outer, *reduced, *inner), "float32"), y=((*outer, *inner), "float32"))
        count, columns = function.size(reduced), function.size(inner)
        tasks = function.size(outer)

        @for_each(tasks, product((tasks, count, columns)))
        def _(task: Index) -> None:
            if static(columns) == 1:
                total = reduce_row(count, 0.0, lambda i, n: load(x, task * count + i, n), add)
                T.buffer_store(y, total / number_of(count), [task])
            else:
                chunks(columns, isa.lanes, lambda i, n: _mean_of_columns(x, y, task, count, columns, i, n))

    return function.func


def _mean_of_columns(x: Buffer, y: Buffer, task: Index, count: Index, columns: Index, column: Index, n: int) -> None:
    """Each partial sum is a vector of columns."""
    sums = accumulators(1, _WIDE, n, "float32")[0]
    for total in sums:
        store(total, 0, fill(T.float32(0), n), n)
    whole = count // _WIDE
    at = T.bind(task * count * columns + column)

    def add_row(lane: int, row: Index) -> None:
        store(sums[lane], 0, load(sums[lane], 0, n) + load(x, at + row * columns, n), n)

    if static(whole) != 0:
        with T.serial(0, whole) as i:
            for lane in range(_WIDE):
                add_row(lane, i * _WIDE + lane)
    for lane in range(_WIDE - 1):
        rest = T.bind(count - whole * _WIDE) if static(count) is None else count - whole * _WIDE
        when(lane < rest, lambda lane=lane: add_row(lane, whole * _WIDE + lane))  # type: ignore[misc]
    values = [load(total, 0, n) for total in sums]
    while len(values) > 1:
        half = len(values) // 2
        values = [T.bind(a + b) for a, b in zip(values[:half], values[half:], strict=True)]
    store(y, task * columns + column, values[0] / fill(number_of(count), n), n)
