"""What is tuned: a kernel by its template and shape, whatever profile or layer calls it."""

import re
from dataclasses import dataclass, replace
from math import prod

import tvm

from t3c_compile.backends.tvm.kernels.conv import ChainSpec, ConvSpec, conv_chain, every_pixel, int8_conv2d
from t3c_compile.backends.tvm.kernels.emit import Sizes, plain, size_at, symbol_name
from t3c_compile.backends.tvm.kernels.gemm import default_tile
from t3c_compile.backends.tvm.kernels.isa import Isa, for_weights
from t3c_compile.backends.tvm.kernels.linear import LinearSpec, int8_linear, svd_linear
from t3c_compile.backends.tvm.kernels.tile import Tiles
from t3c_compile.backends.tvm.tuning.products import TiledProduct

Spec = LinearSpec | ConvSpec | ChainSpec


@dataclass(frozen=True)
class Workload:
    """A kernel template and what it is called with. Equal :attr:`key`: the same tiles are good."""

    isa: Isa
    spec: Spec

    def kernel(self, tiles: Tiles = ()) -> tvm.tirx.PrimFunc:
        """The kernel with ``tiles``, one for each product; with the defaults where none is given.

        Where weights are rounded at load, nothing is left to round, and kernels of all widths are one.
        """
        spec = replace(self.spec, bits=8) if self.isa.rounds_at_load else self.spec
        if isinstance(spec, LinearSpec):
            return (svd_linear if spec.max_rank else int8_linear)(self.isa, spec, tiles)
        if isinstance(spec, ConvSpec):
            return int8_conv2d(self.isa, spec, tiles)
        return conv_chain(self.isa, spec, tiles)

    @property
    def key(self) -> str:
        """The shape in words; every symbolic dimension is ``n``.

        Without what leaves the order of tiles as it is: widths, biases, how images are read and what a kernel ends with
        (the same work for every element, whatever the tile), and the store's ranks, which are only a stride.
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

    def products(self, sizes: Sizes) -> tuple[TiledProduct, ...]:
        """The products that have a tile each, in the order of ``tiles``; depthwise ones have none."""
        s = self.spec
        if isinstance(s, LinearSpec):
            if s.max_rank:
                return self._product(sizes, s.lead, s.inputs, s.rank), self._product(sizes, s.lead, s.rank, s.outputs)
            return (self._product(sizes, s.lead, s.inputs, s.outputs),)
        out, taps = (s.batch, s.window.pixels), s.window.kernel[0] * s.window.kernel[1]
        if isinstance(s, ConvSpec):
            if s.is_depthwise:
                return ()
            return (self._product(sizes, out, s.channels // s.groups, s.outputs // s.groups, taps, s.groups),)
        k_in, k_out = min(s.rank, s.ranks[0]), min(s.rank, s.ranks[1])
        first = out if s.form == "svd" else (s.batch, every_pixel(s.window).pixels)
        return (
            self._product(sizes, first, s.channels, k_in),
            *([self._product(sizes, out, k_in, k_out, taps)] if s.form == "tucker2" else []),
            self._product(sizes, out, k_out, s.outputs),
        )

    def _product(
        self, sizes: Sizes, lead: tuple[int | str, ...], inputs: int, outputs: int, taps: int = 1, groups: int = 1
    ) -> TiledProduct:
        rows = prod(size_at(size, sizes) for size in lead)
        known = rows if all(isinstance(size, int) for size in lead) else None
        isa = for_weights(self.isa, self.spec.bits, known)
        return TiledProduct(isa, default_tile(isa, lead, outputs, inputs * taps), rows, outputs, inputs, taps, groups)

    def operations(self, sizes: Sizes) -> int:
        """Multiplications and additions of a call."""
        s, total = self.spec, sum(product.multiply_adds for product in self.products(sizes))
        if (isinstance(s, ConvSpec) and s.is_depthwise) or (isinstance(s, ChainSpec) and s.form == "cp"):
            channels = s.channels if isinstance(s, ConvSpec) else s.rank
            total += size_at(s.batch, sizes) * s.window.pixels * channels * s.window.kernel[0] * s.window.kernel[1]
        return 2 * total

    def arguments(self, sizes: Sizes) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of each argument and result."""
        free = self.spec.lead if isinstance(self.spec, LinearSpec) else (self.spec.batch,)
        known = {symbol_name(size): size_at(size, sizes) for size in free if isinstance(size, str)}
        return [
            (tuple(known[d.name] if isinstance(d, tvm.tirx.Var) else int(d.value) for d in p.shape), str(p.dtype))
            for p in self.kernel().params
        ]


def _key_of(*dims: int | str) -> str:
    """A product of dimensions: the known ones multiplied, each symbolic one by itself."""
    known, names = 1, []
    for size in dims:
        if isinstance(size, int):
            known *= size
        else:
            names.append(re.sub(r"[A-Za-z_]\w*", "n", plain(size)).replace(" ", ""))
    return "*".join([*names, str(known)] if known > 1 or not names else names)
