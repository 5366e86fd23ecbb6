"""The int8 product on AMX: tiles of 16 rows by 64 inputs times 64 inputs by 16 columns, summed up in tile registers.

Weights in words of four lie as the unit takes them; activations are read where they lie, int8 or uint8 with 128 added,
sixteen rows an equal step apart. A block of sums goes through a small buffer to the epilogue, which is AVX512's and works
on one block while the unit multiplies the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    ceil_div,
    fill,
    for_each,
    int32,
    load,
    product,
    static,
    store,
    when,
)
from t3c_compile.backends.tvm.kernels.gemm import (
    Epilogue,
    Product,
    Rows,
    _narrowed,
    weight_sums,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa
from t3c_compile.backends.tvm.kernels.tile import Tile

_ROWS = 16  # of a tile register
_BYTES = 64  # of a row of one
_WORDS = _BYTES // QUAD
_REGISTERS = 8
_TASKS = 8


def _amx(name: str, *arguments: Expr | int) -> None:
    """One instruction; a plain int is the number of a tile register."""
    given = [T.int8(a) if isinstance(a, int) else a for a in arguments]
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *given))


def _load(register: int, buffer: Buffer, at: Index, step: Index) -> None:
    _amx("tileloadd64", register, T.address_of(buffer[at]), T.int64(step))


@dataclass(frozen=True)
class _Grid:
    """How rows are cut: ``count`` registers of ``rows`` rows, ``high`` of them in a block."""

    rows: Index
    count: Index
    high: int
    first: Callable[[Index], Index]


def _grid(p: Product, x: Rows, tile: Tile) -> _Grid:
    count = static(p.rows)
    high = ceil_div(tile.rows, _ROWS)
    if x.run is not None:
        run, in_run = x.run, ceil_div(x.run, _ROWS)
        rows = ceil_div(run, in_run)
        # The last of a run may take rows that the one before takes, too.
        return _Grid(
            rows,
            p.rows // run * in_run,
            high,
            lambda i: T.bind(i // in_run * run + T.min(i % in_run * rows, run - rows)),
        )
    if count is not None:
        rows = min(count, ceil_div(tile.rows, high))
        return _Grid(rows, ceil_div(count, rows), high, lambda i: T.bind(T.min(i * rows, count - rows)))
    of_call = T.bind(T.cast(T.min(p.rows, ceil_div(tile.rows, high)), "int64"))
    return _Grid(
        of_call, T.max(ceil_div(p.rows, of_call), 1), high, lambda i: T.bind(T.min(i * of_call, p.rows - of_call))
    )


def multiply(isa: Isa, p: Product, x: Rows, weights: Buffer, epilogue: Epilogue, tile: Tile) -> None:
    """Emit the product, as :func:`gemm.multiply` says."""
    grid = _grid(p, x, tile)
    width = tile.vectors * BLOCK
    panels = ceil_div(p.columns, width)
    share = max(1, tile.chunk // _ROWS)
    parts = ceil_div(grid.count, share)
    known = static(parts)
    # Rounded weights are kept for a panel at a time.
    span = 1 if p.bits < 8 else ceil_div(panels, ceil_div(_TASKS, min(known, _TASKS)) if known else 2)
    spans = ceil_div(panels, span)
    taps = x.kernel[0] * x.kernel[1]

    @for_each(p.groups * spans * parts, product((p.groups, p.rows, p.columns, p.inputs, taps)))
    def _(task: Index) -> None:
        first = T.bind(task % spans * span)
        part = T.bind(task // spans % parts)
        group = T.bind(task // (spans * parts))
        tiles = T.bind(part * share), T.bind(T.min(part * share + share, grid.count))
        last = T.bind(T.min(first + span, panels)) if panels % span else first + span
        _Task(isa, p, x, weights, epilogue, tile.vectors, grid, group).emit(tiles, (first, last), span)


def _configure(rows: Index, words: int, sums: int, left: int) -> None:
    """Shape the registers: first ``sums`` of sums, then ``left`` of activations, the rest of weights."""
    config = T.alloc_buffer((64,), "uint8")
    store(config, 0, fill(T.uint8(0), 64), 64)
    T.buffer_store(config, T.uint8(1), [0])
    for register in range(_REGISTERS):
        of_rows = register < sums + left
        of_inputs = sums <= register < sums + left
        T.buffer_store(config, T.uint8(words * QUAD if of_inputs else _BYTES), [16 + 2 * register])
        T.buffer_store(config, T.cast(rows, "uint8") if of_rows else T.uint8(words), [48 + register])
    _amx("ldtilecfg", T.address_of(config[0]))


class _Task:
    """Some registers of rows times some panels of columns."""

    def __init__(
        self,
        isa: Isa,
        p: Product,
        x: Rows,
        weights: Buffer,
        epilogue: Epilogue,
        vectors: int,
        grid: _Grid,
        group: Index,
    ) -> None:
        self.isa, self.p, self.x, self.epilogue, self.grid, self.group = isa, p, x, epilogue, grid, group
        self.weights, self.vectors, self.width = weights, vectors, vectors * BLOCK
        self.taps = x.kernel[0] * x.kernel[1]
        self.words = ceil_div(p.inputs, QUAD)
        self.tap_bytes = ceil_div(p.stored_inputs, QUAD) * _BYTES
        self.base = T.bind(group * (ceil_div(p.columns, BLOCK) * self.taps * self.tap_bytes)) if p.groups > 1 else 0
        self.offset = (128 if x.buffer.dtype == "uint8" else 0) + p.zero_point
        self.dot = "tdpbusd" if x.buffer.dtype == "uint8" else "tdpbssd"
        steps = ceil_div(self.words, _WORDS)
        if self.words % steps == 0:
            self.step_words, self.steps, self.tail = self.words // steps, steps, 0
        else:
            self.step_words, (self.steps, self.tail) = _WORDS, divmod(self.words, _WORDS)
        self.sums: Buffer = None

    def place(self, block: Index, tap: Index, k: Index) -> Index:
        """Where word ``k`` of a block of 16 columns lies."""
        return self.base + block * (self.taps * self.tap_bytes) + tap * self.tap_bytes + k * _BYTES

    def emit(self, tiles: tuple[Index, Index], panels: tuple[Index, Index], span: int) -> None:
        grid, high = self.grid, self.grid.high
        whole = self.p.columns // self.width
        self.first_column, self.span = T.bind(panels[0] * self.width), span
        if static(self.offset) != 0:
            self.sums = T.alloc_buffer((span * self.width,), "int32")
        _configure(grid.rows, self.step_words, high * self.vectors, high)
        self.scratch = T.alloc_buffer((2 * high * self.vectors * _ROWS * BLOCK,), "int32")

        def of_panels(first: Index, count: Index, vectors: int, columns: int) -> None:
            self._start(first, count, vectors)
            self._sweep(tiles, high, first, count, vectors, columns)

        rest = self.p.columns - whole * self.width
        if whole:
            of_panels(panels[0], T.bind(T.min(panels[1], whole) - panels[0]), self.vectors, self.width)
        if rest:
            when(panels[1] > whole, lambda: of_panels(whole, 1, ceil_div(rest, BLOCK), rest))
        _amx("tilerelease")

    def _start(self, first: Index, count: Index, vectors: int) -> None:
        """What each column of some panels starts from; weights of fewer bits rounded."""
        isa = self.isa
        self.step, self.at = _BYTES, self.place
        self.source = self.weights
        if self.p.bits < 8:
            column = T.bind(first * self.width // BLOCK)
            self.source, at = _narrowed(
                isa,
                self.weights,
                lambda v, tap, k: self.place(column + v, tap, k),
                self.taps,
                self.words,
                vectors,
                self.p.bits,
            )
            self.step = _BYTES * vectors
            self.at = lambda block, tap, k: at(block - column, tap, k)
        if self.sums is not None:

            def summed() -> None:
                with T.serial(0, count) as panel:
                    block = T.bind((first + panel) * self.vectors)
                    totals = weight_sums(
                        isa,
                        self.source,
                        lambda v, tap, k: self.at(block + v, tap, k),
                        self.taps,
                        self.words,
                        vectors,
                        8,
                    )
                    for v, total in enumerate(totals):
                        start = load(total, 0, BLOCK) * fill(int32(-1 * self.offset), BLOCK)
                        store(self.sums, (block + v) * BLOCK - self.first_column, start, BLOCK)

            def nothing() -> None:
                with T.serial(0, count * vectors) as v:
                    store(
                        self.sums, first * self.width - self.first_column + v * BLOCK, fill(T.int32(0), BLOCK), BLOCK
                    )

            when(self.offset != 0, summed, nothing)
        if self.tail:
            self.tails = self._tail_of_weights(first, count, vectors)
            self.tails_first = first

    def _sweep(
        self, tiles: tuple[Index, Index], high: int, first: Index, count: Index, vectors: int, columns: int
    ) -> None:
        """All rows times ``count`` panels from ``first`` on."""

        def rows(start: Index, blocks: Index, high: int) -> None:
            half = self.grid.high * self.vectors * _ROWS * BLOCK

            def where(n: Index) -> tuple[Index, Index, Index]:
                return (
                    T.bind(start + n // count * high),
                    T.bind((first + n % count) * self.vectors),
                    T.bind(n % 2 * half),
                )

            with T.serial(0, blocks * count) as n:
                tile, column, into = where(n)
                self._block(tile, high, column, vectors, into)
                when(n > 0, lambda: self._finish(*where(n - 1), high, vectors, columns))
            when(blocks * count > 0, lambda: self._finish(*where(blocks * count - 1), high, vectors, columns))

        total = tiles[1] - tiles[0]
        rows(tiles[0], T.bind(total // high), high)
        if high > 1:
            odd = T.bind(total % high)
            when(odd > 0, lambda: rows(tiles[1] - odd, odd, 1))

    def _block(self, tile: Index, count: int, block: Index, vectors: int, into: Index) -> None:
        """The sums of ``count`` registers of rows and ``vectors`` blocks of columns."""
        x, left = self.x, self.grid.high * self.vectors
        right = left + self.grid.high
        places = [T.bind(x.place(self.grid.first(tile + i)) + self.group * self.p.inputs) for i in range(count)]
        for cell in range(count * vectors):
            _amx("tilezero", cell)

        def dots(weights: Callable[[int, int], None]) -> None:
            for v in range(vectors):
                register = right + v % (_REGISTERS - right)
                weights(v, register)
                for i in range(count):
                    _amx(self.dot, i * vectors + v, left + i, register)

        with x.taps() as (tap, far):
            with T.serial(0, self.steps) as k:
                for i, place in enumerate(places):
                    _load(left + i, x.buffer, place + far + k * (self.step_words * QUAD), x.step)
                dots(lambda v, r: _load(r, self.source, self.at(block + v, tap, k * self.step_words), self.step))
            if self.tail:
                for i, place in enumerate(places):
                    _load(left + i, self._tail_of_rows(place + far + self.steps * _BYTES), 0, _BYTES)
                first = T.bind((block - self.tails_first * self.vectors) * self.taps)
                dots(lambda v, r: _load(r, self.tails, (first + v * self.taps + tap) * (_WORDS * _BYTES), _BYTES))
        for i in range(count):
            for v in range(vectors):
                at = into + (i * _ROWS * vectors + v) * BLOCK
                _amx(
                    "tilestored64",
                    i * vectors + v,
                    T.address_of(self.scratch[at]),
                    T.int64(vectors * _BYTES),
                )

    def _finish(
        self, tile: Index, block: Index, at: Index, count: int, vectors: int, columns: int
    ) -> None:
        """Hand a block of sums to the epilogue."""
        starts = [self.grid.first(tile + i) for i in range(count)]
        column = T.bind(block * BLOCK)
        for i, start in enumerate(starts):
            with T.serial(0, self.grid.rows) as r:
                for v in range(vectors):
                    valid = min(BLOCK, columns - v * BLOCK)
                    total = load(self.scratch, at + ((i * _ROWS + r) * vectors + v) * BLOCK, BLOCK)
                    if self.sums is not None:
                        total = T.bind(total + load(self.sums, column - self.first_column + v * BLOCK, BLOCK))
                    self.epilogue(start + r, self.group * self.p.columns + column + v * BLOCK, valid, total)

    def _tail_of_weights(self, first: Index, count: Index, vectors: int) -> Buffer:
        """The last words of each tap, filled up with zeros to a register."""
        tails = T.alloc_buffer((self.span * vectors * self.taps * _WORDS * _BYTES,), "int8")
        with T.serial(0, count * vectors) as v, T.serial(0, self.taps) as tap:
            at = T.bind((v * self.taps + tap) * (_WORDS * _BYTES))
            with T.serial(0, self.tail) as k:
                word = load(self.source, self.at(first * self.vectors + v, tap, self.steps * _WORDS + k), _BYTES)
                store(tails, at + k * _BYTES, word, _BYTES)
            with T.serial(0, _WORDS - self.tail) as k:
                store(tails, at + (self.tail + k) * _BYTES, fill(T.int8(0), _BYTES), _BYTES)
        return tails

    def _tail_of_rows(self, place: Index) -> Buffer:
        """The last words of each row, filled up with zeros to a register."""
        dtype, size = self.x.buffer.dtype, self.tail * QUAD
        ends = T.alloc_buffer((_ROWS * _BYTES,), dtype)
        with T.serial(0, self.grid.rows) as r:
            store(ends, r * _BYTES, fill(T.cast(0, dtype), _BYTES), _BYTES)
            store(ends, r * _BYTES, load(self.x.buffer, place + r * self.x.step, size), size)
        return ends
