"""Weights as CUDA kernels read them, packed once at load for all profiles.

``words``: int32 [outputs][taps][words], four int8 inputs a word and zeros past the last, in whole quads of words; the
layout of tensor-core products. ``sums``: int32 [outputs], the sum of each output's weights at a width, which takes
input zero points out. ``taps``: int8 [taps][channels], of depthwise kernels.
"""

from dataclasses import dataclass, replace

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.cuda.threads import for_each_thread
from t3c_compile.backends.tvm.kernels.emit import Index, ceil_div, prim_func, top_bits

_QUAD = 4  # words that are loaded at once, and int8 values a word


@dataclass(frozen=True)
class CudaPacking:
    """How one raw int8 tensor is packed. ``strides`` are the raw strides of (output, input, tap), in elements."""

    layout: str
    raw_shape: tuple[int, ...]
    outputs: int
    inputs: int
    taps: int
    strides: tuple[int, int, int]
    bits: int = 8

    @property
    def tap_words(self) -> int:
        """Words from a tap to the next."""
        return ceil_div(self.inputs, _QUAD * _QUAD) * _QUAD

    @property
    def shape(self) -> tuple[int, ...]:
        if self.layout == "sums":
            return (self.outputs,)
        return (self.taps, self.outputs) if self.layout == "taps" else (self.outputs, self.taps, self.tap_words)

    @property
    def dtype(self) -> str:
        return "int8" if self.layout == "taps" else "int32"

    def sums(self, bits: int) -> "CudaPacking":
        """The sums of the same weights rounded to ``bits``."""
        return replace(self, layout="sums", bits=bits)


def words_of_matrix(shape: tuple[int, ...], transposed: bool = False) -> CudaPacking:
    """int8 [outputs, inputs], or [inputs, outputs] when ``transposed``."""
    if transposed:
        return CudaPacking("words", shape, shape[1], shape[0], 1, (1, shape[1], 0))
    return CudaPacking("words", shape, shape[0], shape[1], 1, (shape[1], 1, 0))


def words_of_conv(shape: tuple[int, ...]) -> CudaPacking:
    """int8 [O, C / groups, kh, kw]."""
    taps = shape[2] * shape[3]
    return CudaPacking("words", shape, shape[0], shape[1], taps, (shape[1] * taps, taps, 1))


def taps_of_depthwise(shape: tuple[int, ...]) -> CudaPacking:
    """int8 [channels, ..., kh, kw], the rest 1."""
    taps = shape[-2] * shape[-1]
    return CudaPacking("taps", shape, shape[0], 1, taps, (taps, 0, 1))


def pack(p: CudaPacking) -> tvm.tirx.PrimFunc:
    """(raw, packed) of the shapes in ``p``."""
    with prim_func(f"pack_{p.layout}") as function:
        raw, packed = function.args(raw=(p.raw_shape, "int8"), packed=(p.shape, p.dtype))

        def value(output: Index, source: Index, tap: Index) -> Expr:
            return raw[output * p.strides[0] + source * p.strides[1] + tap * p.strides[2]]

        if p.layout == "sums":

            @for_each_thread(p.outputs)
            def _(output: Index) -> None:
                total = T.alloc_buffer((1,), "int32", scope="local")
                T.buffer_store(total, T.int32(0), [0])
                with T.serial(0, p.taps) as tap, T.serial(0, p.inputs) as i:
                    weight = T.cast(top_bits(value(output, i, tap), p.bits, 1), "int32")
                    T.buffer_store(total, total[0] + weight, [0])
                T.buffer_store(packed, total[0], [output])

        elif p.layout == "taps":

            @for_each_thread(p.taps * p.outputs)
            def _(place: Index) -> None:
                T.buffer_store(packed, value(place % p.outputs, 0, place // p.outputs), [place])

        else:

            @for_each_thread(p.outputs * p.taps * p.tap_words)
            def _(place: Index) -> None:
                output, rest = T.bind(place // (p.taps * p.tap_words)), T.bind(place % (p.taps * p.tap_words))
                tap, first = T.bind(rest // p.tap_words), T.bind(rest % p.tap_words * _QUAD)
                word: Expr = T.int32(0)
                for i in range(_QUAD):
                    byte = T.cast(value(output, first + i, tap), "int32") & 255
                    word = word | (T.if_then_else(first + i < p.inputs, byte, T.int32(0)) << (8 * i))
                T.buffer_store(packed, word, [place])

    return function.func
