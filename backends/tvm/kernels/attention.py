"""``t3c::attention_f32`` as one kernel: scores, softmax and values for a block of rows, which stay in cache.

A task is a key head and a block of the rows that read it (for grouped heads, those of all query heads of the group).
Keys are transposed once a task, so that both products run over vectors of columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    CHUNK_ROWS,
    Buffer,
    Index,
    by_rows,
    ceil_div,
    fill,
    float32,
    for_each,
    load,
    prim_func,
    product,
    row_chunks,
    static,
    store,
    when,
)
from t3c_compile.backends.tvm.kernels.floats import lanes_for, multiply_tile, tile_shape
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.rows import exponentials, join_lanes
from t3c_compile.passes.ops.float_math import PARTIAL_SUMS

_WIDE = PARTIAL_SUMS
_INFINITY = float("inf")
_LEAST = -3.4028234663852886e38


@dataclass(frozen=True)
class AttentionSpec:
    """Shapes of ``query`` [batch, groups * share, rows, width], ``key`` and ``value`` [batch, groups, keys, ...].

    ``mask``: its dtype, or none; ``mask_shape``: its four dimensions, 1 where it broadcasts. ``tokens_first``: which of
    query, key, value and output lie as [batch, rows, heads, width].
    """

    batch: int | str
    groups: int
    share: int
    rows: int | str
    keys: int | str
    width: int
    value_width: int
    scale: float
    causal: bool = False
    mask: str | None = None
    mask_shape: tuple[int | str, ...] = ()
    tokens_first: tuple[bool, bool, bool, bool] = (False, False, False, False)


@dataclass(frozen=True)
class _Heads:
    """A tensor of heads: where row ``token`` of a head starts, and the step to the next row."""

    buffer: Buffer
    heads: int
    tokens: Index
    width: int
    tokens_first: bool

    def row(self, batch: Index, head: Index, token: Index) -> Index:
        if self.tokens_first:
            return ((batch * self.tokens + token) * self.heads + head) * self.width
        return ((batch * self.heads + head) * self.tokens + token) * self.width

    @property
    def step(self) -> int:
        return self.heads * self.width if self.tokens_first else self.width


@cache
def attention(isa: Isa, s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(float32 query, key, value, mask where there is one, float32 y): ``t3c::attention_f32``."""
    heads = s.groups * s.share

    def shape(count: int, tokens: int | str, width: int, first: bool) -> tuple[int | str, ...]:
        return (s.batch, tokens, count, width) if first else (s.batch, count, tokens, width)

    with prim_func("attention") as function:
        sizes = ((heads, s.rows, s.width), (s.groups, s.keys, s.width), (s.groups, s.keys, s.value_width))
        shapes = [
            shape(*size, first)
            for size, first in zip((*sizes, (heads, s.rows, s.value_width)), s.tokens_first, strict=True)
        ]
        q, k, v, mask, y = function.args(
            query=(shapes[0], "float32"),
            key=(shapes[1], "float32"),
            value=(shapes[2], "float32"),
            mask=None if s.mask is None else (s.mask_shape, s.mask),
            y=(shapes[3], "float32"),
        )
        batch, rows, keys = (function.size((d,)) for d in (s.batch, s.rows, s.keys))
        first = s.tokens_first
        kernel = _Attention(
            isa,
            s,
            rows,
            keys,
            _Heads(q, heads, rows, s.width, first[0]),
            _Heads(k, s.groups, keys, s.width, first[1]),
            _Heads(v, s.groups, keys, s.value_width, first[2]),
            _Heads(y, heads, rows, s.value_width, first[3]),
            mask,
            function.dims(s.mask_shape),
        )
        chunks_of_rows, chunk = _even(rows * s.share)

        @for_each(batch * s.groups * chunks_of_rows, product((batch, heads, rows, keys, s.width + s.value_width)))
        def _(task: Index) -> None:
            head = T.bind(task // chunks_of_rows)
            kernel.emit(T.bind(head // s.groups), T.bind(head % s.groups), T.bind(task % chunks_of_rows * chunk), chunk)

    return function.func


def _int64(index: Index) -> Expr:
    return T.cast(index, "int64")


def _even(rows: Index) -> tuple[Index, int]:
    """How many chunks of how many rows, as even as may be."""
    count = static(rows)
    if count is None:
        return row_chunks(rows), CHUNK_ROWS
    pieces = ceil_div(count, CHUNK_ROWS)
    return pieces, ceil_div(count, pieces)


@dataclass(frozen=True)
class _Attention:
    isa: Isa
    spec: AttentionSpec
    rows: Index
    keys: Index
    query: _Heads
    key: _Heads
    value: _Heads
    output: _Heads
    mask: Buffer | None
    mask_dims: Sequence[Index]

    def emit(self, batch: Index, group: Index, first: Index, chunk: int) -> None:
        """The rows from ``first`` on, at most ``chunk``, of one key head."""
        s, lanes = self.spec, self.isa.lanes
        total = self.rows * s.share
        last = total if static(total) is not None and static(total) <= chunk else T.min(first + chunk, total)  # type: ignore[operator]
        blocks = ceil_div(self.keys, _WIDE)
        transposed = T.alloc_buffer((blocks * _WIDE * s.width,), "float32")
        self._transpose(transposed, batch, group, blocks)
        value_lanes = lanes_for(self.isa, s.value_width)
        wide = static(blocks)
        tall, score_vectors = tile_shape(self.isa, 4 if wide is None else wide * (_WIDE // lanes), lanes)
        most, value_vectors = tile_shape(self.isa, ceil_div(s.value_width, value_lanes), value_lanes)

        def sweep(height: int) -> None:
            scores = T.alloc_buffer((height * blocks * _WIDE,), "float32")
            inverse = T.alloc_buffer((height,), "float32")
            # Where each row lies: read back, these are numbers that no later pass tries to prove anything about.
            tokens, sources, targets, masks = (T.alloc_buffer((height,), "int64") for _ in range(4))
            with T.serial(0, ceil_div(last - first, height)) as tile:
                row = T.bind(first + tile * height)
                with T.serial(0, height) as r:
                    # A row past the last is computed as the last again, and not stored.
                    place = T.bind(T.min(row + r, last - 1))
                    head, token = group, place
                    if s.share > 1:
                        head = T.bind(group * s.share + place // self.rows)
                        token = T.bind(place % self.rows)
                    T.buffer_store(tokens, _int64(token), [r])
                    T.buffer_store(sources, _int64(self.query.row(batch, head, token)), [r])
                    T.buffer_store(targets, _int64(self.output.row(batch, head, token)), [r])
                    T.buffer_store(masks, _int64(self._mask_line(batch, head, token)), [r])
                seen = blocks
                if s.causal:
                    end = tokens[0]
                    for r in range(1, height):
                        end = T.bind(T.max(end, tokens[r]))
                    seen = T.bind(T.min(blocks, end // _WIDE + 1))
                starts = [T.bind(sources[r]) for r in range(height)]
                self._scores(scores, transposed, starts, blocks, seen, score_vectors)
                with T.serial(0, height) as r:
                    self._softmax(scores, inverse, r, blocks, seen, tokens[r], masks[r])
                tile_rows = (row, last, targets, height)
                self._values(scores, inverse, tile_rows, batch, group, blocks, seen, value_lanes, value_vectors)

        by_rows(total if static(total) is None else chunk, min(tall, most), sweep)

    def _transpose(self, out: Buffer, batch: Index, group: Index, blocks: Index) -> None:
        """Keys as [block of 16 keys][width][16], the missing ones of the last block as the last key again."""
        lanes, width = lanes_for(self.isa, self.spec.width), self.spec.width
        start = T.bind(self.key.row(batch, group, 0))
        with T.serial(0, blocks * (_WIDE // lanes)) as part, T.serial(0, ceil_div(width, lanes)) as across:
            column = T.bind(T.min(across * lanes, width - lanes))
            lines = []
            for i in range(lanes):
                key = T.min(part * lanes + i, self.keys - 1)
                lines.append(T.bind(load(self.key.buffer, start + key * self.key.step + column, lanes)))
            at = T.bind(part * lanes // _WIDE * (_WIDE * width) + column * _WIDE + part * lanes % _WIDE)
            for i, line in enumerate(_transposed(lines)):
                store(out, at + i * _WIDE, line, lanes)

    def _scores(
        self, scores: Buffer, keys: Buffer, starts: list[Index], blocks: Index, seen: Index, vectors: int
    ) -> None:
        """Products of the tile's rows and all keys, unscaled."""
        lanes, width = self.isa.lanes, self.spec.width
        many = seen * (_WIDE // lanes)

        def read(column: Index, d: Index) -> Expr:
            return load(keys, column // _WIDE * (_WIDE * width) + d * _WIDE + column % _WIDE, lanes)

        def panel(vector: Index, count: int) -> None:
            columns = [T.bind((vector + i) * lanes) for i in range(count)]
            acc = multiply_tile(len(starts), columns, lanes, width, lambda r, d: self.query.buffer[starts[r] + d], read)
            for r, line in enumerate(acc):
                for column, cell in zip(columns, line, strict=True):
                    store(scores, r * (blocks * _WIDE) + column, load(cell, 0, lanes), lanes)

        with T.serial(0, many // vectors) as i:
            panel(i * vectors, vectors)
        rest = static(many)
        if rest is None:
            step = _WIDE // lanes if vectors > _WIDE // lanes else vectors
            left = T.bind(many // vectors * vectors)
            with T.serial(0, (many - left) // step) as i:
                panel(left + i * step, step)
        elif rest % vectors:
            panel(rest - rest % vectors, rest % vectors)

    def _softmax(
        self, scores: Buffer, inverse: Buffer, r: Index, blocks: Index, seen: Index, token: Index, line: Index
    ) -> None:
        """Scale and mask a row, and replace it by exponentials; one over their sum to ``inverse``."""
        start = T.bind(r * (blocks * _WIDE))
        end = T.bind(T.min(self.keys, token + 1)) if self.spec.causal else self.keys
        best = T.alloc_buffer((_WIDE,), "float32")
        store(best, 0, fill(float32(_LEAST), _WIDE), _WIDE)
        scale = float32(self.spec.scale)
        nothing = float32(-_INFINITY)
        with T.serial(0, seen) as block:
            at = T.bind(start + block * _WIDE)
            value = load(scores, at, _WIDE)
            if self.mask is None:
                value = value * fill(scale, _WIDE)
            else:
                mask = self._mask_vector(line, block)
                if self.spec.mask == "bool":
                    value = T.Select(mask, value * fill(scale, _WIDE), fill(nothing, _WIDE))
                else:
                    value = T.fma(value, fill(scale, _WIDE), mask)
            if self.spec.causal or static(end) is None or static(end) % _WIDE:  # type: ignore[operator]
                lane = T.ramp(T.cast(0, "int32"), 1, _WIDE)
                left = fill(T.cast(end - block * _WIDE, "int32"), _WIDE)
                value = T.Select(lane < left, value, fill(nothing, _WIDE))
            value = T.bind(value)
            store(scores, at, value, _WIDE)
            store(best, 0, T.max(load(best, 0, _WIDE), value), _WIDE)
        top = join_lanes(load(best, 0, _WIDE), T.max)
        total = exponentials(scores, start, seen, top)
        T.buffer_store(inverse, T.float32(1.0) / T.max(total, T.float32(1.0)), [r])

    def _mask_line(self, batch: Index, head: Index, token: Index) -> Index:
        """Where the mask's row starts; 0 where there is none."""
        if self.mask is None:
            return 0
        d = self.mask_dims
        index: Index = 0
        for size, at in zip(d, (batch, head, token), strict=False):
            index = index * size + (0 if static(size) == 1 else at)
        return index * d[3]

    def _mask_vector(self, line: Index, block: Index) -> Expr:
        if static(self.mask_dims[3]) == 1:
            return fill(self.mask[line], _WIDE)  # type: ignore[index]
        if static(self.keys) is not None and self.keys % _WIDE == 0:
            return load(self.mask, line + block * _WIDE, _WIDE)
        part = T.alloc_buffer((_WIDE,), str(self.spec.mask))
        left = T.min(self.keys - block * _WIDE, _WIDE)
        when(left == _WIDE, lambda: store(part, 0, load(self.mask, line + block * _WIDE, _WIDE), _WIDE))

        def some() -> None:
            with T.serial(0, left) as lane:
                T.buffer_store(part, self.mask[line + block * _WIDE + lane], [lane])  # type: ignore[index]

        when(left < _WIDE, some)
        return load(part, 0, _WIDE)

    def _values(
        self,
        scores: Buffer,
        inverse: Buffer,
        tile: tuple[Index, Index, Buffer, int],
        batch: Index,
        group: Index,
        blocks: Index,
        seen: Index,
        lanes: int,
        vectors: int,
    ) -> None:
        """The tile's rows of exponentials times the values, to the output."""
        s = self.spec
        row, last, targets, height = tile
        start = T.bind(self.value.row(batch, group, 0))
        count = T.min(seen * _WIDE, self.keys) if s.causal else self.keys

        def panel(first: Index, many: int) -> None:
            columns = [T.bind(T.min(first + i * lanes, s.value_width - lanes)) for i in range(many)]
            acc = multiply_tile(
                height,
                columns,
                lanes,
                count,
                lambda r, j: scores[r * (blocks * _WIDE) + j],
                lambda column, j: load(self.value.buffer, start + j * self.value.step + column, lanes),
            )
            for r, line in enumerate(acc):

                def finish(r: int = r, line: list[Buffer] = line) -> None:
                    for column, cell in zip(columns, line, strict=True):
                        value = load(cell, 0, lanes) * fill(inverse[r], lanes)
                        store(self.output.buffer, targets[r] + column, value, lanes)

                when(row + r < last, finish)

        whole, rest = divmod(ceil_div(s.value_width, lanes), vectors)
        with T.serial(0, whole) as i:
            panel(i * (vectors * lanes), vectors)
        if rest:
            panel(whole * vectors * lanes, rest)


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
