"""What is tuned: a kernel by its template and shape, whatever profile or layer calls it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import tvm

from t3c_compile.backends.tvm.kernels.conv import (
    ChainSpec,
    ConvSpec,
    chain_windows,
    conv_chain,
    int8_conv2d,
    seen_window,
)
from t3c_compile.backends.tvm.kernels.gemm import default_tile as default_linear_tile
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.linear import LinearSpec, int8_linear, svd_linear
from t3c_compile.backends.tvm.kernels.pixels import default_depthwise_tile, default_tile
from t3c_compile.backends.tvm.kernels.tile import Tiles
from t3c_compile.backends.tvm.kernels.window import Window
from t3c_compile.backends.tvm.tuning.products import Depthwise, Pixels, Product, Rows

# The sizes of symbols in symbolic dimensions, as they are measured; of those not named, 1.
Sizes = Mapping[str, int]
Spec = LinearSpec | ConvSpec | ChainSpec


@dataclass(frozen=True)
class Workload:
    """A kernel template and what it is called with. Equal :attr:`key`: the same tiles are good."""

    isa: Isa
    spec: Spec

    def kernel(self, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
        """The kernel with ``tiles``, one for each product; with the defaults where none is given."""
        if isinstance(self.spec, LinearSpec):
            return (svd_linear if self.spec.max_rank else int8_linear)(self.isa, self.spec, tiles)
        if isinstance(self.spec, ConvSpec):
            return int8_conv2d(self.isa, self.spec, tiles)
        return conv_chain(self.isa, self.spec, tiles)

    @property
    def key(self) -> str:
        """The shape in words; every symbolic dimension is ``n``.

        Without what leaves the order of tiles as it is: widths, biases and what a kernel ends with (the same work for
        every element, whatever the tile), and the store's ranks, which are only a stride.
        """
        s, isa = self.spec, self.isa.name
        if isinstance(s, LinearSpec):
            template = f"svd_linear rank={s.rank}" if s.max_rank else "int8_linear"
            return f"{isa} {template} rows={_key_of(*s.lead)} {s.inputs}->{s.outputs}"
        w = s.window
        shape = f"images={_key_of(s.batch)} {s.channels}x{w.size[0]}x{w.size[1]}->{s.outputs}"
        geometry = " ".join(
            f"{name}={pair[0]}x{pair[1]}"
            for name, pair, plain in (
                ("kernel", w.kernel, (1, 1)),
                ("stride", w.stride, (1, 1)),
                ("padding", w.padding, (0, 0)),
                ("dilation", w.dilation, (1, 1)),
            )
            if pair != plain
        )
        if isinstance(s, ConvSpec):
            template = "int8_conv2d" + (f" groups={s.groups}" if s.groups > 1 else "")
        else:
            template = f"{s.form}_conv ranks={min(s.rank, s.ranks[0])}x{min(s.rank, s.ranks[1])}"
        return f"{isa} {template} {shape} {geometry}".rstrip()

    def products(self, sizes: Sizes) -> tuple[Product, ...]:
        """The products that have a tile each, in the order of ``tiles``."""
        s, isa = self.spec, self.isa
        if isinstance(s, LinearSpec):
            rows = 1
            for size in s.lead:
                rows *= _size(size, sizes)
            ends = [(s.inputs, s.rank), (s.rank, s.outputs)] if s.max_rank else [(s.inputs, s.outputs)]
            return tuple(Rows(isa, default_linear_tile(isa), rows, n, m) for n, m in ends)
        if isinstance(s, ConvSpec):
            if s.is_depthwise:
                return (Depthwise(isa, default_depthwise_tile(), s.window, s.channels),)
            w = seen_window(s.window)
            return (_pixels(isa, w, w.kernel, s.channels // s.groups, s.outputs // s.groups, s.groups),)
        k_in, k_out = min(s.rank, s.ranks[0]), min(s.rank, s.ranks[1])
        first, *middle, last = chain_windows(s)
        core: list[Product] = []
        if s.form == "cp":
            core = [Depthwise(isa, default_depthwise_tile(), middle[0], k_out)]
        elif middle:
            core = [_pixels(isa, middle[0], middle[0].kernel, k_in, k_out)]
        return (
            _pixels(isa, first, (1, 1), s.channels, k_in),
            *core,
            _pixels(isa, last, (1, 1), k_out, s.outputs),
        )

    def images(self, sizes: Sizes) -> int:
        """How often the kernel goes through its products in a call."""
        return 1 if isinstance(self.spec, LinearSpec) else _size(self.spec.batch, sizes)

    def operations(self, sizes: Sizes) -> int:
        """Multiplications and additions of a call."""
        return 2 * self.images(sizes) * sum(product.multiply_adds for product in self.products(sizes))

    def arguments(self, sizes: Sizes) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of each argument and result."""
        return [
            (tuple(_size(d.name if isinstance(d, tvm.tirx.Var) else int(d.value), sizes) for d in p.shape), p.dtype)
            for p in self.kernel().params
        ]


def _pixels(isa: Isa, w: Window, kernel: tuple[int, int], inputs: int, outputs: int, groups: int = 1) -> Pixels:
    return Pixels(isa, default_tile(isa, w), w, kernel[0] * kernel[1], inputs, outputs, groups)


def _size(size: int | str, sizes: Sizes) -> int:
    """A dimension as it is measured; a symbolic one is an expression of symbols."""
    if isinstance(size, int):
        return size
    expression = sympy.sympify(size)
    return int(expression.subs({symbol: sizes.get(str(symbol), 1) for symbol in expression.free_symbols}))


def _key_of(*dims: int | str) -> str:
    """A product of dimensions: the known ones multiplied, each symbolic one by itself."""
    known, names = 1, []
    for size in dims:
        if isinstance(size, int):
            known *= size
        else:
            names.append(re.sub(r"[A-Za-z_]\w*", "n", size).replace(" ", ""))
    return "*".join([*names, str(known)] if known > 1 or not names else names)
