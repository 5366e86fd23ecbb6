"""The products of ``t3c::attention_f32``: chains of fused multiply-adds over vectors of columns.

Keys are transposed once a task, so that both products run over vectors of columns.
"""

from collections.abc import Callable

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.attention_heads import AttentionSpec, Heads, RowTile
from t3c_compile.backends.tvm.kernels.emit import Buffer, Index, ceil_div, fill, float32, load, static, store, when
from t3c_compile.backends.tvm.kernels.finish import Writer
from t3c_compile.backends.tvm.kernels.floats import lanes_for, multiply_tile, tile_shape
from t3c_compile.backends.tvm.kernels.isa import BLOCK, Isa
from t3c_compile.backends.tvm.kernels.rows import exponentials


class FloatProducts:
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
        self.isa, self.spec, self.blocks = isa, spec, blocks
        self.query, self.key, self.value = heads
        self.writer = writer
        self.values_start = T.bind(self.value.row(batch, group, 0))
        self.keys = T.alloc_buffer((blocks * BLOCK * spec.width,), "float32")
        self._transpose(batch, group)
        self.value_lanes = lanes_for(isa, spec.value_width)
        wide = static(blocks)
        tall, self.score_vectors = tile_shape(isa, 4 if wide is None else wide * (BLOCK // isa.lanes), isa.lanes)
        most, self.value_vectors = tile_shape(isa, ceil_div(spec.value_width, self.value_lanes), self.value_lanes)
        self.tallest = min(tall, most)

    def _transpose(self, batch: Index, group: Index) -> None:
        """Keys as [block of 16 keys][width][16], the missing ones of the last block as the last key again."""
        lanes, width = lanes_for(self.isa, self.spec.width), self.spec.width
        start = T.bind(self.key.row(batch, group, 0))
        with T.serial(0, self.blocks * (BLOCK // lanes)) as part, T.serial(0, ceil_div(width, lanes)) as across:
            column = T.bind(T.min(across * lanes, width - lanes))
            lines = []
            for i in range(lanes):
                key = T.min(part * lanes + i, self.key.tokens - 1)
                lines.append(T.bind(load(self.key.buffer, start + key * self.key.step + column, lanes)))
            at = T.bind(part * lanes // BLOCK * (BLOCK * width) + column * BLOCK + part * lanes % BLOCK)
            for i, line in enumerate(_transposed(lines)):
                store(self.keys, at + i * BLOCK, line, lanes)

    def scores(self, out: Buffer, tile: RowTile, seen: Index) -> Callable[[Index], Expr]:
        """Products of the tile's rows and the keys of ``seen`` blocks; what row r of them is to be multiplied by."""
        lanes, width = self.isa.lanes, self.spec.width
        starts = [T.bind(tile.sources[r]) for r in range(tile.height)]

        def read(column: Index, d: Index) -> Expr:
            return load(self.keys, column // BLOCK * (BLOCK * width) + d * BLOCK + column % BLOCK, lanes)

        def panel(vector: Index, count: int) -> None:
            columns = [T.bind((vector + i) * lanes) for i in range(count)]
            acc = multiply_tile(tile.height, columns, lanes, width, lambda r, d: self.query.buffer[starts[r] + d], read)
            for r, line in enumerate(acc):
                for column, cell in zip(columns, line, strict=True):
                    store(out, r * (self.blocks * BLOCK) + column, load(cell, 0, lanes), lanes)

        score_panels(self.isa, seen, self.score_vectors, panel)
        return lambda r: float32(self.spec.scale)

    def exponentials(self, scores: Buffer, r: Index, seen: Index, top: Expr) -> Expr:
        """Replace row r by its exponentials; their sum."""
        return exponentials(scores, T.bind(r * (self.blocks * BLOCK)), seen, top)

    def values(self, scores: Buffer, inverse: Buffer, tile: RowTile, seen: Index) -> None:
        """The tile's rows of exponentials times the values, to the output."""
        s, lanes = self.spec, self.value_lanes
        count = T.min(seen * BLOCK, self.key.tokens) if s.causal else self.key.tokens

        def panel(first: Index, many: int) -> None:
            columns = [T.bind(T.min(first + i * lanes, s.value_width - lanes)) for i in range(many)]
            acc = multiply_tile(
                tile.height,
                columns,
                lanes,
                count,
                lambda r, j: scores[r * (self.blocks * BLOCK) + j],
                lambda column, j: load(self.value.buffer, self.values_start + j * self.value.step + column, lanes),
            )
            for r, line in enumerate(acc):

                def finish(r: int = r, line: list[Buffer] = line) -> None:
                    for column, cell in zip(columns, line, strict=True):
                        value = load(cell, 0, lanes) * fill(inverse[r], lanes)
                        self.writer.put(tile.targets[r] + column, value, lanes)

                when(tile.row + r < tile.last, finish)

        whole, rest = divmod(ceil_div(s.value_width, lanes), self.value_vectors)
        with T.serial(0, whole) as i:
            panel(i * (self.value_vectors * lanes), self.value_vectors)
        if rest:
            panel(whole * self.value_vectors * lanes, rest)


def score_panels(isa: Isa, seen: Index, vectors: int, panel: Callable[[Index, int], None]) -> None:
    """Emit ``panel(first vector, how many)`` over the vectors of ``seen`` blocks of keys, ``vectors`` at a time."""
    many = seen * (BLOCK // isa.lanes)
    with T.serial(0, many // vectors) as i:
        panel(i * vectors, vectors)
    rest = static(many)
    if rest is None:
        step = BLOCK // isa.lanes if vectors > BLOCK // isa.lanes else vectors
        left = T.bind(many // vectors * vectors)
        with T.serial(0, (many - left) // step) as i:
            panel(left + i * step, step)
    elif rest % vectors:
        panel(rest - rest % vectors, rest % vectors)


def _transposed(lines: list[Expr]) -> list[Expr]:
    """A square of n vectors of n lanes, transposed by exchanging ever smaller blocks."""
    count = len(lines)
    half = count // 2
    while half:
        after = list(lines)
        for i in range(count):
            if i & half:
                continue
            pair = [lines[i], lines[i + half]]
            low = [c if not c & half else count + c - half for c in range(count)]
            high = [c + half if not c & half else count + c for c in range(count)]
            for place, chosen in ((i, low), (i + half, high)):
                after[place] = T.bind(tvm.tirx.Shuffle(pair, [T.int32(c) for c in chosen]))
        lines, half = after, half // 2
    return lines
