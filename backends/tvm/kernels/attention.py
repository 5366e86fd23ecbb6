"""``t3c::attention_f32`` and ``t3c::attention_int8`` as one kernel: scores, softmax and values for a block of rows,
which stay in cache.

A task is a key head and a block of the rows that read it (for grouped heads, those of all query heads of the group).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.attention_f32 import FloatProducts
from t3c_compile.backends.tvm.kernels.attention_heads import AttentionSpec, Heads, Layout, Places, RowTile
from t3c_compile.backends.tvm.kernels.attention_int8 import IntegerProducts
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
    static,
    store,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import Writer
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.rows import LEAST, join_lanes
from t3c_compile.passes.ops.float_math import PARTIAL_SUMS

_WIDE = PARTIAL_SUMS
_INFINITY = float("inf")


# Rows a task of integers takes: what it packs once is paid back by more of them.
_INTEGER_ROWS = 256


@cache
def attention(isa: Isa, s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(float32 query, key, value, mask where there is one, ``finish``): ``t3c::attention_f32``, with ``integers``
    ``t3c::attention_int8``."""
    with prim_func("attention") as function:
        q, k, v, mask, *ends = function.args(
            query=(s.layouts[0].shape, "float32"),
            key=(s.layouts[1].shape, "float32"),
            value=(s.layouts[2].shape, "float32"),
            mask=None if s.mask is None else (s.mask_shape, s.mask),
            **s.finish.arguments(s.layouts[3].shape),
        )
        batch, rows, keys = (function.size((d,)) for d in (s.batch, s.rows, s.keys))

        def steps(layout: Layout) -> tuple[Index, Index, Index]:
            return function.size(layout.batch), function.size(layout.head), function.size(layout.token)

        tensors = zip((q, k, v), (rows, keys, keys), s.layouts, strict=False)
        kernel = _Attention(
            isa,
            s,
            tuple(Heads(tokens, layout.start, steps(layout), buffer) for buffer, tokens, layout in tensors),
            Places(rows, s.layouts[3].start, steps(s.layouts[3])),
            Writer(s.finish, ends),
            mask,
            function.dims(s.mask_shape),
        )
        chunks_of_rows, chunk = _even(rows * s.share, _INTEGER_ROWS if s.integers else CHUNK_ROWS)

        @for_each(
            batch * s.groups * chunks_of_rows, product((batch, s.groups * s.share, rows, keys, s.width + s.value_width))
        )
        def _(task: Index) -> None:
            head = T.bind(task // chunks_of_rows)
            kernel.emit(T.bind(head // s.groups), T.bind(head % s.groups), T.bind(task % chunks_of_rows * chunk), chunk)

    return function.func


def _int64(index: Index) -> Expr:
    return T.cast(index, "int64")


def _even(rows: Index, most: int) -> tuple[Index, int]:
    """How many chunks of how many rows, as even as may be."""
    count = static(rows)
    if count is None:
        # One at least: TVM folds what even a branch never taken divides by.
        return T.max(ceil_div(rows, most), 1), most
    pieces = ceil_div(count, most)
    return pieces, ceil_div(count, pieces)


@dataclass(frozen=True)
class _Attention:
    isa: Isa
    spec: AttentionSpec
    heads: tuple[Heads, ...]
    output: Places
    writer: Writer
    mask: Buffer | None
    mask_dims: Sequence[Index]

    @property
    def key_count(self) -> Index:
        return self.heads[1].tokens

    def emit(self, batch: Index, group: Index, first: Index, chunk: int) -> None:
        """The rows from ``first`` on, at most ``chunk``, of one key head."""
        s, query, output = self.spec, self.heads[0], self.output
        total = query.tokens * s.share
        last = total if static(total) is not None and static(total) <= chunk else T.min(first + chunk, total)  # type: ignore[operator]
        blocks = ceil_div(self.key_count, _WIDE)
        kind = IntegerProducts if s.integers else FloatProducts
        products = kind(self.isa, s, self.heads, self.writer, batch, group, blocks)

        def sweep(height: int) -> None:
            scores = T.alloc_buffer((height * blocks * _WIDE,), "float32")
            tops, inverse = (T.alloc_buffer((height,), "float32") for _ in range(2))
            # Where each row lies: read back, these are numbers that no later pass tries to prove anything about.
            tokens, sources, targets, masks = (T.alloc_buffer((height,), "int64") for _ in range(4))
            with T.serial(0, ceil_div(last - first, height)) as number:
                row = T.bind(first + number * height)
                with T.serial(0, height) as r:
                    # A row past the last is computed as the last again, and not stored.
                    place = T.bind(T.min(row + r, last - 1))
                    head, token = group, place
                    if s.share > 1:
                        head = T.bind(group * s.share + place // query.tokens)
                        token = T.bind(place % query.tokens)
                    T.buffer_store(tokens, _int64(token), [r])
                    T.buffer_store(sources, _int64(query.row(batch, head, token)), [r])
                    T.buffer_store(targets, _int64(output.row(batch, head, token)), [r])
                    T.buffer_store(masks, _int64(self._mask_line(batch, head, token)), [r])
                seen = blocks
                if s.causal:
                    end = tokens[0]
                    for r in range(1, height):
                        end = T.bind(T.max(end, tokens[r]))
                    seen = T.bind(T.min(blocks, end // _WIDE + 1))
                tile = RowTile(row, last, height, sources, targets)
                scale = products.scores(scores, tile, seen)
                # Rows in one loop after another: a processor looks ahead to the next row, but not past its maximum.
                with T.serial(0, height) as r:
                    self._scale(scores, tops, r, T.bind(scale(r)), blocks, seen, tokens[r], masks[r])
                with T.serial(0, height) as r:
                    total = products.exponentials(scores, r, seen, tops[r])
                    T.buffer_store(inverse, T.float32(1.0) / T.max(total, T.float32(1.0)), [r])
                products.values(scores, inverse, tile, seen)

        by_rows(total if static(total) is None else chunk, products.tallest, sweep)

    def _scale(
        self,
        scores: Buffer,
        tops: Buffer,
        r: Index,
        scale: Expr,
        blocks: Index,
        seen: Index,
        token: Index,
        line: Index,
    ) -> None:
        """Scale and mask a row; its greatest score to ``tops``."""
        start = T.bind(r * (blocks * _WIDE))
        end = T.bind(T.min(self.key_count, token + 1)) if self.spec.causal else self.key_count
        best = T.alloc_buffer((_WIDE,), "float32")
        store(best, 0, fill(float32(LEAST), _WIDE), _WIDE)
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
        T.buffer_store(tops, join_lanes(load(best, 0, _WIDE), T.max), [r])

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
        if static(self.key_count) is not None and self.key_count % _WIDE == 0:
            return load(self.mask, line + block * _WIDE, _WIDE)
        part = T.alloc_buffer((_WIDE,), str(self.spec.mask))
        left = T.min(self.key_count - block * _WIDE, _WIDE)
        when(left == _WIDE, lambda: store(part, 0, load(self.mask, line + block * _WIDE, _WIDE), _WIDE))

        def some() -> None:
            with T.serial(0, left) as lane:
                T.buffer_store(part, self.mask[line + block * _WIDE + lane], [lane])  # type: ignore[index]

        when(left < _WIDE, some)
        return load(part, 0, _WIDE)
