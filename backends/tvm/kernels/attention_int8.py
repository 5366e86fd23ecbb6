"""The products of ``t3c::attention_int8``: rows rounded to int8 as they come, sums by the int8 dot product.

Keys and values are rounded and packed once a task, as the weights of an int8 product are.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.attention_f32 import score_panels
from t3c_compile.backends.tvm.kernels.attention_heads import AttentionSpec, Heads, RowTile
from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    accumulators,
    fill,
    float32,
    load,
    prefetch,
    static,
    store,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import Writer
from t3c_compile.backends.tvm.kernels.floats import tile_shape
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa, by_lane
from t3c_compile.backends.tvm.kernels.product import spread_word
from t3c_compile.backends.tvm.kernels.rows import exponentials, join_lanes, to_whole, whole_numbers
from t3c_compile.passes.ops.int8_attention import LEAST_NORM, MOST, STEP

_WORDS = BLOCK * QUAD  # bytes a block of words
_AHEAD = 8  # rows


class IntegerProducts:
    """Those of one key head, ``blocks`` of 16 keys; making one emits what is done once a task."""

    def __init__(
        self,
        isa: Isa,
        spec: AttentionSpec,
        heads: tuple[Heads, ...],
        writer: Writer,
        batch: Index,
        group: Index,
        blocks: Index,
    ) -> None:
        isa = by_lane(isa)
        self.isa, self.spec, self.blocks = isa, spec, blocks
        self.query, self.key, self.value = heads
        self.writer = writer
        self.words = spec.width // QUAD
        count = blocks * BLOCK
        self.keys = T.alloc_buffer((count * spec.width,), "int8")
        self.key_steps = T.alloc_buffer((count,), "float32")
        self.key_sums = T.alloc_buffer((count,), "int32") if isa.offset else None
        self.values_ = T.alloc_buffer((count * spec.value_width,), "int8")
        self.value_steps = T.alloc_buffer((count,), "float32")
        self._pack_keys(T.bind(self.key.row(batch, group, 0)))
        self._pack_values(T.bind(self.value.row(batch, group, 0)))
        wide = static(blocks)
        tall, self.score_vectors = tile_shape(isa, 4 if wide is None else wide * (BLOCK // isa.lanes), isa.lanes)
        most, self.value_vectors = tile_shape(isa, spec.value_width // isa.lanes, isa.lanes)
        self.tallest = min(tall, most)
        self.greatest = T.alloc_buffer((self.tallest,), "float32")

    def _pack_keys(self, start: Index) -> None:
        """Keys as [block of 16 keys][word][16][4], the missing ones of the last block as the last key again."""
        width, words = self.spec.width, self.words
        with T.serial(0, self.blocks) as block:
            line = T.alloc_buffer((width,), "int8")
            with T.serial(0, BLOCK) as i:
                key = T.bind(T.min(block * BLOCK + i, self.key.tokens - 1))
                at = T.bind(start + key * self.key.step)
                self._ask(self.key, start, key, width)
                ratio = self._row(self.key.buffer, at, width, self.key_steps, block * BLOCK + i)
                for column in range(0, width, BLOCK):
                    whole = whole_numbers(self.key.buffer, at + column, ratio, BLOCK)
                    store(line, column, T.cast(whole, "int8x16"), BLOCK)
                with T.serial(0, words) as word:
                    store(self.keys, ((block * words + word) * BLOCK + i) * QUAD, load(line, word * QUAD, QUAD), QUAD)
            if self.key_sums is not None:
                self._sum_keys(self.key_sums, block)

    def _sum_keys(self, sums: Buffer, block: Index) -> None:
        """What the dot product's offset adds to every score, taken away beforehand."""
        lanes = self.isa.lanes
        ones = fill(T.cast(1, self.isa.activation_dtype), lanes * QUAD)
        for part in range(0, BLOCK, lanes):
            total = T.alloc_buffer((lanes,), "int32")
            store(total, 0, fill(T.int32(0), lanes), lanes)
            with T.serial(0, self.words) as word:
                keys = load(self.keys, (block * self.words + word) * _WORDS + part * QUAD, lanes * QUAD)
                store(total, 0, self.isa.dot(load(total, 0, lanes), ones, keys), lanes)
            store(sums, block * BLOCK + part, load(total, 0, lanes) * fill(T.int32(-self.isa.offset), lanes), lanes)

    def _pack_values(self, start: Index) -> None:
        """Values as [16 columns][four keys][16][4]; the missing keys as the last one again, which nothing takes."""
        quads = self.blocks * (BLOCK // QUAD)
        with T.serial(0, quads) as quad:
            rows = []
            for i in range(QUAD):
                key = T.bind(T.min(quad * QUAD + i, self.value.tokens - 1))
                at = T.bind(start + key * self.value.step)
                self._ask(self.value, start, key, self.spec.value_width)
                rows.append(
                    (at, self._row(self.value.buffer, at, self.spec.value_width, self.value_steps, quad * QUAD + i))
                )
            for column in range(0, self.spec.value_width, BLOCK):
                word: Expr = fill(T.int32(0), BLOCK)
                for i, (at, ratio) in enumerate(rows):
                    byte = whole_numbers(self.value.buffer, at + column, ratio, BLOCK) & fill(T.int32(255), BLOCK)
                    word = word | (byte << fill(T.int32(8 * i), BLOCK))
                store(self.values_, (column // BLOCK * quads + quad) * _WORDS, T.reinterpret("int8x64", word), _WORDS)

    def _ask(self, heads: Heads, start: Index, key: Index, width: int) -> None:
        """Prefetch a row after ``key``: rows of a head are too far apart for the processor to guess."""
        if self.isa.fetches:
            later = T.bind(start + T.min(key + _AHEAD, heads.tokens - 1) * heads.step)
            for column in range(0, width, BLOCK):
                prefetch(heads.buffer, later + column)

    def _row(self, x: Buffer, at: Index, width: int, steps: Buffer, place: Index) -> Expr:
        """What the row of ``x`` from ``at`` on is multiplied by for whole numbers; one's worth to ``steps``."""
        best: Expr | None = None
        for column in range(0, width, BLOCK):
            value = T.bind(load(x, at + column, BLOCK))
            size = T.max(value, fill(T.float32(0), BLOCK) - value)
            best = size if best is None else T.max(best, size)
        return to_whole(join_lanes(best, T.max), steps, place)

    def scores(self, out: Buffer, tile: RowTile, seen: Index) -> Callable[[Index], Expr]:
        """Products of the tile's rows and the keys of ``seen`` blocks; what row r of them is to be multiplied by."""
        isa, width = self.isa, self.spec.width
        lanes = isa.lanes
        queries = T.alloc_buffer((tile.height * width,), isa.activation_dtype)
        steps = T.alloc_buffer((tile.height,), "float32")
        with T.serial(0, tile.height) as r:
            at = T.bind(tile.sources[r])
            ratio = self._row(self.query.buffer, at, width, steps, r)
            for column in range(0, width, BLOCK):
                whole = whole_numbers(self.query.buffer, at + column, ratio, BLOCK) + fill(T.int32(isa.offset), BLOCK)
                store(queries, r * width + column, T.cast(whole, vec(isa.activation_dtype, BLOCK)), BLOCK)

        def panel(vector: Index, count: int) -> None:
            columns = [T.bind((vector + i) * lanes) for i in range(count)]
            starts = [
                fill(T.int32(0), lanes) if self.key_sums is None else load(self.key_sums, column, lanes)
                for column in columns
            ]
            acc = self._products(
                tile.height,
                starts,
                self.words,
                lambda r, word: spread_word(isa, queries, r * width + word * QUAD),
                lambda i, word: load(
                    self.keys,
                    (columns[i] // BLOCK * self.words + word) * _WORDS + columns[i] % BLOCK * QUAD,
                    lanes * QUAD,
                ),
            )
            for r, line in enumerate(acc):
                for column, cell in zip(columns, line, strict=True):
                    value = T.cast(load(cell, 0, lanes), vec("float32", lanes)) * load(self.key_steps, column, lanes)
                    store(out, r * (self.blocks * BLOCK) + column, value, lanes)

        score_panels(isa, seen, self.score_vectors, panel)
        return lambda r: steps[r] * float32(self.spec.scale)

    def exponentials(self, scores: Buffer, r: Index, seen: Index, top: Expr) -> Expr:
        """Replace row r by its exponentials in the values' steps, the greatest of which is kept; their sum without."""
        start = T.bind(r * (self.blocks * BLOCK))
        best = T.alloc_buffer((BLOCK,), "float32")
        store(best, 0, fill(T.float32(0), BLOCK), BLOCK)

        def put(block: Index, e: Expr) -> None:
            share = T.bind(e * load(self.value_steps, block * BLOCK, BLOCK))
            store(scores, start + block * BLOCK, share, BLOCK)
            store(best, 0, T.max(load(best, 0, BLOCK), share), BLOCK)

        total = exponentials(scores, start, seen, top, put)
        greatest = T.max(join_lanes(load(best, 0, BLOCK), T.max), float32(LEAST_NORM))
        T.buffer_store(self.greatest, greatest, [r])
        return total

    def values(self, scores: Buffer, inverse: Buffer, tile: RowTile, seen: Index) -> None:
        """The tile's rows of exponentials as int8, times the values, to the output."""
        isa, lanes, count = self.isa, self.isa.lanes, self.blocks * BLOCK
        shares = T.alloc_buffer((tile.height * count,), isa.activation_dtype)
        factors = T.alloc_buffer((tile.height,), "float32")
        with T.serial(0, tile.height) as r:
            start, greatest = T.bind(r * count), T.bind(self.greatest[r])
            ratio = T.bind(T.float32(MOST) / greatest)
            with T.serial(0, seen) as block:
                at = T.bind(start + block * BLOCK)
                whole = whole_numbers(scores, at, ratio, BLOCK)
                store(shares, at, T.cast(whole, vec(isa.activation_dtype, BLOCK)), BLOCK)
            T.buffer_store(factors, (greatest * float32(STEP)) * inverse[r], [r])

        def panel(first: Index, many: int) -> None:
            columns = [T.bind(first + i * lanes) for i in range(many)]
            quads = self.blocks * (BLOCK // QUAD)
            acc = self._products(
                tile.height,
                [fill(T.int32(0), lanes)] * many,
                seen * (BLOCK // QUAD),
                lambda r, quad: spread_word(isa, shares, r * count + quad * QUAD),
                lambda i, quad: load(
                    self.values_,
                    (columns[i] // BLOCK * quads + quad) * _WORDS + columns[i] % BLOCK * QUAD,
                    lanes * QUAD,
                ),
            )
            for r, line in enumerate(acc):

                def finish(r: int = r, line: list[Buffer] = line) -> None:
                    for column, cell in zip(columns, line, strict=True):
                        value = T.cast(load(cell, 0, lanes), vec("float32", lanes)) * fill(factors[r], lanes)
                        self.writer.put(tile.targets[r] + column, value, lanes)

                when(tile.row + r < tile.last, finish)

        whole, rest = divmod(self.spec.value_width // lanes, self.value_vectors)
        with T.serial(0, whole) as i:
            panel(i * (self.value_vectors * lanes), self.value_vectors)
        if rest:
            panel(whole * self.value_vectors * lanes, rest)

    def _products(
        self,
        height: int,
        starts: list[Expr],
        words: Index,
        left: Callable[[int, Index], Expr],
        right: Callable[[int, Index], Expr],
    ) -> list[list[Buffer]]:
        """Sums over ``words`` of four products, from ``starts``: int32 accumulators by row and vector."""
        lanes = self.isa.lanes
        acc = accumulators(height, len(starts), lanes, "int32")
        for line in acc:
            for cell, start in zip(line, starts, strict=True):
                store(cell, 0, start, lanes)
        with T.serial(0, words) as word:
            columns = [T.bind(right(i, word)) for i in range(len(starts))]
            for r, line in enumerate(acc):
                row = T.bind(left(r, word))
                for cell, column in zip(line, columns, strict=True):
                    store(cell, 0, self.isa.dot(load(cell, 0, lanes), row, column), lanes)
        return acc
