"""The convolution ops: dense and depthwise ``int8_conv2d``, and the SVD, Tucker-2 and CP chains, each one kernel.

Every image of the batch goes through the stages in turn; middles stay in int8 scratch.
"""

from dataclasses import dataclass
from functools import cache

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import Buffer, Index, ceil_div, prim_func
from t3c_compile.backends.tvm.kernels.epilogues import ToImage, ToWords
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa
from t3c_compile.backends.tvm.kernels.pack import quads_of_conv, quads_of_matrix
from t3c_compile.backends.tvm.kernels.pixels import Planes, convolve, default_depthwise_tile, default_tile, depthwise
from t3c_compile.backends.tvm.kernels.tile import Tiles, tile_of
from t3c_compile.backends.tvm.kernels.window import SLACK, Window, channel_words, pointwise, spread


@dataclass(frozen=True)
class ConvSpec:
    """``int8_conv2d``: batch size (or the name of a symbolic one), channels and geometry."""

    batch: int | str
    channels: int
    outputs: int
    window: Window
    groups: int
    bits: int
    bias: bool
    finish: Finish = PLAIN

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.channels == self.outputs and self.groups > 1


@dataclass(frozen=True)
class ChainSpec:
    """A factorized convolution; ``form`` is svd, tucker2 or cp.

    ``ranks``: the greatest (input, output) ranks, equal for svd and cp.
    """

    form: str
    batch: int | str
    channels: int
    outputs: int
    window: Window
    ranks: tuple[int, int]
    rank: int
    bits: int
    gain: bool
    bias: bool
    finish: Finish = PLAIN


def _read_image(
    isa: Isa, x: Buffer, batch: Index, channels: int, groups: int, window: Window, zero_point: Index
) -> Planes:
    """Spread image ``batch`` of int8 NCHW ``x``, each group's channels in words of their own."""
    per_group = channels // groups
    quads, rest = ceil_div(per_group, QUAD), per_group % QUAD
    size = window.size[0] * window.size[1]
    base = batch * (channels * size)

    def word(quad: Index, y: Index, column: Index, lanes: int, step: int) -> object:
        channel = quad // quads * per_group + quad % quads * QUAD
        pixel = y * window.size[1] + column
        full = channel_words(isa, x, base, size, QUAD)
        if rest == 0:
            return full(channel, pixel, lanes, step)
        part = channel_words(isa, x, base, size, rest)
        if quads == 1:
            return part(channel, pixel, lanes, step)
        return T.if_then_else(
            quad % quads < quads - 1, full(channel, pixel, lanes, step), part(channel, pixel, lanes, step)
        )

    words = spread(isa, window, groups * quads, word, zero_point)
    return Planes(words, window.plane_words, quads, zero_point, groups)


def _middle(isa: Isa, channels: int, pixels: int) -> Planes:
    """Scratch for ``channels`` of int8 words, ``pixels`` each."""
    quads, stride = ceil_div(channels, QUAD), pixels + SLACK
    return Planes(T.alloc_buffer((quads * stride + SLACK,), "int32"), stride, quads, 0)


@cache
def int8_conv2d(isa: Isa, s: ConvSpec, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
    """(int8 x [N, C, H, W], numbers, weight, float32 scale [O], float32 bias [O] if any, ``finish`` of
    [N, O, H', W']).

    ``numbers``: float32 x_scale, x_zero_point (an argument, so that layers and profiles of one shape share a kernel).
    ``weight`` is packed by ``quads_of_conv``; for a depthwise convolution it is the raw [O, 1, kh, kw].
    """
    w = s.window
    raw = (s.outputs, s.channels // s.groups, *w.kernel)
    packing = quads_of_conv(raw, s.groups)
    with prim_func("int8_conv2d_depthwise" if s.is_depthwise else "int8_conv2d", tiles) as function:
        x, numbers, weight, scale, bias, *ends = function.args(
            x=((s.batch, s.channels, *w.size), "int8"),
            numbers=((2,), "float32"),
            weight=(raw if s.is_depthwise else packing.shape, "int8"),
            scale=((s.outputs,), "float32"),
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((s.batch, s.outputs, *w.out)),
        )
        x_scale, zero_point = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32"))
        writer = Writer(s.finish, ends)
        with T.serial(0, function.size((s.batch,))) as n:
            base = n * (s.outputs * w.out[0] * w.out[1])
            if s.is_depthwise:
                planes = _read_image(isa, x, n, s.channels, 1, w, zero_point)
                done = ToImage(isa, w, writer, base, x_scale, scale, bias, gain_first=True)
                tile = tile_of(tiles, 0, default_depthwise_tile())
                depthwise(isa, w, planes, weight, s.channels, s.bits, done, tile)
            else:
                seen = seen_window(w)
                planes = _read_image(isa, x, n, s.channels, s.groups, seen, zero_point)
                done = ToImage(isa, seen, writer, base, x_scale, scale, bias, gain_first=True)
                tile = tile_of(tiles, 0, default_tile(isa, seen))
                convolve(isa, seen, planes, weight, planes.quads, s.outputs // s.groups, s.bits, done, tile)
    return function.func


def _is_pointwise(w: Window) -> bool:
    return w.kernel == (1, 1) and w.stride == (1, 1) and w.padding == (0, 0)


def seen_window(w: Window) -> Window:
    """The window of a dense product: a 1x1 one sees the image as one row."""
    return pointwise(w.size[0] * w.size[1]) if _is_pointwise(w) else w


def chain_windows(s: ChainSpec) -> tuple[Window, ...]:
    """The window of each product of a chain. The 1x1 stages see the image as one row; an SVD's stride is taken as the
    image is read."""
    if s.form == "svd":
        first = seen_window(s.window)
        return first, first
    return pointwise(s.window.size[0] * s.window.size[1]), s.window, s.window


@cache
def conv_chain(isa: Isa, s: ChainSpec, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
    """(int8 x, numbers, v, core but for svd, u, mid_scale, core_scale but for svd, out_gain, bias if any, ``finish``).

    ``numbers``: float32 x_scale / h_scale, x_zero_point, h_scale / g_scale, and the scale of the last middle.
    ``v`` and ``u`` are packed by ``quads_of_matrix`` (u transposed), a Tucker core by ``quads_of_conv``; a CP core
    is raw.
    """
    w = s.window
    (r_in, r_out), svd = s.ranks, s.form == "svd"
    k_in = min(s.rank, r_in)
    first, *_, seen = chain_windows(s)
    out = w.out[0] * w.out[1]
    core_shape = (r_in, *w.kernel) if s.form == "cp" else quads_of_conv((r_out, r_in, *w.kernel)).shape
    with prim_func(f"{s.form}_conv", tiles) as function:
        x, numbers, v, core, u, mid_scale, core_scale, gain, bias, *ends = function.args(
            x=((s.batch, s.channels, *w.size), "int8"),
            numbers=((4,), "float32"),
            v=(quads_of_matrix((r_in, s.channels)).shape, "int8"),
            core=None if svd else (core_shape, "int8"),
            u=(quads_of_matrix((r_out, s.outputs), transposed=True).shape, "int8"),
            mid_scale=((r_in,), "float32"),
            core_scale=None if svd else ((r_out,), "float32"),
            out_gain=((s.outputs,), "float32") if s.gain else None,
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((s.batch, s.outputs, *w.out)),
        )
        x_to_h, zero_point = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32"))
        h_to_g, scale = T.bind(numbers[2]), T.bind(numbers[3])
        writer = Writer(s.finish, ends)
        with T.serial(0, function.size((s.batch,))) as n:
            image = _read_image(isa, x, n, s.channels, 1, first, zero_point)
            h = _middle(isa, k_in, first.pixels)
            to_h = ToWords(isa, h.buffer, h.stride, mid_scale, x_to_h)
            convolve(isa, first, image, v, image.quads, k_in, s.bits, to_h, tile_of(tiles, 0, default_tile(isa, first)))
            # The core's output keeps the columns that its window drops; the last stage drops them.
            last = h if svd else _core(isa, s, h, core, core_scale, h_to_g, tiles)
            done = ToImage(isa, seen, writer, n * (s.outputs * out), scale, gain, bias, gain_first=False)
            tile = tile_of(tiles, 1 if svd else 2, default_tile(isa, seen))
            convolve(isa, seen, last, u, ceil_div(r_out, QUAD), s.outputs, s.bits, done, tile, as_it_lies=True)
    return function.func


def _core(isa: Isa, s: ChainSpec, h: Planes, core: Buffer, core_scale: Buffer, h_to_g: Expr, tiles: Tiles) -> Planes:
    """The middle stage: int8 ``h`` at the input's size through the window to int8 at the output's."""
    w = s.window

    def word(quad: Index, y: Index, column: Index, lanes: int, step: int) -> object:
        at = quad * h.stride + y * w.size[1] + column
        return h.buffer[at] if lanes == 1 else h.buffer[T.ramp(at, step, lanes)]

    k_out = min(s.rank, s.ranks[1])
    planes = Planes(spread(isa, w, h.quads, word, 0), w.plane_words, h.quads, 0)
    g = _middle(isa, k_out, w.pixels)
    to_g = ToWords(isa, g.buffer, g.stride, core_scale, h_to_g)
    if s.form == "cp":
        depthwise(isa, w, planes, core, k_out, s.bits, to_g, tile_of(tiles, 1, default_depthwise_tile()))
    else:
        tile = tile_of(tiles, 1, default_tile(isa, w))
        convolve(isa, w, planes, core, ceil_div(s.ranks[0], QUAD), k_out, s.bits, to_g, tile)
    return g
