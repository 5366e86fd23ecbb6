"""The int8 row-by-column product on vector units.

A tile of rows x vectors of int32 accumulators stays in registers for the whole reduction.
"""

from collections.abc import Sequence
from functools import partial
from math import prod

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels import gemm_pairs
from t3c_compile.backends.tvm.kernels.emit import (
    CHUNK_ROWS,
    Buffer,
    Index,
    accumulators,
    by_rows,
    ceil_div,
    fill,
    for_each,
    int32,
    load,
    prefetch,
    product,
    size_at,
    static,
    store,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa
from t3c_compile.backends.tvm.kernels.product import (
    Epilogue,
    Place,
    Product,
    Rows,
    joined,
    narrowed_panel,
    spread_word,
    weight_sums,
    weight_words,
)
from t3c_compile.backends.tvm.kernels.tile import Tile

_OPERANDS = 6  # registers that a turn's words of rows may take beside the accumulators, where it has several
_LINE = 64  # bytes a cache line
_SET_UP = 0.02  # of a product's work: what one more chunk of its rows costs, since each task sums up its weights
_NEAR_BYTES = 1 << 13  # asking for a panel of this size costs more than waiting for it


def row_words(isa: Isa, buffer: Buffer, places: list[Index], count: int) -> list[Expr]:
    """Each of ``count`` words of the ``height`` rows at ``places``, as ``dot`` takes it: the rows' one after the other,
    repeated to fill a register."""
    if isa.height == count == 1:
        return [T.bind(spread_word(isa, buffer, places[0]))]
    # Lanes of 32 bits: LLVM then multiplies by a lane where an instruction can.
    size = count * isa.height
    rows = [T.bind(T.reinterpret(vec("int32", size), load(buffer, place, size * QUAD))) for place in places]
    repeats = isa.columns // isa.height
    lanes = [
        [r * size + w * isa.height + i for r in range(isa.height) for _ in range(repeats) for i in range(isa.height)]
        for w in range(count)
    ]
    return [T.bind(T.reinterpret(vec(buffer.dtype, isa.lanes * QUAD), T.Shuffle(rows, order))) for order in lanes]


def row_sums(isa: Isa, cells: list[Buffer], row: int) -> Expr:
    """A row's ``lanes`` sums from the accumulators that hold them."""
    sums = [load(cell, 0, isa.lanes) for cell in cells]
    if len(sums) == 1:
        return sums[0]
    first = row % isa.height * isa.columns
    return T.bind(T.Shuffle(sums, [c * isa.lanes + first + i for c in range(isa.height) for i in range(isa.columns)]))


def multiply(isa: Isa, p: Product, x: Rows, weights: Buffer, epilogue: Epilogue, tile: Tile) -> None:
    """Emit the product, as :func:`gemm.multiply` says."""
    if isa.narrow:
        (p, x), tile = joined(p, x), gemm_pairs.fitted(tile)
    width, chunk = tile.vectors * isa.lanes, tile.chunk
    whole, rest = divmod(p.columns, width)
    panels = ceil_div(p.columns, width)
    # One at least: TVM folds what even a branch never taken divides by.
    parts = ceil_div(p.rows, chunk) if static(p.rows) is not None else T.max(ceil_div(p.rows, chunk), 1)
    taps = x.kernel[0] * x.kernel[1]

    @for_each(p.groups * panels * parts, product((p.groups, p.rows, p.columns, p.inputs, taps)))
    def _(task: Index) -> None:
        panel, group = T.bind(task // parts % panels), T.bind(task // (parts * panels))
        first = T.bind(task % parts * chunk)

        def emit(columns: int) -> None:
            _panel(isa, p, x, weights, epilogue, group, panel * width, columns, first, tile)

        if whole and rest:
            when(panel < whole, lambda: emit(width), lambda: emit(rest))
        else:
            emit(width if whole else rest)


def default_tile(isa: Isa, lead: Sequence[int | str], columns: int) -> Tile:
    """The tile of a product that was not tuned, as :func:`gemm.default_tile` says."""
    rows, known = prod(size_at(size, {}) for size in lead), all(isinstance(size, int) for size in lead)
    vectors = min((4, 3, 2), key=partial(_work, isa, rows, columns)) if known and isa.registers >= 24 else isa.panel
    if rows == 1 and not known:
        return Tile(_height(isa, None, vectors), vectors, CHUNK_ROWS)
    most = gemm_pairs.CHUNK_ROWS if isa.narrow else CHUNK_ROWS
    panels, fewest = ceil_div(columns, vectors * isa.lanes), ceil_div(rows, most)

    def cost(parts: int) -> float:
        return (1 + _SET_UP * (parts - fewest)) * _waiting(panels * parts)

    parts = min(range(fewest, min(2 * fewest, rows) + 1), key=cost)
    chunk = ceil_div(rows, parts)
    height = _height(isa, chunk, vectors)
    return Tile(height, vectors, ceil_div(chunk, height) * height)


def _waiting(tasks: int) -> float:
    """How much longer than their share tasks of one size take, in the mean over one and two threads."""
    return (1 + ceil_div(tasks, 2) * 2 / tasks) / 2


def _work(isa: Isa, rows: int, columns: int, vectors: int) -> float:
    """Roughly what all tiles take, with the rows and columns that they compute and that are not there."""
    whole, rest = divmod(ceil_div(columns, isa.lanes), vectors)
    total = 0.0
    for width, panels in ((vectors, whole), (rest, 1)):
        if width and panels:
            height = _height(isa, rows, width)
            # A tile's products, and what it loads for them; words of two rows are joined in the products' units.
            joins = height // isa.height if isa.height > 1 else 0
            total += panels * ceil_div(rows, height) * (height * width + 0.1 * (height + width) + joins)
    return total


def _height(isa: Isa, rows: int | None, vectors: int) -> int:
    """Rows of a tile, chosen so that ``rows`` split evenly where they are few."""
    most = min(12, isa.registers // vectors)
    if isa.turn > 1:
        # A register for each row besides.
        most = min(most, (isa.registers + _OPERANDS) // (vectors + 1))
    most = max(1, most // isa.height) * isa.height
    return most if rows is None or rows > CHUNK_ROWS else whole_rows(isa, ceil_div(rows, ceil_div(rows, most)))


def whole_rows(isa: Isa, rows: int) -> int:
    """``rows`` of a tile, rounded up to those that fill registers of activations."""
    return ceil_div(rows, isa.height) * isa.height


def _fetch(weights: Buffer, panel: tuple[Index, int], line: Index) -> None:
    """Ask for one line of the next panel's weights. A tile of rows is done with a panel's words sooner than memory
    brings the next ones; later tiles have them in cache, and leave memory idle."""
    start, size = panel
    prefetch(weights, T.min(start + T.min(line * _LINE, size - _LINE), weights.shape[0] - _LINE))


def _add_dot(isa: Isa, cell: Buffer, value: Expr, word: Expr) -> None:
    store(cell, 0, isa.dot(load(cell, 0, isa.lanes), value, word), isa.lanes)


def _panel(
    isa: Isa,
    p: Product,
    x: Rows,
    weights: Buffer,
    epilogue: Epilogue,
    group: Index,
    column: Index,
    columns: int,
    first: Index,
    tile: Tile,
) -> None:
    lanes, chunk = isa.lanes, tile.chunk
    vectors = ceil_div(columns, lanes)
    taps, tap_bytes = x.kernel[0] * x.kernel[1], ceil_div(p.stored_inputs, isa.word) * BLOCK * isa.word
    words = ceil_div(p.inputs, isa.word)
    offset = isa.offset + p.zero_point
    # Packed weights start a new block for each group.
    base = T.bind(group * (ceil_div(p.columns, BLOCK) * taps * tap_bytes)) if p.groups > 1 else 0

    def packed_at(register: int, tap: Index, k: Index) -> Index:
        output = column + register * isa.columns
        block = base + (output // BLOCK) * (taps * tap_bytes)
        return block + tap * tap_bytes + k * (BLOCK * isa.word) + (output % BLOCK) * isa.word

    at: Place = packed_at
    registers, bits, count = vectors * isa.height, p.bits, static(p.rows)
    packed, ahead, panel_bytes = weights, None, vectors * lanes * taps * tap_bytes // BLOCK
    # Narrow weights are read from scratch, and asking for more takes longer than the few instructions of a word.
    if isa.fetches and not isa.narrow and panel_bytes > _NEAR_BYTES and columns == tile.vectors * lanes:
        ahead = T.bind(base + (column // BLOCK) * (taps * tap_bytes) + panel_bytes), panel_bytes
    panel, sums = None, None
    if isa.narrow:
        panel = gemm_pairs.narrow_panel(isa, x, weights, at, words, registers, bits)
        sums = panel.sums
    else:
        if bits < 8 and isa.narrows_panels and (count is None or count > tile.rows):
            weights, at = narrowed_panel(isa, weights, at, taps, words, registers, bits)
            bits = 8
        if static(offset) != 0:
            sums = weight_sums(isa, weights, at, taps, words, registers, bits)
    last = count if count is not None and count <= chunk else T.min(first + chunk, p.rows)

    def sweep(rows: int) -> None:
        rows = whole_rows(isa, rows)
        with T.serial(0, ceil_div(last - first, rows)) as number:
            row = T.bind(first + number * rows)
            acc = accumulators(rows // isa.height, registers, lanes, "int32")
            for line in acc:
                for v, cell in enumerate(line):
                    start = T.int32(0) if sums is None else load(sums[v], 0, lanes)
                    store(
                        cell, 0, fill(start, lanes) if sums is None else start * fill(int32(-1 * offset), lanes), lanes
                    )
            places = [T.bind(x.place(row + r) + group * p.inputs) for r in range(rows)]

            def add(tap: Index, far: Index, first: Index, count: int) -> None:
                """The products of ``count`` words from the first on."""

                def values(line: int) -> list[Expr]:
                    of_line = places[line * isa.height : (line + 1) * isa.height]
                    return row_words(isa, x.buffer, [place + far + first * isa.word for place in of_line], count)

                def word(register: int, k: int) -> Expr:
                    return weight_words(isa, weights, at(register, tap, first + k), bits)

                if ahead:
                    for k in range(count):
                        _fetch(packed, ahead, (number * taps + tap) * words + first + k)
                # Of activations and weights the fewer wait in registers for the others, which come one by one.
                if count > 1 or len(acc) <= registers:
                    held = [values(i) for i in range(len(acc))]
                    for k in range(count):
                        for v in range(registers):
                            weight = word(v, k)
                            for line, value in zip(acc, held, strict=True):
                                _add_dot(isa, line[v], value[k], weight)
                else:
                    words_held = [word(v, 0) for v in range(registers)]
                    for i, line in enumerate(acc):
                        value = values(i)[0]
                        for cell, weight in zip(line, words_held, strict=True):
                            _add_dot(isa, cell, value, weight)

            if panel:
                gemm_pairs.add_products(acc, x.buffer, places, panel)
            else:
                turns, rest = divmod(words, isa.turn)
                with x.taps() as (tap, far):
                    if turns:
                        with T.serial(0, turns) as i:
                            add(tap, far, i * isa.turn, isa.turn)
                    if rest:
                        with T.serial(0, rest) as k:
                            add(tap, far, turns * isa.turn + k, 1)

            def finish(some: range) -> None:
                for v in range(vectors):
                    cells = slice(v * isa.height, (v + 1) * isa.height)
                    totals = [row_sums(isa, acc[r // isa.height][cells], r) for r in some]
                    if panel:
                        totals = [T.bind(total << fill(T.int32(8 - p.bits), lanes)) for total in totals]
                    valid, at = min(lanes, columns - v * lanes), group * p.columns + column + v * lanes
                    epilogue.store([row + r for r in some], at, valid, totals)

            def finish_all() -> None:
                for start in range(0, rows, epilogue.at_once):
                    finish(range(start, min(start + epilogue.at_once, rows)))

            def finish_some() -> None:
                for r in range(rows):
                    when(row + r < last, partial(finish, range(r, r + 1)))

            if count is not None and count % rows == 0 and chunk % rows == 0:
                finish_all()
            elif epilogue.at_once > 1:
                when(row + rows <= last, finish_all, finish_some)
            else:
                finish_some()

    # The last panel may be narrower than the others.
    by_rows(p.rows, tile.rows if vectors == tile.vectors else _height(isa, count, vectors), sweep)
