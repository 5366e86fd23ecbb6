"""Building blocks the kernels share: vector loads and stores, ragged tails, register tiles, work splitting.

Kernels are written straight as TIR loops with vector values: what is emitted here is what runs, so nothing is
left for a scheduler, and a kernel compiles in milliseconds.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import numpy as np
import sympy
import tvm
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.tile import Tiles

Buffer = Any  # a TIR buffer variable
Index = Any  # an int or a TIR index expression
Shape = Sequence[int | str]
# The sizes of symbols in symbolic dimensions; of those not named, 1.
Sizes = Mapping[str, int]

# Rows of a product a task takes, so that what it sets up once for its columns is paid back.
CHUNK_ROWS = 96
# Work (multiply-adds or elements) below which waking the other threads costs more than it saves.
PARALLEL_WORK = 1 << 20


@contextmanager
def prim_func(name: str, tiles: Tiles = ()) -> Iterator["Function"]:
    """Build one PrimFunc inside the ``with``; afterwards ``.func`` holds it. ``tiles``: those it was tuned to."""
    how = f", tuned {'; '.join(map(str, tiles))}" if tiles else ""
    result = Function()
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_name(name)
        # Opaque to operator fusion, and known to the default schedule as already scheduled.
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "t3c.schedule": f"kernel template: {name}{how}"})
        yield result
    result.func = builder.get()


def symbol_name(size: str) -> str:
    """What a symbolic size is called in a kernel: an expression becomes a name that C has, too."""
    return re.sub(r"\W+", "_", size)


def size_at(size: int | str, sizes: Sizes) -> int:
    """A dimension where its symbols have ``sizes``."""
    if isinstance(size, int):
        return size
    expression = sympy.sympify(plain(size))
    return int(expression.subs({symbol: sizes.get(str(symbol), 1) for symbol in expression.free_symbols}))


def plain(expression: str) -> str:
    """A TIR expression without the types of its constants."""
    return re.sub(r"T\.int\d+\((-?\d+)\)", r"\1", expression)


class Function:
    """The PrimFunc under construction. Shapes are ints, or names of symbolic dimensions."""

    func: tvm.tirx.PrimFunc

    def __init__(self) -> None:
        self._symbols: dict[str, tvm.tirx.Var] = {}

    def dims(self, shape: Shape) -> list[Index]:
        """``shape`` with a TIR variable for each name."""

        def variable(name: str) -> tvm.tirx.Var:
            return self._symbols.setdefault(name, tvm.tirx.Var(symbol_name(name), "int64"))

        return [variable(d) if isinstance(d, str) else d for d in shape]

    def size(self, shape: Shape) -> Index:
        """Number of elements of ``shape``."""
        return product(self.dims(shape))

    def args(self, **arguments: tuple[Shape, str] | None) -> list[Buffer]:
        """Declare the arguments in order as name=(shape, dtype), or None for one left out; each as a flat buffer."""
        whole = [
            None if a is None else T.arg(name, T.buffer(tuple(self.dims(a[0])), a[1], layout=None))
            for name, a in arguments.items()
        ]
        return [
            None if w is None else T.decl_buffer((product(w.shape),), w.dtype, data=w.data, layout=None) for w in whole
        ]


def product(values: Sequence[Index]) -> Index:
    """Product of ints and expressions, an int where it is known."""
    total: Index = 1
    for value in values:
        total = total * value
    number = static(total)
    return total if number is None else number


@overload
def ceil_div(value: int, divisor: int) -> int: ...
@overload
def ceil_div(value: Expr, divisor: int) -> Expr: ...
def ceil_div(value: Index, divisor: int) -> Index:
    """``value / divisor`` rounded up."""
    return (value + divisor - 1) // divisor


def static(value: Index) -> int | None:
    """``value`` as an int where it is known at compile time."""
    if isinstance(value, int):
        return value
    return int(value.value) if isinstance(value, tvm.tirx.IntImm) else None


def least(value: Index) -> int:
    """The least ``value`` can be: symbolic dimensions are one or more."""
    number = static(value)
    if number is not None:
        return number
    analyzer = tvm.sym.Analyzer()
    for symbol in tvm.tirx.analysis.undefined_vars(value, []):
        analyzer.bind(symbol, tvm.ir.Range(1, 1 << 30))
    return int(analyzer.const_int_bound(value).min_value)


def vec(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def fill(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else T.broadcast(value, lanes)


def load(buffer: Buffer, index: Index, lanes: int) -> Expr:
    return buffer[index] if lanes == 1 else buffer[T.ramp(index, 1, lanes)]


def store(buffer: Buffer, index: Index, value: Expr, lanes: int) -> None:
    T.buffer_store(buffer, value, [index if lanes == 1 else T.ramp(index, 1, lanes)])


def prefetch(buffer: Buffer, index: Index) -> None:
    """Ask for the cache line of ``index``, to be read and kept near."""
    T.evaluate(T.call_intrin("void", "tirx.prefetch", T.address_of(buffer[index]), *map(T.int32, (0, 2, 1))))


def load_partial(buffer: Buffer, index: Index, lanes: int, valid: int) -> Expr:
    """The first ``valid`` of ``lanes`` elements at ``index``, the others zero, touching nothing past them."""
    if valid == lanes:
        return load(buffer, index, lanes)
    spill = T.alloc_buffer((lanes,), buffer.dtype)
    store(spill, 0, fill(T.cast(0, buffer.dtype), lanes), lanes)
    for lane in range(valid):
        T.buffer_store(spill, buffer[index + lane], [lane])
    return load(spill, 0, lanes)


def store_partial(buffer: Buffer, index: Index, value: Expr, lanes: int, valid: int) -> None:
    """Store the first ``valid`` of ``lanes`` elements."""
    if valid == lanes:
        store(buffer, index, value, lanes)
        return
    spill = T.alloc_buffer((lanes,), buffer.dtype)
    store(spill, 0, value, lanes)
    for lane in range(valid):
        T.buffer_store(buffer, spill[lane], [index + lane])


def lanes_before(end: int, column: Index, lanes: int, body: Callable[[int], None]) -> None:
    """Call ``body(valid)`` with how many of the ``lanes`` columns from ``column`` (a multiple of ``lanes``) on lie
    before ``end``, where any do."""
    rest = end % lanes
    tail = (lambda: when(column < end, lambda: body(rest))) if rest else None
    when(column + lanes <= end, lambda: body(lanes), tail)


def chunks(total: Index, lanes: int, body: Callable[[Index, int], None]) -> None:
    """Call ``body(index, lanes)`` over ``total`` elements: whole vectors, then single elements."""
    whole = total // lanes
    if static(whole) != 0:
        with T.serial(0, whole) as i:
            body(i * lanes, lanes)
    rest = total - whole * lanes
    if static(rest) != 0:
        with T.serial(0, rest) as i:
            body(whole * lanes + i, 1)


def for_each(count: Index, work: Index) -> Callable[[Callable[[Index], None]], None]:
    """Decorator that emits its function as a loop over ``count`` independent tasks.

    Parallel where ``work`` in all is worth it; where that is not known before the call, both loops are emitted.
    """

    def emit(body: Callable[[Index], None]) -> None:
        def serial() -> None:
            with T.serial(0, count) as task:
                body(task)

        def parallel() -> None:
            with T.parallel(0, count) as task:
                body(task)

        size = static(work)
        if static(count) == 1 or (size is not None and size < PARALLEL_WORK):
            serial()
        elif least(work) >= PARALLEL_WORK:
            parallel()
        else:
            when(work < PARALLEL_WORK, serial, parallel)

    return emit


def when(condition: Expr | bool, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """``body`` under ``condition``, which may be known already."""
    if isinstance(condition, bool):
        if condition:
            body()
        elif otherwise is not None:
            otherwise()
        return
    with T.If(condition):
        with T.Then():
            body()
        if otherwise is not None:
            with T.Else():
                otherwise()


def accumulators(rows: int, vectors: int, lanes: int, dtype: str) -> list[list[Buffer]]:
    """One small buffer a register: LLVM promotes each to a vector register."""
    return [[T.alloc_buffer((lanes,), dtype) for _ in range(vectors)] for _ in range(rows)]


def held(value: Index) -> Index:
    """``value``, from a register: TVM's simplifier, which looks through what is only bound, can take minutes over the
    quotients and bounds of an index of an index."""
    if static(value) is not None:
        return value
    cell = T.alloc_buffer((1,), "int64")
    T.buffer_store(cell, T.cast(value, "int64"), [0])
    return T.bind(cell[0])


def float32(value: float) -> tvm.tirx.FloatImm:
    """``value`` rounded once to float32."""
    return T.float32(float(np.float32(value)))


def int32(value: Index) -> Expr:
    """An int as an int32 constant; an int32 expression as it is."""
    return T.int32(value) if isinstance(value, int) else value


def top_bits(weights: Expr, bits: int, lanes: int) -> Expr:
    """``keep_top_bits`` on an int8 vector: to the nearest multiple of ``2**(8 - bits)``, ties to even; none overflows
    within 119."""
    if bits == 8:
        return weights
    step = 1 << (8 - bits)

    def each(value: int) -> Expr:
        return fill(T.int8(value), lanes)

    # Half a step more, but where that would be a tie rounded to an odd multiple.
    tie = T.cast(tvm.tirx.EQ(weights & each(2 * step - 1), each(step // 2)), vec("int8", lanes))
    return (weights + each(step // 2) - tie) & each(-step)


def row_chunks(rows: Index) -> Index:
    """How many chunks of rows there are; one at least: TVM folds what even a branch never taken divides by."""
    count = ceil_div(rows, CHUNK_ROWS)
    return count if static(count) is not None else T.max(count, 1)


def by_rows(rows: Index, most: int, body: Callable[[int], None]) -> None:
    """Emit ``body`` with the rows of its register tile, at most ``most``, chosen so that ``rows`` split evenly.

    Where a call may turn out to have one row, a body for one row is emitted beside the general one.
    """
    count = static(rows)
    if count is not None and count <= CHUNK_ROWS:
        body(ceil_div(count, ceil_div(count, most)))
    elif count is None and least(rows) == 1:
        when(rows == 1, lambda: body(1), lambda: body(most))
    else:
        body(most)
