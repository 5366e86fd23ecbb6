"""What becomes of the int32 sums of a convolution stage: an NCHW image, or the next stage's int8 words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    fill,
    load,
    requantize,
    store,
    vec,
    when,
)
from t3c_compile.backends.tvm.kernels.finish import Writer
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa
from t3c_compile.backends.tvm.kernels.window import SLACK, Window


@dataclass(frozen=True)
class Task:
    """``rows`` outputs from ``first`` (counted over all groups) and ``pixels`` from ``start``, at most ``most``.

    Outputs from ``limit`` on do not exist; ``whole`` says that there are none such.
    """

    first: Index
    rows: int
    limit: Index
    whole: bool
    start: Index
    pixels: Index
    most: int

    def exists(self, row: int) -> Expr | bool:
        return True if self.whole else self.first + row < self.limit

    def channel(self, row: int) -> Index:
        """Output channel of ``row``, clamped to one that exists."""
        return self.first + row if self.whole else T.min(self.first + row, self.limit - 1)


class Epilogue(Protocol):
    """``begin`` once a task, ``put`` for four rows of a vector of pixels (counted within the task), ``end``."""

    def begin(self, task: Task) -> None: ...

    def put(self, task: Task, row: int, pixel: Index, sums: Sequence[Expr]) -> None: ...

    def end(self, task: Task) -> None: ...


class ToImage:
    """``sums * scale * gain[channel] + bias[channel]``, finished by ``writer``: [channels, H', W'] at element ``base``.

    ``gain_first``: the product of the two factors is taken first (a dense layer's scale), not in turn (a chain's).
    """

    def __init__(
        self,
        isa: Isa,
        window: Window,
        writer: Writer,
        base: Index,
        scale: Expr,
        gain: Buffer | None,
        bias: Buffer | None,
        gain_first: bool,
    ) -> None:
        self._isa, self._window, self._writer, self._base = isa, window, writer, base
        self._scale, self._gain, self._bias, self._gain_first = scale, gain, bias, gain_first

    def begin(self, task: Task) -> None:
        # Rows of sums are kept here and copied out without the columns past the width.
        self._tile = T.alloc_buffer((task.rows * (task.most + SLACK),), "float32")

    def put(self, task: Task, row: int, pixel: Index, sums: Sequence[Expr]) -> None:
        lanes = self._isa.lanes
        for i, total in enumerate(sums):
            channel = task.channel(row + i)
            value = T.cast(total, vec("float32", lanes))
            if self._gain is not None and self._gain_first:
                value = value * fill(self._gain[channel] * self._scale, lanes)
            else:
                value = value * fill(self._scale, lanes)
                if self._gain is not None:
                    value = value * fill(self._gain[channel], lanes)
            if self._bias is not None:
                value = value + fill(self._bias[channel], lanes)
            store(self._tile, (row + i) * (task.most + SLACK) + pixel, value, lanes)

    def end(self, task: Task) -> None:
        w, lanes = self._window, self._isa.lanes
        size = w.out[0] * w.out[1]
        for row in range(task.rows):
            tile = row * (task.most + SLACK)
            image = self._base + (task.first + row) * size

            def copy(tile: Index = tile, image: Index = image) -> None:
                def read(source: Index) -> Callable[[Index, int], Expr]:
                    return lambda i, n: load(self._tile, source + i, n)

                if w.flat:
                    self._writer.copy(read(tile), image + task.start, task.pixels, lanes)
                    return
                columns = w.plane[1]
                with T.serial(0, (task.pixels + columns - 1) // columns) as r:
                    start = image + (task.start // columns + r) * w.out[1]
                    self._writer.copy(read(tile + r * columns), start, w.out[1], lanes)

            when(task.exists(row), copy)


class ToWords:
    """Requantize by ``scale[channel] * factor`` into words ``[channels / 4][stride]``; missing channels are zero."""

    def __init__(self, isa: Isa, words: Buffer, stride: int, scale: Buffer, factor: Expr) -> None:
        self._isa, self._words, self._stride, self._scale, self._factor = isa, words, stride, scale, factor

    def begin(self, task: Task) -> None:
        pass

    def put(self, task: Task, row: int, pixel: Index, sums: Sequence[Expr]) -> None:
        lanes = self._isa.lanes
        word = fill(T.int32(self._isa.flip), lanes)
        for i, total in enumerate(sums):
            factor = fill(self._scale[task.channel(row + i)] * self._factor, lanes)
            byte = requantize(total, factor, lanes) & fill(T.int32(0xFF), lanes)
            exists = task.exists(row + i)
            if exists is not True:
                byte = byte * fill(T.cast(exists, "int32"), lanes)
            word = word ^ (byte << fill(T.int32(8 * i), lanes))
        at = (task.first + row) // QUAD * self._stride + task.start + pixel
        when(task.exists(row), lambda: store(self._words, at, word, lanes))

    def end(self, task: Task) -> None:
        pass
