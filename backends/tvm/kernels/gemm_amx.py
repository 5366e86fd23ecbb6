"""The int8 product on AMX: tiles of 16 rows by 64 inputs times 64 inputs by 16 columns, summed up in tile registers.

Weights in words of four lie as the unit takes them; activations are read where they lie, int8 or uint8 with 128 added,
the rows of a tile an equal step apart. A block of sums, a few tiles, goes through a small buffer to the epilogue, which
is AVX512's: it works on the block before while the unit multiplies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels import amx
from t3c_compile.backends.tvm.kernels.amx import BYTES, REGISTERS, ROWS, WORDS
from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    ceil_div,
    fill,
    for_each,
    held,
    int32,
    load,
    prefetch,
    product,
    size_at,
    static,
    store,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa
from t3c_compile.backends.tvm.kernels.product import ColumnSums, Epilogue, Product, Rows, joined
from t3c_compile.backends.tvm.kernels.tile import Tile

_TASKS = 8  # into which a product is cut at least, so that it divides well between threads
_SHORT = 1024  # inputs: sums of fewer are short
_IN_TURN = 384  # inputs: functions of sums of no more are worked out in turn with them
_CHUNK_ROWS = 512  # of a task, where there are more than twice as many
_AHEAD = 2  # panels, whose weights are asked for
_CHAINS = 8  # of dot products that do not wait for each other


def default_tile(lead: Sequence[int | str], columns: int, depth: int) -> Tile:
    """The tile of a product that was not tuned, as :func:`gemm.default_tile` says."""
    rows = prod(size_at(size, {}) for size in lead)
    tiles = ceil_div(rows, ROWS)
    if tiles == 1:
        return Tile(rows if all(isinstance(size, int) for size in lead) else ROWS, 4, rows)
    # Two by two, all of one height; one by two where results take as long as products: small blocks mix them better.
    high = 1 if depth < _SHORT else 2
    height = ceil_div(rows, ceil_div(tiles, high) * high)
    # Where columns are too few to divide well between threads, rows are divided, too.
    chunk = rows if ceil_div(columns, 2 * BLOCK) >= _TASKS else ceil_div(tiles, 2) * ROWS
    return Tile(high * height, 2, chunk if rows <= 2 * _CHUNK_ROWS else _CHUNK_ROWS)


def fits(tile: Tile) -> bool:
    """Whether the registers hold the sums of ``tile``, its rows and a register of weights."""
    high = ceil_div(tile.rows, ROWS)
    return high * tile.vectors + high < REGISTERS


def spans(panels: int, parts: int) -> int:
    """Into how many spans ``panels`` are cut at most, where rows are in ``parts``."""
    return min(panels, ceil_div(_TASKS, parts))


def multiply(isa: Isa, p: Product, x: Rows, weights: Buffer, epilogue: Epilogue, tile: Tile) -> None:
    """Emit the product, as :func:`gemm.multiply` says, with weights that were rounded at load."""
    assert p.bits == 8
    p, x = joined(p, x)
    cut = _cut(p, x, tile)
    width = tile.vectors * BLOCK
    panels, share = ceil_div(p.columns, width), ceil_div(tile.chunk, cut.high * ROWS) * cut.high
    # One at least: TVM folds what even a branch never taken divides by.
    parts = ceil_div(cut.tiles, share) if static(p.rows) is not None else T.max(ceil_div(cut.tiles, share), 1)
    span = ceil_div(panels, spans(panels, static(parts) or 1))
    across = ceil_div(panels, span)

    @for_each(p.groups * across * parts, product((p.groups, p.rows, p.columns, p.inputs, *x.kernel)))
    def _(task: Index) -> None:
        group, part = T.bind(task // (across * parts)), T.bind(task // across % parts)
        first, tiles = T.bind(task % across * span), T.bind(part * share)
        task_ = _Task(isa, p, x, weights, epilogue, tile.vectors, cut, group, first, span)
        task_.emit((tiles, T.bind(T.min(tiles + share, cut.tiles))), T.bind(T.min(first + span, panels)))


@dataclass(frozen=True)
class _Cut:
    """Rows as ``tiles`` tiles of ``rows`` rows, ``high`` of them in a block; ``first(tile)`` is a tile's first row.

    Where rows do not divide evenly, the last tile has some that the one before has, too.
    """

    tiles: Index
    rows: Index
    high: int
    first: Callable[[Index], Index]


def _cut(p: Product, x: Rows, tile: Tile) -> _Cut:
    high, count = ceil_div(tile.rows, ROWS), static(p.rows)
    if x.run is not None:
        run, in_run = x.run, ceil_div(x.run, ROWS)
        rows: Index = ceil_div(run, in_run)
        tiles: Index = p.rows // run * in_run

        def first(tile: Index) -> Index:
            return held(tile // in_run * run + T.min(tile % in_run * rows, run - rows))
    else:
        most = ceil_div(tile.rows, high)
        rows = min(count, most) if count is not None else T.bind(T.cast(T.min(p.rows, most), "int64"))
        tiles = ceil_div(p.rows, rows)

        def first(tile: Index) -> Index:
            return held(T.min(tile * rows, p.rows - rows))

    return _Cut(tiles, rows, high if count is None else min(high, tiles), first)


class _Task:
    """Some tiles of rows times up to ``span`` panels of columns from ``panel`` on."""

    def __init__(
        self,
        isa: Isa,
        p: Product,
        x: Rows,
        weights: Buffer,
        epilogue: Epilogue,
        vectors: int,
        cut: _Cut,
        group: Index,
        panel: Index,
        span: int,
    ) -> None:
        self.isa, self.p, self.x, self.epilogue, self.cut, self.group = isa, p, x, epilogue, cut, group
        self.weights, self.vectors, self.panel, self.span = weights, vectors, panel, span
        self.taps, self.words = x.kernel[0] * x.kernel[1], ceil_div(p.inputs, QUAD)
        self.tap_bytes = ceil_div(p.stored_inputs, QUAD) * BYTES
        # Packed weights start a new block for each group.
        self.base = T.bind(group * (ceil_div(p.columns, BLOCK) * self.taps * self.tap_bytes)) if p.groups > 1 else 0
        # A processor follows long streams of weights by itself, and many rows take little from memory.
        few = static(p.rows) is None or p.rows <= _CHUNK_ROWS
        self.asks = few and self.taps == 1 and p.inputs < _SHORT
        # Functions take the unit's port of the processor: they are worked out in turn with short sums, many at once.
        self.together = epilogue.at_once if p.inputs <= _IN_TURN else 1
        self.offset = p.zero_point + (0 if x.buffer.dtype == "int8" else isa.offset)
        # Steps of one size, where zeros follow the inputs over the next weights; else whole ones, and a last one that
        # zeros fill up.
        steps = ceil_div(self.words, WORDS)
        padded = ceil_div(self.words, steps) * steps
        if padded * QUAD <= x.end and padded <= ceil_div(p.stored_inputs, QUAD):
            self.words = padded
        even = self.words % steps == 0
        self.step_words = self.words // steps if even else WORDS
        self.steps, self.tail = divmod(self.words, self.step_words)

    def emit(self, tiles: tuple[Index, Index], end: Index) -> None:
        """Panels before ``end`` times the tiles from the first to before the second."""
        high, (whole, rest) = self.cut.high, divmod(self.p.columns, self.vectors * BLOCK)
        amx.configure(self.cut.rows, self.step_words, high * self.vectors, high)
        self.scratch = T.alloc_buffer((high * ROWS * self.vectors * BLOCK,), "int32")
        starts = self.span * self.vectors * BLOCK
        self.starts = T.alloc_buffer((starts,), "int32") if static(self.offset) != 0 else None
        if whole:
            self._panels(tiles, self.panel, T.bind(T.min(end, whole) - self.panel), self.vectors, BLOCK)
        if rest:
            vectors, last = ceil_div(rest, BLOCK), rest % BLOCK or BLOCK
            when(end > whole, lambda: self._panels(tiles, whole, 1, vectors, last))
        amx.instruction("tilerelease")

    def _panels(self, tiles: tuple[Index, Index], panel: Index, count: Index, vectors: int, last: int) -> None:
        """``count`` panels of ``vectors`` blocks of columns, of the last of which ``last`` columns are there."""
        first = T.bind(panel * self.vectors)
        weights = _Weights(self, first, count, vectors)
        if self.starts is not None:
            with T.serial(0, count * vectors) as v:
                store(self.starts, v * BLOCK, fill(T.int32(0), BLOCK), BLOCK)

        def sweep(start: Index, blocks: Index, high: int, first_of_all: Expr | bool) -> None:
            """All panels times ``blocks`` blocks of ``high`` tiles."""
            # TVM folds what even a loop never run divides by.
            divisor = held(T.max(blocks, 1))

            def where(n: Index) -> tuple[Index, Index]:
                """First tile and first block of columns."""
                return held(start + n % divisor * high), held(first + n // divisor * vectors)

            def finish(n: Index) -> Callable[[Index, Index], None]:
                tile, block = where(n)
                return self._finisher(tile, high, block, vectors, last)

            def asked(n: Index) -> tuple[Index, Index]:
                """The block's share of the lines that a step of a later panel takes."""
                share = (weights.lines + divisor - 1) // divisor
                line = held(T.min(n % divisor * share, weights.lines))
                return line, held(T.min(line + share, weights.lines))

            def sums(n: Index, between: Callable[[Index, int], None]) -> None:
                lines = asked(n) if self.asks else None
                emit = partial(self._sums, *where(n), high, weights, lines, between)
                if self.starts is None:
                    emit()
                else:
                    begins = T.And(T.And(self.offset != 0, first_of_all), n % divisor == 0)
                    when(begins, partial(emit, self.starts), emit)

            def all_blocks() -> None:
                total, rows = blocks * count, self.cut.rows
                if self.together > 1:
                    with T.serial(0, total) as n:
                        sums(n, lambda step, steps: None)
                        finish(n)(0, ceil_div(rows, self.together))
                    return
                sums(0, lambda step, steps: None)
                with T.serial(0, total - 1) as before:
                    end = finish(before)

                    def between(step: Index, steps: int) -> None:
                        end(rows * step // steps, rows * (step + 1) // steps)

                    sums(before + 1, between)
                finish(total - 1)(0, rows)

            when(blocks * count > 0, all_blocks)

        high, total = self.cut.high, tiles[1] - tiles[0]
        sweep(tiles[0], T.bind(total // high), high, True)
        for left in range(1, high):
            when(total % high == left, partial(sweep, tiles[1] - left, 1, left, total < high))

    def _start(self, block: Index) -> Index:
        return (block - self.panel * self.vectors) * BLOCK

    def _sums(
        self,
        tile: Index,
        block: Index,
        high: int,
        weights: "_Weights",
        lines: tuple[Index, Index] | None,
        between: Callable[[Index, int], None],
        starts: Buffer | None = None,
    ) -> None:
        """The sums of ``high`` tiles and the blocks of a panel; ``between(step, steps)`` follows each step, which asks
        for ``lines`` of a later panel, if any. With ``starts``, what the panel's sums start from goes there."""
        x, vectors, left = self.x, weights.vectors, self.cut.high * self.vectors
        right = left + self.cut.high
        places = [T.bind(x.place(self.cut.first(tile + i)) + self.group * self.p.inputs) for i in range(high)]
        for cell in range(high * vectors):
            amx.instruction("tilezero", cell)

        def add(load_rows: Callable[[int, int], None], load_weights: Callable[[int, int], None]) -> None:
            for v in range(vectors):
                register = right + v % (REGISTERS - right)
                for i in range(high):
                    if v == 0:
                        load_rows(left + i, i)
                    if i == 0:
                        load_weights(register, v)
                    amx.add_products(i * vectors + v, left + i, register, x.buffer.dtype)

        steps = self.steps + (self.tail > 0)
        totals = ColumnSums(self.isa, vectors, ceil_div(_CHAINS, vectors)) if starts is not None else None
        with x.taps() as (tap, far):
            with T.serial(0, self.steps) as k:
                word = k * self.step_words
                add(
                    lambda register, i: amx.load(register, x.buffer, places[i] + far + word * QUAD, x.step),
                    lambda register, v: weights.load(register, block + v, tap, word),
                )
                if totals is not None:
                    weights.add_to(totals, block, tap, word, self.step_words)
                if lines is not None:
                    weights.ask(lines, block, tap, word)
                between(tap * steps + k, self.taps * steps)
            if self.tail:
                ends = [self._filled_up(place + far + self.steps * BYTES) for place in places]
                add(
                    lambda register, i: amx.load(register, ends[i], 0, BYTES),
                    lambda register, v: weights.load_tail(register, block + v, tap),
                )
                if totals is not None:
                    weights.add_to(totals, block, tap, self.steps * WORDS, self.tail)
                between(tap * steps + self.steps, self.taps * steps)
        for i in range(high):
            for v in range(vectors):
                amx.store_sums(i * vectors + v, self.scratch, (i * ROWS * vectors + v) * BLOCK, vectors * BYTES)
        if totals is not None:
            for v in range(vectors):
                start = totals.of(v) * fill(int32(-1 * self.offset), BLOCK)
                store(starts, self._start(block + v), start, BLOCK)

    def _finisher(
        self, tile: Index, high: int, block: Index, vectors: int, last: int
    ) -> Callable[[Index, Index], None]:
        """What hands the rows from one to before another of each tile to the epilogue; in turn, they count in groups of
        those that it takes at once."""
        firsts = [self.cut.first(tile + i) for i in range(high)]
        column = T.bind(self.group * self.p.columns + block * BLOCK)

        def finish(start: Index, end: Index) -> None:
            with T.serial(start, end) as n:
                # Where groups do not divide the rows, the last has one several times.
                end_row, group = self.cut.rows - 1, range(self.together)
                rows = [n] if len(group) == 1 else [T.bind(T.min(n * len(group) + r, end_row)) for r in group]
                for i, first in enumerate(firsts):
                    for v in range(vectors):
                        places = [((i * ROWS + row) * vectors + v) * BLOCK for row in rows]
                        sums = [load(self.scratch, place, BLOCK) for place in places]
                        if self.starts is not None:
                            begin = load(self.starts, self._start(block + v), BLOCK)
                            sums = [T.bind(total + begin) for total in sums]
                        valid = last if v == vectors - 1 else BLOCK
                        self.epilogue.store([first + row for row in rows], column + v * BLOCK, valid, sums)

        return finish

    def _filled_up(self, place: Index) -> Buffer:
        """The last words of each row of a tile, filled up with zeros."""
        dtype, size = self.x.buffer.dtype, self.tail * QUAD
        ends = T.alloc_buffer((ROWS * BYTES,), dtype)
        with T.serial(0, self.cut.rows) as r:
            store(ends, r * BYTES, fill(T.cast(0, dtype), BYTES), BYTES)
            store(ends, r * BYTES, load(self.x.buffer, place + r * self.x.step, size), size)
        return ends


class _Weights:
    """The weights of ``count`` panels of ``vectors`` blocks of 16 columns, from block ``first`` on."""

    def __init__(self, task: _Task, first: Index, count: Index, vectors: int) -> None:
        self.task, self.first, self.vectors = task, first, vectors
        self.lines = vectors * task.step_words
        if task.tail:
            self.tails = self._tails(count)

    def at(self, block: Index, tap: Index, k: Index) -> Index:
        """Where word ``k`` of a block's tap lies."""
        task = self.task
        return task.base + (block * task.taps + tap) * task.tap_bytes + k * BYTES

    def load(self, register: int, block: Index, tap: Index, k: Index) -> None:
        """A step's words from word ``k`` on."""
        amx.load(register, self.task.weights, self.at(block, tap, k), BYTES)

    def ask(self, lines: tuple[Index, Index], block: Index, tap: Index, k: Index) -> None:
        """Prefetch ``lines``, of the first ``self.lines``, of what a later panel loads at word ``k``."""
        words = self.task.step_words
        with T.serial(*lines) as line:
            later = block + _AHEAD * self.vectors + line // words
            place = self.at(later, tap, k + line % words)
            prefetch(self.task.weights, T.min(place, self.task.weights.shape[0] - BYTES))

    def add_to(self, sums: ColumnSums, block: Index, tap: Index, k: Index, words: int) -> None:
        """Sum up ``words`` words from word ``k`` on, beside the unit's products of them."""
        for v in range(self.vectors):
            start = T.bind(self.at(block + v, tap, k))
            for word in range(words):
                sums.add(v, word, load(self.task.weights, start + word * BYTES, BYTES))

    def load_tail(self, register: int, block: Index, tap: Index) -> None:
        """The last words, and zeros."""
        amx.load(register, self.tails, self._tail(block - self.first, tap), BYTES)

    def _tail(self, block: Index, tap: Index) -> Index:
        return (block * self.task.taps + tap) * (WORDS * BYTES)

    def _tails(self, count: Index) -> Buffer:
        task = self.task
        tails = T.alloc_buffer((task.span * self.vectors * task.taps * WORDS * BYTES,), "int8")
        with T.serial(0, count * self.vectors) as block, T.serial(0, task.taps) as tap:
            start = T.bind(self._tail(block, tap))
            with T.serial(0, task.tail) as k:
                word = load(task.weights, self.at(self.first + block, tap, task.steps * WORDS + k), BYTES)
                store(tails, start + k * BYTES, word, BYTES)
            with T.serial(0, WORDS - task.tail) as k:
                store(tails, start + (task.tail + k) * BYTES, fill(T.int8(0), BYTES), BYTES)
        return tails
