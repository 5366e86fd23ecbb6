"""Weight packing, run once at load: from the raw store's layout to what the kernels read.

``words``: int8 ``[groups][outputs / 16][taps][inputs / word][16][word]``, the layout of every int8 kernel, zero-padded;
the instruction set says how many inputs a word is.
``lanes``: ``[outputs / 16][inputs][16]`` in the raw dtype, the layout of the float and depthwise kernels.
``nibbles``: int8 ``[outputs / 32][inputs / 4][16][4]``, the layout of weight-only kernels at 4 bits: words of four, and
a byte holds the top four bits of two outputs 16 apart, the first's below the second's.
"""

from dataclasses import dataclass, replace

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import Index, ceil_div, for_each, prim_func, top_bits
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa


@dataclass(frozen=True)
class Packing:
    """How one raw tensor is packed. ``strides`` are the raw strides of (output, input, tap), in elements.

    ``word``: inputs of one output that lie together. ``bits``: what words and int8 lanes are rounded to.
    """

    layout: str
    dtype: str
    raw_shape: tuple[int, ...]
    groups: int
    outputs: int
    inputs: int
    taps: int
    strides: tuple[int, int, int]
    word: int = 1
    bits: int = 8

    @property
    def block(self) -> int:
        """Outputs a packed block."""
        return 2 * BLOCK if self.layout == "nibbles" else BLOCK

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the packed tensor."""
        blocks = self.groups * ceil_div(self.outputs, self.block)
        words = self.taps * ceil_div(self.inputs, self.word)
        return (blocks, words, BLOCK) if self.layout == "lanes" else (blocks, words, BLOCK, self.word)


def words_of_matrix(isa: Isa, shape: tuple[int, ...], transposed: bool = False) -> Packing:
    """int8 [outputs, inputs], or [inputs, outputs] when ``transposed``."""
    return replace(lanes_of_matrix(shape, "int8", transposed), layout="words", word=isa.word)


def quads_of_matrix(shape: tuple[int, ...], transposed: bool = False) -> Packing:
    """The same in words of four, on every instruction set."""
    return replace(lanes_of_matrix(shape, "int8", transposed), layout="words", word=QUAD)


def nibbles_of_matrix(shape: tuple[int, ...], transposed: bool = False) -> Packing:
    """The same, kept at 4 bits."""
    return replace(quads_of_matrix(shape, transposed), layout="nibbles")


def words_of_conv(isa: Isa, shape: tuple[int, ...], groups: int = 1) -> Packing:
    """int8 [O, C / groups, kh, kw]."""
    outputs, inputs, taps = shape[0] // groups, shape[1], shape[2] * shape[3]
    return Packing("words", "int8", shape, groups, outputs, inputs, taps, (inputs * taps, taps, 1), isa.word)


def lanes_of_matrix(shape: tuple[int, ...], dtype: str, transposed: bool = False) -> Packing:
    """[outputs, inputs] of ``dtype``, or [inputs, outputs] when ``transposed``."""
    outputs, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    strides = (1, shape[1], 0) if transposed else (shape[1], 1, 0)
    return Packing("lanes", dtype, shape, 1, outputs, inputs, 1, strides)


def lanes_of_depthwise(shape: tuple[int, ...]) -> Packing:
    """int8 [channels, ..., kh, kw], the rest 1: as [channels / 16][kh * kw][16]."""
    taps = shape[-2] * shape[-1]
    return Packing("lanes", "int8", shape, 1, shape[0], taps, 1, (taps, 1, 0))


def pack(packing: Packing) -> tvm.tirx.PrimFunc:
    """(raw, packed) of the shapes in ``packing``."""
    p = packing
    blocks, words = ceil_div(p.outputs, p.block), ceil_div(p.inputs, p.word)
    with prim_func(f"pack_{p.layout}") as function:
        raw, packed = function.args(raw=(p.raw_shape, p.dtype), packed=(p.shape, p.dtype))

        @for_each(p.groups * blocks, p.groups * blocks * p.taps * p.inputs * BLOCK)
        def _(task: Index) -> None:
            def value(output: Index, source: Index, tap: Index) -> Expr:
                where = (
                    ((task // blocks) * p.outputs + output) * p.strides[0] + source * p.strides[1] + tap * p.strides[2]
                )
                inside = T.And(output < p.outputs, source < p.inputs)
                return T.if_then_else(inside, raw[where], T.cast(0, p.dtype))

            with T.serial(0, p.taps) as tap, T.serial(0, words) as k, T.serial(0, BLOCK) as lane:
                output = (task % blocks) * p.block + lane
                at = ((task * p.taps + tap) * words + k) * BLOCK + lane
                with T.serial(0, p.word) as i:
                    found = value(output, k * p.word + i, tap)
                    if p.layout == "nibbles":
                        found = _pair(found, value(output + BLOCK, k * p.word + i, tap))
                    T.buffer_store(packed, top_bits(found, p.bits, 1), [at * p.word + i])

    return function.func


def _pair(low: Expr, high: Expr) -> Expr:
    """Two int8 values at 4 bits in one byte."""
    return ((top_bits(low, 4, 1) >> T.int8(4)) & T.int8(15)) | top_bits(high, 4, 1)
