"""Convolution windows, and images laid out so that a window's taps lie at constant distances, whatever the stride.

An image is ``[batch][rows][columns][channels]``, its padding written out, in the form the dot product reads.
"""

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
    load,
    product,
    store,
    vec,
)
from t3c_compile.backends.tvm.kernels.finish import quantized_int32
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa
from t3c_compile.backends.tvm.kernels.product import Rows, as_read, row_stride

# Bytes past the end that the last word or vector of channels may read.
_SLACK = 64


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
    def pixels(self) -> int:
        """Output pixels of an image."""
        return self.out[0] * self.out[1]

    @property
    def is_single(self) -> bool:
        """An output pixel reads one pixel, which is inside the image."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    @property
    def spread(self) -> tuple[int, int]:
        """Rows and columns of an image with its padding."""

        def one(i: int) -> int:
            reach = (self.out[i] - 1) * self.stride[i] + (self.kernel[i] - 1) * self.dilation[i] + 1
            return max(reach, self.size[i] + self.padding[i])

        return one(0), one(1)


class Images:
    """A batch of images with ``channels`` values a pixel, in the form the dot product reads, as ``window`` reads them.

    ``zero`` is the int8 value of padding. ``written``: a kernel's product writes them, in whole vectors; else they are
    read from a tensor, and where the window reads single pixels, those alone.
    """

    def __init__(self, isa: Isa, window: Window, batch: Index, channels: int, zero: Index, written: bool) -> None:
        self._isa, self._window, self._batch, self._zero = isa, window, batch, zero
        self._picked = window.is_single and not written
        self._size = window.out if self._picked else window.spread
        self._channels = channels
        self._stride = row_stride(channels) if written else ceil_div(channels, isa.word) * isa.word
        self.buffer: Buffer = None

    def allocate(self) -> None:
        """Scratch for them."""
        count = product((self._batch, *self._size, self._stride))
        self.buffer = T.alloc_buffer((count + _SLACK,), self._isa.activation_dtype)

    def at(self, pixel: Index) -> Index:
        """Element of a pixel of the unpadded images, counted over the batch."""
        w = self._window
        if self._size == w.size:
            return pixel * self._stride
        row, column = pixel // w.size[1], pixel % w.size[1]
        image, line = row // w.size[0], row % w.size[0]
        place = (image * self._size[0] + line + w.padding[0]) * self._size[1] + column + w.padding[1]
        return place * self._stride

    def rows(self) -> Rows:
        """The output pixels of the batch as rows of a product."""
        w, stride = self._window, self._stride
        last = self._batch * w.pixels - 1

        def place(row: Index) -> Index:
            pixel = T.bind(T.min(row, last))
            if self._size == w.out:
                return pixel * stride
            line, column = pixel // w.out[1], pixel % w.out[1]
            image, y = line // w.out[0], line % w.out[0]
            top = image * self._size[0] + y * w.stride[0]
            return (top * self._size[1] + column * w.stride[1]) * stride

        def shift(ky: Index, kx: Index) -> Index:
            return (ky * (w.dilation[0] * self._size[1]) + kx * w.dilation[1]) * stride

        step, run = (stride, None) if self._size == w.out else (w.stride[1] * stride, w.out[1])
        return Rows(self.buffer, place, step, run, w.kernel, w.dilation[1] * stride, shift)

    def read(self, x: Buffer) -> None:
        """Take ``x`` [batch, H, W, channels], int8 or uint8 with 128 added: as it lies, or copied and padded."""
        w, (rows, columns), channels = self._window, self._size, self._channels
        formed = x.dtype == self._isa.activation_dtype
        if formed and self._picked and w.stride == (1, 1) and channels == self._stride:
            self.buffer = x
            return
        self.allocate()
        step = w.stride if self._picked else (1, 1)
        inside = (rows, columns) if self._picked else w.size
        top, left = w.padding
        joined = step[1] == 1 and channels == self._stride

        @for_each(self._batch * inside[0], 8 * product((self._batch, *inside, self._stride)))
        def _(task: Index) -> None:
            image, y = T.bind(task // inside[0]), T.bind(task % inside[0])
            source = T.bind((image * w.size[0] + y * step[0]) * (w.size[1] * channels))
            target = T.bind(((image * rows + y + top) * columns + left) * self._stride)
            if joined:
                self._copy(x, source, target, inside[1] * channels)
            else:
                with T.serial(0, inside[1]) as i:
                    self._copy(x, source + i * (step[1] * channels), target + i * self._stride, channels)

        self.pad()

    def quantize(self, x: Buffer, inverse: Expr, zero_point: Expr) -> None:
        """Quantize float32 ``x`` [batch, channels, H, W] of at most four channels in, and write the padding.

        ``inverse`` (1 / scale) and ``zero_point`` are float32 scalars.
        """
        isa, w, (rows, columns), channels = self._isa, self._window, self._size, self._channels
        self.allocate()
        assert self._stride == isa.word
        assert not self._picked or w.stride == (1, 1)
        (height, width), (top, left) = w.size, w.padding

        @for_each(self._batch * height, 16 * product((self._batch, height, width, channels)))
        def _(task: Index) -> None:
            image, y = T.bind(task // height), T.bind(task % height)
            source = T.bind((image * (channels * height) + y) * width)
            target = T.bind(((image * rows + y + top) * columns + left) * isa.word)

            def pixels(i: Index, n: int) -> None:
                word = fill(T.int32(isa.flip), n)
                for channel in range(channels):
                    value = load(x, source + channel * (height * width) + i, n)
                    byte = quantized_int32(value, inverse, zero_point, n) & fill(T.int32(0xFF), n)
                    word = word ^ (byte << fill(T.int32(8 * channel), n))
                # What a word has past the channels meets weights that are zero.
                word, size = T.cast(word, vec(f"int{8 * isa.word}", n)), n * isa.word
                store(self.buffer, target + i * isa.word, T.reinterpret(vec(isa.activation_dtype, size), word), size)

            chunks(width, isa.lanes, pixels)

        self.pad()

    def pad(self) -> None:
        """Write the padding."""
        w, (rows, columns) = self._window, self._size
        if self._picked or (rows, columns) == w.size:
            return
        top, left = w.padding
        line = columns * self._stride
        with T.serial(0, self._batch) as image:
            start = T.bind(image * (rows * line))
            self._blank(start, top * line)
            self._blank(start + (top + w.size[0]) * line, (rows - top - w.size[0]) * line)
            with T.serial(0, w.size[0]) as y:
                row = T.bind(start + (y + top) * line)
                self._blank(row, left * self._stride)
                self._blank(row + (left + w.size[1]) * self._stride, (columns - left - w.size[1]) * self._stride)

    def _copy(self, x: Buffer, source: Index, target: Index, count: int) -> None:
        isa = self._isa
        chunks(
            count,
            isa.lanes * QUAD,
            lambda i, n: store(self.buffer, target + i, as_read(isa, load(x, source + i, n), x.dtype, n), n),
        )

    def _blank(self, start: Index, count: int) -> None:
        isa = self._isa
        value = T.cast(int32(self._zero) + T.int32(isa.offset), isa.activation_dtype)
        chunks(count, isa.lanes * QUAD, lambda i, n: store(self.buffer, start + i, fill(value, n), n))
