"""The convolution ops: dense and depthwise ``int8_conv2d``, and the SVD, Tucker-2 and CP chains, each one kernel.

Images lie as [batch, height, width, channels], and a convolution is a product whose rows are output pixels. The images
of a batch go through each stage together; middles stay in int8 scratch.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.depthwise import depthwise
from t3c_compile.backends.tvm.kernels.emit import Buffer, Index, Shape, prim_func, product, static
from t3c_compile.backends.tvm.kernels.epilogues import chain_end, dense, middle
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.gemm import multiply, tile_for
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa, for_middle, for_weights
from t3c_compile.backends.tvm.kernels.pack import Packing, lanes_of_depthwise, words_of_conv, words_of_matrix
from t3c_compile.backends.tvm.kernels.product import Product, Rows, middle_rows
from t3c_compile.backends.tvm.kernels.tile import Tiles
from t3c_compile.backends.tvm.kernels.window import Images, Window

# Channels up to which a kernel reads float32 planes itself: a pixel is one word.
MOST_PLANES = QUAD


@dataclass(frozen=True)
class ConvSpec:
    """``int8_conv2d``: batch size (or the name of a symbolic one), channels and geometry.

    ``planes``: x is what the int8 images are made of, float32 [N, C, H, W]; see :data:`MOST_PLANES`.
    """

    batch: int | str
    channels: int
    outputs: int
    window: Window
    groups: int
    bits: int
    bias: bool
    finish: Finish = PLAIN
    planes: bool = False

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.channels == self.outputs and self.groups > 1

    def packing(self, isa: Isa) -> Packing:
        """How the weight [O, C / groups, kh, kw] is packed."""
        shape = (self.outputs, self.channels // self.groups, *self.window.kernel)
        return lanes_of_depthwise(shape) if self.is_depthwise else words_of_conv(isa, shape, self.groups)


@dataclass(frozen=True)
class ChainSpec:
    """A factorized convolution; ``form`` is svd, tucker2 or cp.

    ``ranks``: the greatest (input, output) ranks, equal for svd and cp. ``planes`` as for :class:`ConvSpec`.
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
    planes: bool = False

    def core_packing(self, isa: Isa) -> Packing | None:
        """How the core is packed: [R', R, kh, kw] of Tucker-2, [R, kh, kw] of CP."""
        if self.form == "svd":
            return None
        if self.form == "cp":
            return lanes_of_depthwise((self.ranks[0], *self.window.kernel))
        return words_of_conv(isa, (self.ranks[1], self.ranks[0], *self.window.kernel))


def every_pixel(w: Window) -> Window:
    """A 1x1 window over the same images."""
    return Window(w.size, (1, 1), (1, 1), (0, 0), (1, 1))


def _input(isa: Isa, s: ConvSpec | ChainSpec) -> tuple[Shape, str]:
    if s.planes:
        return (s.batch, s.channels, *s.window.size), "float32"
    return (s.batch, *s.window.size, s.channels), isa.activation_dtype


def _read(
    isa: Isa, s: ConvSpec | ChainSpec, seen: Window, batch: Index, x: Buffer, numbers: Buffer, at: int, zero: Expr
) -> Images:
    """The images of the batch as the window ``seen`` reads them; ``numbers`` from ``at`` on are for planes."""
    images = Images(isa, seen, batch, s.channels, zero, written=False)
    if s.planes:
        images.quantize(x, T.bind(numbers[at]), T.bind(numbers[at + 1]))
    else:
        images.read(x)
    return images


@cache
def int8_conv2d(isa: Isa, s: ConvSpec, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
    """(x [N, H, W, C] as the dot product reads it, numbers, packed weight, float32 scale [O], float32 bias [O] if any,
    ``finish`` of [N, H', W', O]).

    ``numbers`` (an argument, so that layers and profiles of one shape share a kernel): float32 x_scale, x_zero_point;
    of planes also 1 / scale and zero point of their quantization.
    """
    w = s.window
    with prim_func("int8_conv2d_depthwise" if s.is_depthwise else "int8_conv2d", tiles) as function:
        x, numbers, weight, scale, bias, *ends = function.args(
            x=_input(isa, s),
            numbers=((4 if s.planes else 2,), "float32"),
            weight=(s.packing(isa).shape, "int8"),
            scale=((s.outputs,), "float32"),
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((s.batch, *w.out, s.outputs)),
        )
        x_scale, zero_point = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32"))
        writer = Writer(s.finish, ends)
        batch = function.size((s.batch,))
        rows = product((batch, w.pixels))
        end = dense(isa, writer, s.outputs, x_scale, scale, bias)
        if not s.is_depthwise:
            isa = for_weights(isa, s.bits, static(rows))
        images = _read(isa, s, w, batch, x, numbers, 2, zero_point)
        if s.is_depthwise:
            depthwise(isa, rows, s.channels, images.rows(), weight, zero_point, s.bits, end)
        else:
            outputs, inputs = s.outputs // s.groups, s.channels // s.groups
            shape = Product(rows, outputs, inputs, inputs, zero_point, s.bits, s.groups)
            tile = tile_for(isa, tiles, 0, (s.batch, w.pixels), outputs, inputs * prod(w.kernel))
            multiply(isa, shape, images.rows(), weight, end, tile)
    return function.func


@cache
def conv_chain(isa: Isa, s: ChainSpec, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
    """(x as above, numbers, v, core but for svd, u, mid_scale, core_scale but for svd, out_gain, bias if any,
    ``finish``).

    ``numbers``: float32 x_scale / h_scale, x_zero_point, h_scale / g_scale, and the scale of the last middle; of planes
    also 1 / scale and zero point of their quantization.
    ``v`` and ``u`` are packed by ``words_of_matrix`` (u transposed), the core as the spec says.
    """
    w = s.window
    (r_in, r_out), core_packing = s.ranks, s.core_packing(isa)
    k_in, k_out = min(s.rank, r_in), min(s.rank, r_out)
    with prim_func(f"{s.form}_conv", tiles) as function:
        x, numbers, v, core, u, mid_scale, core_scale, gain, bias, *ends = function.args(
            x=_input(isa, s),
            numbers=((6 if s.planes else 4,), "float32"),
            v=(words_of_matrix(isa, (r_in, s.channels)).shape, "int8"),
            core=None if core_packing is None else (core_packing.shape, "int8"),
            u=(words_of_matrix(isa, (r_out, s.outputs), transposed=True).shape, "int8"),
            mid_scale=((r_in,), "float32"),
            core_scale=None if core_packing is None else ((r_out,), "float32"),
            out_gain=((s.outputs,), "float32") if s.gain else None,
            bias=((s.outputs,), "float32") if s.bias else None,
            **s.finish.arguments((s.batch, *w.out, s.outputs)),
        )
        x_to_h, zero_point = T.bind(numbers[0]), T.bind(T.cast(numbers[1], "int32"))
        h_to_g, scale = T.bind(numbers[2]), T.bind(numbers[3])
        writer = Writer(s.finish, ends)
        batch = function.size((s.batch,))
        rows = product((batch, w.pixels))
        isa = for_weights(isa, s.bits, static(rows))
        between = for_middle(isa)
        # An SVD's stride is taken as the image is read; the other forms begin with every pixel.
        seen = w if core is None else every_pixel(w)
        images = _read(isa, s, seen, batch, x, numbers, 4, zero_point)
        first = Product(product((batch, seen.pixels)), k_in, s.channels, s.channels, zero_point, s.bits)
        tile = tile_for(isa, tiles, 0, (s.batch, seen.pixels), k_in, s.channels)
        if core is None:
            last = middle_rows(between, first.rows, k_in)
            to_h = middle(between, last.buffer, last.place, k_in, mid_scale, x_to_h, last.end)
            multiply(isa, first, images.rows(), v, to_h, tile)
        else:
            h = Images(between, w, batch, k_in, 0, written=True)
            h.allocate()
            h.pad()
            to_h = middle(between, h.buffer, h.at, k_in, mid_scale, x_to_h)
            multiply(isa, first, images.rows(), v, to_h, tile)
            last = _core(between, s, batch, h.rows(), core, core_scale, h_to_g, tiles)
        end = chain_end(isa, writer, s.outputs, scale, gain, bias)
        tile = tile_for(isa, tiles, -1, (s.batch, w.pixels), s.outputs, k_out)
        multiply(isa, Product(rows, s.outputs, k_out, r_out, 0, s.bits), last, u, end, tile)
    return function.func


def _core(
    isa: Isa,
    s: ChainSpec,
    batch: Index,
    h: Rows,
    core: Buffer,
    core_scale: Buffer,
    h_to_g: Expr,
    tiles: Tiles,
) -> Rows:
    """The middle stage: int8 ``h`` at the input's size through the window to int8 at the output's."""
    (r_in, r_out), rows = s.ranks, product((batch, s.window.pixels))
    k_in, k_out = min(s.rank, r_in), min(s.rank, r_out)
    g = middle_rows(isa, rows, k_out)
    to_g = middle(isa, g.buffer, g.place, k_out, core_scale, h_to_g, g.end)
    if s.form == "cp":
        depthwise(isa, rows, k_out, h, core, 0, s.bits, to_g)
    else:
        tile = tile_for(isa, tiles, 1, (s.batch, s.window.pixels), k_out, k_in * prod(s.window.kernel))
        multiply(isa, Product(rows, k_out, k_in, r_in, 0, s.bits), h, core, to_g, tile)
    return g
