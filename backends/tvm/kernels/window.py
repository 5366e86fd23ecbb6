"""Convolution windows, and images spread out so that every tap of a window reads contiguous pixels.

An image lies as words of four channels, ``[phases][channels / 4][rows][columns]``. Padding is written out, and a stride
of s splits rows and columns into s phases; so output pixel ``p``, counted along rows of ``columns`` pixels, finds tap
(ky, kx) at ``p`` plus a constant of the tap, whatever the stride and dilation. The few columns past the output's width
are computed and dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    ceil_div,
    chunks,
    fill,
    for_each,
    int32,
    store,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa

# words(quad, row, column, lanes, column step): int32 words of the source image
Source = Callable[[Index, Index, Index, int, int], Expr]

# Words past the last plane that a tile may read or write: the widest tile is 3 vectors of 16, twice over for overhang.
SLACK = 128


@dataclass(frozen=True)
class Window:
    """A 2-d convolution's geometry, spatial sizes static."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        def one(i: int) -> int:
            return (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[
                i
            ] + 1

        return one(0), one(1)

    @property
    def phases(self) -> tuple[int, int]:
        """How many of the stride's phases the taps touch."""

        def one(i: int) -> int:
            return 1 + max(k * self.dilation[i] % self.stride[i] for k in range(self.kernel[i]))

        return one(0), one(1)

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of one spread plane."""
        out = self.out
        rows, columns = (out[i] + (self.kernel[i] - 1) * self.dilation[i] // self.stride[i] for i in range(2))
        return rows, columns

    @property
    def plane_words(self) -> int:
        return self.plane[0] * self.plane[1]

    @property
    def pixels(self) -> int:
        """Output pixels counted along the plane's columns, up to the last one kept."""
        return (self.out[0] - 1) * self.plane[1] + self.out[1]

    @property
    def flat(self) -> bool:
        """No column is dropped."""
        return self.plane[1] == self.out[1]

    def tap(self, ky: Index, kx: Index) -> tuple[Index, Index]:
        """Phase number and word offset within the plane of tap (ky, kx)."""
        y, x = ky * self.dilation[0], kx * self.dilation[1]
        phase = (y % self.stride[0]) * self.phases[1] + x % self.stride[1]
        return phase, (y // self.stride[0]) * self.plane[1] + x // self.stride[1]


def pointwise(pixels: int) -> Window:
    """A 1x1 window over an image seen as one row."""
    return Window((1, pixels), (1, 1), (1, 1), (0, 0), (1, 1))


def channel_words(
    isa: Isa, x: Buffer, base: Index, pixels: int, channels: int
) -> Callable[[Index, Index, int, int], Expr]:
    """Words of int8 NCHW ``x``: ``read(channel, pixel, lanes, step)`` joins ``channels`` (1 to 4) of its planes."""

    def read(channel: Index, pixel: Index, lanes: int, step: int) -> Expr:
        word = fill(T.int32(isa.flip), lanes)
        for i in range(channels):
            at = base + (channel + i) * pixels + pixel
            value = x[at] if lanes == 1 else x[T.ramp(at, step, lanes)]
            wide = T.cast(T.reinterpret(vec("uint8", lanes), value), vec("int32", lanes))
            word = word ^ (wide << fill(T.int32(8 * i), lanes))
        return word

    return read


def spread(isa: Isa, w: Window, quads: int, source: Source, zero: Index) -> Buffer:
    """Spread ``quads`` planes of words read from ``source``; ``zero`` is the int8 value of padding."""
    (rows, columns), phases = w.plane, w.phases
    words = T.alloc_buffer((phases[0] * phases[1] * quads * w.plane_words + SLACK,), "int32")
    byte = int32(zero) & T.int32(0xFF)
    padding = T.bind((byte | (byte << 8) | (byte << 16) | (byte << 24)) ^ T.int32(isa.flip))

    def blank(start: Index, count: int) -> None:
        chunks(count, isa.lanes, lambda i, n: store(words, start + i, fill(padding, n), n))

    def row(quad: Index, start: Index, y: Index, px: int) -> None:
        step, shift = w.stride[1], px - w.padding[1]
        first = min(columns, max(0, ceil_div(-shift, step)))
        last = max(first, min(columns, (w.size[1] - 1 - shift) // step + 1))
        blank(start, first)
        chunks(
            last - first,
            isa.lanes,
            lambda i, n: store(words, start + first + i, source(quad, y, (first + i) * step + shift, n, step), n),
        )
        blank(start + last, columns - last)

    @for_each(phases[0] * quads, phases[0] * phases[1] * quads * w.plane_words * QUAD)
    def _(task: Index) -> None:
        py, quad = T.bind(task // quads), T.bind(task % quads)
        for px in range(phases[1]):
            plane = ((py * phases[1] + px) * quads + quad) * w.plane_words
            with T.serial(0, rows) as r:
                start = T.bind(plane + r * columns)
                y = T.bind(r * w.stride[0] + py - w.padding[0])
                inside = w.padding[0] == 0 and (rows - 1) * w.stride[0] + phases[0] - 1 < w.size[0]

                def filled(quad: Index = quad, start: Index = start, y: Index = y, px: int = px) -> None:
                    row(quad, start, y, px)

                def empty(start: Index = start) -> None:
                    blank(start, columns)

                when(True if inside else T.And(y >= 0, y < w.size[0]), filled, empty)

    return words
