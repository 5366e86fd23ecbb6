"""``t3c::attention_f32`` and ``t3c::attention_int8`` as a few kernels: products, softmax, products.

Scores stand in memory between them. Every product and sum is in the reference's order, so no kernel may go on with a
softmax before all keys are known.
"""

from dataclasses import dataclass
from functools import cache
from math import gcd

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.cuda.float_gemm import float_product
from t3c_compile.backends.tvm.cuda.gemm import Left, Product, Right, multiply
from t3c_compile.backends.tvm.cuda.rows import Row, for_each_row
from t3c_compile.backends.tvm.cuda.threads import words
from t3c_compile.backends.tvm.kernels.attention_heads import AttentionSpec, Heads, Layout, Places
from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Function,
    Index,
    ceil_div,
    float32,
    prim_func,
    product,
    static,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import Writer
from t3c_compile.backends.tvm.kernels.rows import LEAST, add
from t3c_compile.backends.tvm.kernels.vmath import Lanes
from t3c_compile.passes.ops.float_math import fast_exp
from t3c_compile.passes.ops.int8_attention import LEAST_NORM, MOST, STEP

_ONE = Lanes()
_BLOCK = 16  # keys are padded to whole loads of words


def padded(keys: Index) -> Index:
    """Bytes of a row of shares or of values by key."""
    return ceil_div(keys, _BLOCK) * _BLOCK


@dataclass(frozen=True)
class _Sizes:
    """Of a kernel under construction."""

    batch: Index
    heads: int
    groups: int
    rows: Index
    keys: Index


def _sizes(function: Function, s: AttentionSpec) -> _Sizes:
    batch, rows, keys = (function.size((d,)) for d in (s.batch, s.rows, s.keys))
    return _Sizes(batch, s.groups * s.share, s.groups, rows, keys)


def _steps(function: Function, layout: Layout) -> tuple[Index, Index, Index]:
    return function.size(layout.batch), function.size(layout.head), function.size(layout.token)


def _heads(function: Function, buffer: Buffer, tokens: Index, layout: Layout) -> Heads:
    return Heads(tokens, layout.start, _steps(function, layout), buffer)


def _places(function: Function, tokens: Index, layout: Layout) -> Places:
    return Places(tokens, layout.start, _steps(function, layout))


def _score_shape(s: AttentionSpec) -> tuple[int | str, ...]:
    return (s.batch, s.groups * s.share, s.rows, s.keys)


def _masked(
    function: Function,
    s: AttentionSpec,
    mask: Buffer | None,
    head: Index,
    row: Index,
    key: Index,
    value: Expr,
    scale: Expr,
) -> Expr:
    """A score: ``value * scale`` with the mask; ``head`` counts over the batch."""
    heads = s.groups * s.share
    if mask is not None:
        at: Index = 0
        for size, place in zip(function.dims(s.mask_shape), (head // heads, head % heads, row, key), strict=True):
            at = at * size + (0 if static(size) == 1 else place)
    nothing = float32(float("-inf"))
    if mask is None:
        value = value * scale
    elif s.mask == "bool":
        value = T.Select(T.cast(mask[at], "bool"), value * scale, nothing)
    else:
        value = T.fma(value, scale, mask[at])
    return T.Select(key <= row, value, nothing) if s.causal else value


@cache
def float_scores(s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(float32 query, key, mask where there is one, float32 scores [batch, heads, rows, keys])."""
    with prim_func("cuda_attention_scores") as function:
        q, k, mask, y = function.args(
            query=(s.layouts[0].shape, "float32"),
            key=(s.layouts[1].shape, "float32"),
            mask=None if s.mask is None else (s.mask_shape, s.mask),
            scores=(_score_shape(s), "float32"),
        )
        d = _sizes(function, s)
        query, key = (_heads(function, *x) for x in ((q, d.rows, s.layouts[0]), (k, d.keys, s.layouts[1])))

        def epilogue(head: Index, row: Index, column: Index, total: Expr) -> None:
            value = _masked(function, s, mask, head, row, column, total, float32(s.scale))
            T.buffer_store(y, value, [(head * d.rows + row) * d.keys + column])

        float_product(
            d.batch * d.heads,
            d.rows,
            d.keys,
            s.width,
            lambda h, row, i: q[query.row(h // d.heads, h % d.heads, row) + i],
            lambda h, i, column: k[key.row(h // d.heads, h % d.heads // s.share, column) + i],
            epilogue,
            right_along_inputs=True,
        )
    return function.func


@cache
def exponentials(s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(float32 scores, float32 exponentials [batch, heads, rows, keys], float32 inverse [batch, heads, rows])."""
    with prim_func("cuda_attention_exponentials") as function:
        shape = _score_shape(s)
        x, e, inverse = function.args(
            scores=(shape, "float32"), exponentials=(shape, "float32"), inverse=(shape[:3], "float32")
        )
        rows, keys = function.size(shape[:3]), function.size(shape[3:])

        @for_each_row(rows, keys)
        def _(row: Row, number: Index, there: Expr) -> None:
            start = T.bind(number * keys)
            top, one = _softmax(row, x, start)
            when(there, lambda: row.each(lambda i: T.buffer_store(e, _exponential(x, start, top, i), [start + i])))
            # All lanes have it.
            when(there, lambda: T.buffer_store(inverse, one, [number]))

    return function.func


def _exponential(scores: Buffer, start: Index, top: Expr, i: Index) -> Expr:
    return T.bind(fast_exp(_ONE, T.bind(scores[start + i] - top)))


def _softmax(row: Row, scores: Buffer, start: Index) -> tuple[Expr, Expr]:
    """The greatest score, and one over the sum of exponentials."""
    top = row.reduce(LEAST, lambda i: scores[start + i], T.max, T.max)
    total = row.reduce(0.0, lambda i: _exponential(scores, start, top, i), add)
    return top, T.bind(T.float32(1.0) / T.max(total, T.float32(1.0)))


@cache
def float_values(s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(float32 exponentials, inverse, float32 value, ``finish``)."""
    with prim_func("cuda_attention_values") as function:
        shape = _score_shape(s)
        e, inverse, v, *ends = function.args(
            exponentials=(shape, "float32"),
            inverse=(shape[:3], "float32"),
            value=(s.layouts[2].shape, "float32"),
            **s.finish.arguments(s.layouts[3].shape),
        )
        d = _sizes(function, s)
        value, output = _heads(function, v, d.keys, s.layouts[2]), _places(function, d.rows, s.layouts[3])
        writer = Writer(s.finish, ends)

        def epilogue(head: Index, row: Index, column: Index, total: Expr) -> None:
            at = output.row(head // d.heads, head % d.heads, row) + column
            writer.put(at, total * inverse[head * d.rows + row], 1)

        float_product(
            d.batch * d.heads,
            d.rows,
            s.value_width,
            d.keys,
            lambda h, row, i: e[(h * d.rows + row) * d.keys + i],
            lambda h, i, column: v[value.row(h // d.heads, h % d.heads // s.share, i) + column],
            epilogue,
        )
    return function.func


def _whole(x: Expr, ratio: Expr) -> Expr:
    return T.cast(T.cast(T.nearbyint(x * ratio), "int32"), "int8")


def _ratio(greatest: Expr) -> Expr:
    return T.bind(float32(MOST) / greatest)


@cache
def integer_rows(
    layout: Layout, batch: int | str, heads: int, tokens: int | str, width: int, by_column: bool = False
) -> tvm.tirx.PrimFunc:
    """(float32 x, int8 rows [batch, heads, tokens, width], float32 steps [batch, heads, tokens]): each row by its
    greatest number. ``by_column``: [batch, heads, width, padded tokens] instead, zeros past the last token."""
    with prim_func("cuda_integer_rows") as function:
        (count,) = function.dims((tokens,))
        across = padded(count)
        shape = (batch, heads, width, across) if by_column else (batch, heads, tokens, width)
        x, q, steps = function.args(
            x=(layout.shape, "float32"), rows=(shape, "int8"), steps=((batch, heads, tokens), "float32")
        )
        source = _heads(function, x, count, layout)
        images = function.size((batch, heads))
        # Columns past the last token are rows of their own, which hold nothing.
        each = across if by_column else count

        @for_each_row(images * each, width)
        def _(row: Row, number: Index, there: Expr) -> None:
            head, token = T.bind(number // each), T.bind(number % each)
            start = T.bind(source.row(head // heads, head % heads, T.min(token, count - 1)))
            greatest = row.reduce(LEAST_NORM, lambda i: T.abs(x[start + i]), T.max, T.max)
            ratio = _ratio(greatest)

            def write(i: Index) -> None:
                if by_column:
                    value = T.if_then_else(token < count, _whole(x[start + i], ratio), T.int8(0))
                    T.buffer_store(q, value, [(head * width + i) * across + token])
                else:
                    T.buffer_store(q, _whole(x[start + i], ratio), [number * width + i])

            when(there, lambda: row.each(write))
            step = greatest * float32(STEP)
            when(T.And(there, token < count), lambda: T.buffer_store(steps, step, [head * count + token]))

    return function.func


def _rows_of(buffer: Buffer, count: Index, pitch: Index, words_across: Index) -> tuple[Buffer, int]:
    """int8 rows ``pitch`` bytes apart as words, and how many of them are loaded at once."""
    known = static(words_across)
    return words(buffer, product((count, pitch)) // 4), 4 if known is None else gcd(4, known)


def _rows(buffer: Buffer, rows: Index, across: Index, width: int) -> Left:
    """``rows`` of each batch, ``across`` words each."""
    return Left(
        lambda head, row: [T.bind((head * rows + row) * across)],
        lambda state, _, word: (state[0] + word, None),
        buffer,
        width,
    )


@cache
def integer_scores(s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(int8 query rows, their steps, int8 key rows, their steps, mask where there is one, float32 scores)."""
    with prim_func("cuda_attention_int8_scores") as function:
        lead = (s.batch, s.groups * s.share)
        q, q_step, k, k_step, mask, y = function.args(
            query=((*lead, s.rows, s.width), "int8"),
            query_steps=((*lead, s.rows), "float32"),
            key=((s.batch, s.groups, s.keys, s.width), "int8"),
            key_steps=((s.batch, s.groups, s.keys), "float32"),
            mask=None if s.mask is None else (s.mask_shape, s.mask),
            scores=(_score_shape(s), "float32"),
        )
        d, across = _sizes(function, s), s.width // 4
        q_words, width = _rows_of(q, d.batch * d.heads * d.rows, s.width, across)
        k_words, _ = _rows_of(k, d.batch * d.groups * d.keys, s.width, across)

        def epilogue(head: Index, row: Index, column: Index, total: Expr) -> None:
            value = T.cast(total, "float32") * k_step[head // s.share * d.keys + column]
            scale = T.bind(q_step[head * d.rows + row] * float32(s.scale))
            at = (head * d.rows + row) * d.keys + column
            T.buffer_store(y, _masked(function, s, mask, head, row, column, T.bind(value), scale), [at])

        multiply(
            Product(d.rows, d.keys, 1, across, 8, d.batch * d.heads),
            _rows(q_words, d.rows, across, width),
            Right(k_words, lambda head, column: (head // s.share * d.keys + column) * across, 0, width),
            epilogue,
        )
    return function.func


@cache
def integer_shares(s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(float32 scores, float32 value steps [batch, groups, keys], int8 shares [batch, heads, rows, padded keys],
    float32 factors [batch, heads, rows]): what each key's value counts, and what one is worth."""
    with prim_func("cuda_attention_int8_shares") as function:
        shape = _score_shape(s)
        (keys,) = function.dims(shape[3:])
        across = padded(keys)
        x, v_step, shares, factors = function.args(
            scores=(shape, "float32"),
            value_steps=((s.batch, s.groups, s.keys), "float32"),
            shares=((*shape[:3], across), "int8"),
            factors=(shape[:3], "float32"),
        )
        d = _sizes(function, s)

        @for_each_row(d.batch * d.heads * d.rows, keys)
        def _(row: Row, number: Index, there: Expr) -> None:
            start, steps = T.bind(number * keys), T.bind(number // d.rows // s.share * keys)
            top, inverse = _softmax(row, x, start)

            def share(i: Index) -> Expr:
                return T.bind(_exponential(x, start, top, i) * v_step[steps + i])

            greatest = row.reduce(LEAST_NORM, share, T.max, T.max)
            ratio = _ratio(greatest)

            def write(i: Index) -> None:
                T.buffer_store(shares, _whole(share(i), ratio), [number * across + i])

            def rest(i: Index) -> None:
                when(i >= keys, lambda: T.buffer_store(shares, T.int8(0), [number * across + i]))

            when(there, lambda: row.each(write))
            when(there, lambda: Row(across, row.lane).each(rest))
            factor = T.bind(greatest * float32(STEP)) * inverse
            when(there, lambda: T.buffer_store(factors, factor, [number]))

    return function.func


@cache
def integer_values(s: AttentionSpec) -> tvm.tirx.PrimFunc:
    """(int8 shares, float32 factors, int8 values [batch, groups, width, padded keys], ``finish``)."""
    with prim_func("cuda_attention_int8_values") as function:
        (keys,) = function.dims((s.keys,))
        across = padded(keys)
        lead = (s.batch, s.groups * s.share, s.rows)
        p, factors, v, *ends = function.args(
            shares=((*lead, across), "int8"),
            factors=(lead, "float32"),
            value=((s.batch, s.groups, s.value_width, across), "int8"),
            **s.finish.arguments(s.layouts[3].shape),
        )
        d = _sizes(function, s)
        output, writer = _places(function, d.rows, s.layouts[3]), Writer(s.finish, ends)
        many = across // 4
        p_words, width = _rows_of(p, d.batch * d.heads * d.rows, across, many)
        v_words, _ = _rows_of(v, d.batch * d.groups * s.value_width, across, many)

        def epilogue(head: Index, row: Index, column: Index, total: Expr) -> None:
            at = output.row(head // d.heads, head % d.heads, row) + column
            writer.put(at, T.cast(total, "float32") * factors[head * d.rows + row], 1)

        multiply(
            Product(d.rows, s.value_width, 1, many, 8, d.batch * d.heads),
            _rows(p_words, d.rows, many, width),
            Right(v_words, lambda head, column: (head // s.share * s.value_width + column) * many, 0, width),
            epilogue,
        )
    return function.func
