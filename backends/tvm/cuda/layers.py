"""The int8 products of layers, each one kernel: dense linear layers and convolutions, and each stage of a chain.

Images lie as [batch, height, width, channels]; a convolution's rows are output pixels, read where they lie.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import gcd

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.cuda.gemm import Left, Product, Right, multiply
from t3c_compile.backends.tvm.cuda.pack import CudaPacking
from t3c_compile.backends.tvm.cuda.threads import for_each_thread, words
from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Function,
    Index,
    Shape,
    ceil_div,
    prim_func,
    product,
    top_bits,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer, bounded_int32
from t3c_compile.backends.tvm.kernels.window import Window

DENSE, MIDDLE, CHAIN_END = "dense", "middle", "chain end"


@dataclass(frozen=True)
class LayerSpec:
    """``outputs`` (of all groups) from ``inputs`` (of one) by the weights of ``packing``, rounded to ``bits``.

    ``lead``: leading dimensions of the result, those of x where there is no ``window``, else (batch, height, width).
    ``end``: what becomes of the sums: :data:`DENSE` ``sums * (scale * numbers[0]) + bias``, :data:`MIDDLE` that without
    bias, rounded to int8, and :data:`CHAIN_END` ``sums * numbers[0] * scale + bias``, where ``gain`` says whether there
    is a scale. ``numbers[1]`` is x's zero point. ``depthwise``: each channel alone.
    """

    lead: tuple[int | str, ...]
    inputs: int
    outputs: int
    packing: CudaPacking
    bits: int
    end: str = DENSE
    gain: bool = True
    bias: bool = False
    zero_point: bool = False
    window: Window | None = None
    groups: int = 1
    depthwise: bool = False
    finish: Finish = PLAIN

    @property
    def shape(self) -> Shape:
        """Of the result."""
        return (*self.lead, self.outputs)

    @property
    def has_sums(self) -> bool:
        """Whether the kernel takes the sums of the weights: where input zero points are to be taken out."""
        return self.zero_point and not self.depthwise


@cache
def layer(s: LayerSpec) -> tvm.tirx.PrimFunc:
    """(int8 x, float32 numbers [2], packed weight, int32 sums [stored outputs] if any, float32 scale [stored outputs]
    if any, bias [outputs] if any, ``finish``, or int8 y of a middle)."""
    kind = "depthwise" if s.depthwise else "conv" if s.window else "linear"
    with prim_func(f"cuda_{kind}_{s.end.replace(' ', '_')}") as function:
        w = s.window
        channels = s.inputs * s.groups
        ends = {"h": (s.shape, "int8")} if s.end == MIDDLE else s.finish.arguments(s.shape)
        x, numbers, weight, sums, scale, bias, *ends_ = function.args(
            x=((*s.lead, s.inputs) if w is None else (s.lead[0], *w.size, channels), "int8"),
            numbers=((2,), "float32"),
            weight=(s.packing.shape, s.packing.dtype),
            sums=((s.packing.outputs,), "int32") if s.has_sums else None,
            scale=((s.packing.outputs,), "float32") if s.gain else None,
            bias=((s.outputs,), "float32") if s.bias else None,
            **ends,
        )
        factor, zero_point = numbers[0], T.cast(numbers[1], "int32")
        write = _end(s, factor, scale, bias, ends_)
        if s.depthwise:
            _depthwise(s, function, x, weight, zero_point, write)
        else:
            rows = function.size(s.lead)
            _multiply(s, rows, x, weight, zero_point if s.zero_point else None, sums, write)
    return function.func


def _end(s: LayerSpec, factor: Expr, scale: Buffer, bias: Buffer, ends: list[Buffer]) -> Callable[..., None]:
    """``write(row, output, sum)``."""
    writer = None if s.end == MIDDLE else Writer(s.finish, ends)

    def write(row: Index, output: Index, total: Expr) -> None:
        at = row * s.outputs + output
        if writer is None:
            value = T.cast(total, "float32") * (scale[output] * factor)
            h = bounded_int32(value, T.float32(-127), T.float32(127), 1)
            T.buffer_store(ends[0], T.cast(h, "int8"), [at])
            return
        value = T.cast(total, "float32")
        if s.end == DENSE:
            gain = scale[output] * factor
        elif scale is None:
            gain = factor
        else:
            value, gain = value * factor, scale[output]
        writer.put(at, value * gain if bias is None else T.fma(value, gain, bias[output]), 1)

    return write


def _multiply(
    s: LayerSpec,
    rows: Index,
    x: Buffer,
    weight: Buffer,
    zero_point: Expr | None,
    sums: Buffer,
    write: Callable[..., None],
) -> None:
    w, channels = s.window, s.inputs * s.groups
    taps = 1 if w is None else w.kernel[0] * w.kernel[1]
    inputs, outputs = s.inputs, s.outputs // s.groups
    tap_words = ceil_div(inputs, 4)
    aligned = inputs % 4 == 0
    width = gcd(4, tap_words) if aligned else 1
    if channels % (4 * width):
        width = gcd(width, channels // 4)
    p = Product(rows, outputs, taps, tap_words, s.bits, s.groups)

    def byte(place: Index) -> Expr:
        return T.cast(x[place], "int32") & 255

    def fetch(place: Index, word: Index) -> Expr:
        """A word of bytes that lie anywhere, zeros past the last input."""
        total: Expr = T.int32(0)
        for i in range(4):
            value = byte(place + i)
            if inputs % 4 and i >= inputs % 4:
                value = T.if_then_else(word * 4 + i < inputs, value, T.int32(0))
            total = total | (value << (8 * i))
        return total

    unit = 4 if aligned else 1  # bytes of what the buffer holds

    def state(group: Index, row: Index) -> list[Expr]:
        if w is None:
            return [T.bind(row * (inputs // unit))]
        image, y, x_ = _pixel(w, row)
        return [T.bind(group * (inputs // unit)), image, y, x_] if s.groups > 1 else [image, y, x_]

    def at(state: list[Expr], tap: Index, word: Index) -> tuple[Index, Expr | None]:
        inner = word * (4 // unit)
        if w is None:
            return state[0] + inner, None
        pixel, inside = _tap(w, state[-3:], tap)
        return pixel * (channels // unit) + (state[0] if s.groups > 1 else 0) + inner, inside

    # A pixel beside the image is the zero point; bytes past the inputs meet weights that are zero.
    outside = None if zero_point is None or w is None else T.bind((zero_point & 255) * T.int32(0x01010101))
    buffer = words(x, product((rows, inputs)) // 4 if w is None else x.shape[0] // 4) if aligned else x
    states = 1 if w is None else 4 if s.groups > 1 else 3
    left = Left(state, at, buffer, width, states, outside, None if aligned else fetch)
    stored = s.packing.taps * s.packing.tap_words
    right = Right(
        weight,
        lambda group, column: (group * outputs + column) * stored,
        s.packing.tap_words,
        4 if taps == 1 else gcd(4, tap_words),
    )

    def epilogue(group: Index, row: Index, column: Index, total: Expr) -> None:
        output = T.bind(group * outputs + column)
        total = total if zero_point is None else total - zero_point * sums[output]
        write(row, output, T.bind(total))

    multiply(p, left, right, epilogue)


def _pixel(w: Window, row: Index) -> list[Expr]:
    """Of output pixel ``row``: the first row of its image among those of the batch, and row and column of its first tap
    in the image."""
    line = T.bind(row // w.out[1])
    image = T.bind(line // w.out[0] * w.size[0])
    y = T.bind(line % w.out[0] * w.stride[0] - w.padding[0])
    return [image, y, T.bind(row % w.out[1] * w.stride[1] - w.padding[1])]


def _tap(w: Window, pixel: list[Expr], tap: Index) -> tuple[Index, Expr | None]:
    """Number of the pixel that a tap reads, and whether it is in the image."""
    image, y, x = pixel
    down = y if w.kernel[0] == 1 else T.bind(y + tap // w.kernel[1] * w.dilation[0])
    right = x if w.kernel[1] == 1 else T.bind(x + tap % w.kernel[1] * w.dilation[1])
    inside = None
    if w.padding != (0, 0):
        inside = T.And(T.And(down >= 0, down < w.size[0]), T.And(right >= 0, right < w.size[1]))
    return (image + down) * w.size[1] + right, inside


def _depthwise(
    s: LayerSpec, function: Function, x: Buffer, weight: Buffer, zero_point: Expr, write: Callable[..., None]
) -> None:
    w, channels = s.window, s.outputs
    assert w is not None

    @for_each_thread(function.size(s.shape))
    def _(task: Index) -> None:
        row, channel = T.bind(task // channels), T.bind(task % channels)
        pixel = _pixel(w, row)
        total = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(total, T.int32(0), [0])
        with T.serial(0, w.kernel[0] * w.kernel[1]) as tap:
            place, inside = _tap(w, pixel, tap)
            where = place * channels + channel
            q = T.bind(T.cast(top_bits(weight[tap * s.packing.outputs + channel], s.bits, 1), "int32"))

            def add() -> None:
                value = T.cast(x[where], "int32")
                value = value - zero_point if s.zero_point else value
                T.buffer_store(total, total[0] + value * q, [0])

            when(True if inside is None else inside, add)
        write(row, channel, total[0])
