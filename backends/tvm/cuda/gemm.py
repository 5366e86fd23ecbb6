"""Products of int8 on tensor cores: linear layers, convolutions as implicit GEMM, and both products of attention.

A block computes a tile of rows x columns; tiles of both factors go through registers, where weights are rounded to
their width, into shared memory, two steps deep, and each warp adds products of 16 x 32 by 32 x 8 (``mma.sync``
m16n8k32). Four int8 along the reduction are a word, the unit of everything here. A row's values past the reduction's
end are zero, so weights past a profile's rank may be anything.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.cuda.threads import WARP, barrier, copy, grid, rounded_word
from t3c_compile.backends.tvm.kernels.emit import Buffer, Index, ceil_div, static, when

_STEP = 16  # words of the reduction a step: two products deep
_PITCH = _STEP + 4  # words from a row to the next in shared memory: eight rows' words lie in different banks
_FILL = 132  # blocks that give every multiprocessor of a large GPU one


@dataclass(frozen=True)
class Tile:
    """``rows`` x ``columns`` of a block, in warps of 32 x 32 (or of 16 rows, where there are no more)."""

    rows: int
    columns: int

    @property
    def warp_rows(self) -> int:
        return min(32, self.rows)

    @property
    def warps(self) -> tuple[int, int]:
        return self.rows // self.warp_rows, self.columns // 32

    @property
    def threads(self) -> int:
        return self.warps[0] * self.warps[1] * WARP


# From the largest on; the last is for few rows.
TILES = (Tile(128, 128), Tile(128, 64), Tile(64, 64), Tile(32, 64), Tile(32, 32), Tile(16, 32))


@dataclass(frozen=True)
class Product:
    """``rows x columns`` over ``taps`` times ``tap_words`` words, ``batch`` times (or of so many groups)."""

    rows: Index
    columns: Index
    taps: int
    tap_words: Index
    bits: int = 8
    batch: Index = 1

    @property
    def words(self) -> Index:
        return self.taps * self.tap_words


@dataclass(frozen=True)
class Left:
    """The rows. ``state(batch, row)``: ``states`` numbers of a row, once for all steps. ``at(state, tap, word)``: where
    ``width`` words lie, and whether they are there (None: always); where they are not, each is ``outside``.

    They are read from int32 ``buffer`` at once, or, where rows lie anywhere, a word by ``fetch(place, word)``.
    """

    state: Callable[[Index, Index], list[Expr]]
    at: Callable[[list[Expr], Index, Index], tuple[Index, Expr | None]]
    buffer: Buffer
    width: int
    states: int = 1
    outside: Expr | None = None
    fetch: Callable[[Index, Index], Expr] | None = None


@dataclass(frozen=True)
class Right:
    """The columns, as words in ``buffer``: ``place(batch, column)`` is where a column starts; a tap is ``tap_stride``
    words. ``width`` words are loaded at once."""

    buffer: Buffer
    place: Callable[[Index, Index], Index]
    tap_stride: Index
    width: int


# epilogue(batch, row, column, int32 sum)
Epilogue = Callable[[Index, Index, Index, Expr], None]


def choose_tile(rows: Index, columns: Index, batch: Index) -> Tile:
    """The largest tile that still gives a large GPU enough blocks; the least where none does."""
    known, wide, many = static(rows), static(columns), static(batch) or 1
    if known is None or wide is None:
        return Tile(64, 64)
    if known <= 16:
        return TILES[-1]
    for tile in TILES[:-1]:
        if many * ceil_div(known, tile.rows) * ceil_div(wide, tile.columns) >= _FILL:
            return tile
    return TILES[-2]


def multiply(p: Product, left: Left, right: Right, epilogue: Epilogue, tile: Tile | None = None) -> None:
    """Emit the product; ``epilogue`` gets each sum, in the thread that holds it."""
    tile = tile or choose_tile(p.rows, p.columns, p.batch)
    counts = [ceil_div(p.rows, tile.rows), ceil_div(p.columns, tile.columns), p.batch]
    with grid(counts, tile.threads) as (row_block, column_block, batch, thread):
        row, column = T.bind(row_block * tile.rows), T.bind(column_block * tile.columns)
        _Block(p, left, right, epilogue, tile, batch, row, column, thread).emit()


@dataclass(frozen=True)
class _Block:
    product: Product
    left: Left
    right: Right
    epilogue: Epilogue
    tile: Tile
    batch: Index
    row: Index
    column: Index
    thread: Expr

    def emit(self) -> None:
        p, tile, left, right = self.product, self.tile, self.left, self.right
        steps = ceil_div(p.words, _STEP)
        # Two steps of each factor, shared; and what a thread loads of each.
        a, b = (T.alloc_buffer((2 * size * _PITCH,), "int32", scope="shared") for size in (tile.rows, tile.columns))
        a_loads, b_loads = self._loads(tile.rows, left.width), self._loads(tile.columns, right.width)
        a_ahead, b_ahead = (
            T.alloc_buffer((count * width,), "int32", scope="local")
            for count, width in ((a_loads, left.width), (b_loads, right.width))
        )
        states = self._states(a_loads, left.states, self._row_state)
        (starts,) = self._states(b_loads, 1, self._start)
        sums = T.alloc_buffer((tile.warp_rows,), "int32", scope="local")
        with T.unroll(0, tile.warp_rows) as i:
            T.buffer_store(sums, T.int32(0), [i])

        def fetch(step: Index) -> None:
            with T.unroll(0, a_loads) as n:
                word = T.bind(step * _STEP + self._part(left.width, n)[1])
                self._fetch_left(a_ahead, n * left.width, [state[n] for state in states], word)
            with T.unroll(0, b_loads) as n:
                word = T.bind(step * _STEP + self._part(right.width, n)[1])
                self._fetch_right(b_ahead, n * right.width, starts[n], word)

        def put(half: Index) -> None:
            for ahead, shared, loads, width, lines in (
                (a_ahead, a, a_loads, left.width, tile.rows),
                (b_ahead, b, b_loads, right.width, tile.columns),
            ):
                with T.unroll(0, loads) as n:
                    line, word = self._part(width, n)
                    where = (half * lines + line) * _PITCH + word
                    copy(shared, where, ahead, n * width, width)

        fetch(0)
        put(0)
        barrier()
        with T.serial(0, steps) as step:
            half = T.bind(step % 2)
            when(step + 1 < steps, lambda: fetch(step + 1))
            self._add(sums, a, b, half)
            when(step + 1 < steps, lambda: put(1 - half))
            barrier()
        self._finish(sums)

    def _loads(self, lines: int, width: int) -> int:
        """Loads of a thread for ``lines`` of a step, ``width`` words each; tiles are such that all have as many."""
        return lines * _STEP // width // self.tile.threads

    def _part(self, width: int, number: Index) -> tuple[Expr, Expr]:
        """Line and first word of a thread's load ``number``."""
        across = _STEP // width
        place = T.bind(self.thread + number * self.tile.threads)
        return T.bind(place // across), T.bind(place % across * width)

    def _states(self, loads: int, count: int, of: Callable[[Index], list[Expr]]) -> list[Buffer]:
        """The ``count`` numbers ``of`` each load, kept: read back, they are not worked out again at every use."""
        sizes = (self.product.rows, self.product.columns, self.product.words, self.product.batch)
        dtype = "int64" if any(static(size) is None for size in sizes) else "int32"
        buffers = [T.alloc_buffer((loads,), dtype, scope="local") for _ in range(count)]
        with T.unroll(0, loads) as n:
            for buffer, value in zip(buffers, of(n), strict=True):
                T.buffer_store(buffer, T.cast(value, dtype), [n])
        return buffers

    def _row_state(self, number: Index) -> list[Expr]:
        line = self._part(self.left.width, number)[0]
        return self.left.state(self.batch, T.bind(T.min(self.row + line, self.product.rows - 1)))

    def _start(self, number: Index) -> list[Expr]:
        line = self._part(self.right.width, number)[0]
        return [self.right.place(self.batch, T.bind(T.min(self.column + line, self.product.columns - 1)))]

    def _fetch_left(self, ahead: Buffer, at: Index, state: list[Expr], word: Index) -> None:
        left = self.left

        def fill(value: Expr) -> None:
            for i in range(left.width):
                T.buffer_store(ahead, value, [at + i])

        def inside() -> None:
            tap, inner = self._tap(word)
            where, valid = left.at(state, tap, inner)

            def take() -> None:
                if left.fetch is None:
                    copy(ahead, at, left.buffer, where, left.width)
                else:
                    T.buffer_store(ahead, left.fetch(where, inner), [at])

            when(
                True if valid is None else valid,
                take,
                lambda: fill(T.int32(0) if left.outside is None else left.outside),
            )

        when(self._is_inside(word), inside, lambda: fill(T.int32(0)))

    def _fetch_right(self, ahead: Buffer, at: Index, start: Expr, word: Index) -> None:
        p, right = self.product, self.right

        def inside() -> None:
            tap, inner = self._tap(word)
            copy(ahead, at, right.buffer, start + tap * right.tap_stride + inner, right.width)
            if p.bits < 8:
                for i in range(right.width):
                    T.buffer_store(ahead, rounded_word(ahead[at + i], p.bits), [at + i])

        when(self._is_inside(word), inside)

    def _tap(self, word: Index) -> tuple[Index, Index]:
        p = self.product
        return (0, word) if p.taps == 1 else (T.bind(word // p.tap_words), T.bind(word % p.tap_words))

    def _is_inside(self, word: Index) -> Expr | bool:
        """Whether words from ``word`` on are of the reduction; a load's words all are, or none."""
        known = static(self.product.words)
        return True if known is not None and known % _STEP == 0 else word < self.product.words

    def _add(self, sums: Buffer, a: Buffer, b: Buffer, half: Index) -> None:
        """The products of a step. Lanes lie as in PTX's fragments: a row or column every four lanes, words across."""
        tile = self.tile
        lane, warp = T.bind(self.thread % WARP), T.bind(self.thread // WARP)
        line, across = T.bind(lane // 4), T.bind(lane % 4)
        top = T.bind(half * tile.rows + warp % tile.warps[0] * tile.warp_rows + line)
        left = T.bind(half * tile.columns + warp // tile.warps[0] * 32 + line)
        with T.unroll(0, _STEP // 8) as part:
            word = T.bind(part * 8 + across)
            values = T.alloc_buffer((8,), "int32", scope="local")
            with T.unroll(0, 4) as n:
                at = T.bind((left + n * 8) * _PITCH + word)
                T.buffer_store(values, b[at], [n * 2])
                T.buffer_store(values, b[at + 4], [n * 2 + 1])
            with T.unroll(0, tile.warp_rows // 16) as m:
                at = T.bind((top + m * 16) * _PITCH + word)
                # Rows and rows + 8, words and words + 4.
                held = [T.bind(a[at + 8 * _PITCH * (i % 2) + 4 * (i // 2)]) for i in range(4)]
                with T.unroll(0, 4) as n:
                    sum_of = T.address_of(sums[(m * 4 + n) * 4])
                    T.evaluate(T.call_extern("void", "t3c_mma", sum_of, *held, values[n * 2], values[n * 2 + 1]))

    def _finish(self, sums: Buffer) -> None:
        p, tile = self.product, self.tile
        lane, warp = T.bind(self.thread % WARP), T.bind(self.thread // WARP)
        top = T.bind(self.row + warp % tile.warps[0] * tile.warp_rows + lane // 4)
        left = T.bind(self.column + warp // tile.warps[0] * 32 + lane % 4 * 2)
        with T.unroll(0, tile.warp_rows // 16) as m, T.unroll(0, 4) as n, T.unroll(0, 4) as i:
            row, column = T.bind(top + m * 16 + i // 2 * 8), T.bind(left + n * 8 + i % 2)
            inside = T.And(row < p.rows, column < p.columns)
            when(inside, lambda: self.epilogue(self.batch, row, column, sums[(m * 4 + n) * 4 + i]))
