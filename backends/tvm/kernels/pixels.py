"""Products over spread images: lanes are pixels, weights are broadcast, so NCHW is read and written as it lies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    accumulators,
    ceil_div,
    fill,
    for_each,
    int32,
    load,
    static,
    store,
    top_bits,
    vec,
)
from t3c_compile.backends.tvm.kernels.epilogues import Epilogue, Task
from t3c_compile.backends.tvm.kernels.gemm import spread_word, weight_sums
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa
from t3c_compile.backends.tvm.kernels.tile import Tile
from t3c_compile.backends.tvm.kernels.window import Window

_CHUNK_PIXELS = 512  # pixels a task: enough to pay back the weight sums, few enough for the first-level cache


@dataclass(frozen=True)
class Planes:
    """Words ``[phases][groups * quads][stride]`` in ``buffer``, holding int8 with ``zero_point``."""

    buffer: Buffer
    stride: int
    quads: int
    zero_point: Index
    groups: int = 1


def chunk_pixels(w: Window, chunk: int) -> int:
    """Pixels a task takes, ``chunk`` or a little more: whole rows where columns are dropped."""
    if w.flat:
        return min(chunk, w.pixels)
    return min(w.out[0], ceil_div(chunk, w.plane[1])) * w.plane[1]


def default_tile(isa: Isa, w: Window) -> Tile:
    """The tile of a dense product that was not tuned."""
    rows = 8 if isa.registers >= 16 else 4
    most, widest = chunk_pixels(w, _CHUNK_PIXELS), isa.registers // rows
    vectors = min(
        (v for v in range(widest, max(0, widest - 2), -1)), key=lambda v: ceil_div(ceil_div(most, isa.lanes), v) * v
    )
    return Tile(rows, vectors, _CHUNK_PIXELS)


def default_depthwise_tile() -> Tile:
    """The tile of a depthwise product that was not tuned; its rows are always one word of channels."""
    return Tile(QUAD, 2, _CHUNK_PIXELS)


@contextmanager
def _taps(w: Window, kernel: tuple[int, int]) -> Iterator[tuple[Index, Index, Index]]:
    """Loop over the window: (tap number, phase, word offset)."""
    if kernel == (1, 1):
        yield 0, 0, 0
        return
    with T.serial(0, kernel[0]) as ky, T.serial(0, kernel[1]) as kx:
        phase, offset = w.tap(ky, kx)
        yield T.bind(ky * kernel[1] + kx), T.bind(phase), T.bind(offset)


def _bytes(isa: Isa, words: Buffer, index: Index) -> object:
    return T.reinterpret(vec(isa.activation_dtype, isa.lanes * QUAD), load(words, index, isa.lanes))


def convolve(
    isa: Isa,
    w: Window,
    x: Planes,
    weights: Buffer,
    stored_quads: int,
    outputs: int,
    bits: int,
    epilogue: Epilogue,
    tile: Tile,
    as_it_lies: bool = False,
) -> None:
    """Dense or grouped product of ``x`` with packed ``weights`` (``stored_quads`` input words), ``outputs`` a group.

    ``as_it_lies``: ``x`` has the pixels of the window's output already, and the product is 1x1.
    """
    kernel = (1, 1) if as_it_lies else w.kernel
    lanes = isa.lanes
    rows, vectors, most = tile.rows, tile.vectors, chunk_pixels(w, tile.chunk)
    blocks, pixel_chunks = ceil_div(outputs, rows), ceil_div(w.pixels, most)
    taps = kernel[0] * kernel[1]
    block_bytes, tap_bytes = taps * stored_quads * BLOCK * QUAD, stored_quads * BLOCK * QUAD
    offset = isa.offset + x.zero_point

    def at(output: Index, tap: Index, k: Index) -> Index:
        return (output // BLOCK) * block_bytes + tap * tap_bytes + k * (BLOCK * QUAD) + (output % BLOCK) * QUAD

    work = x.groups * outputs * x.quads * QUAD * taps * w.pixels

    @for_each(pixel_chunks * x.groups * blocks, work)
    def _(number: Index) -> None:
        start = T.bind(number // (x.groups * blocks) * most)
        group = T.bind(number // blocks % x.groups)
        output = T.bind(number % blocks * rows)
        # Packed weights start a new block for each group.
        packed = T.bind(group * ceil_div(outputs, BLOCK) * BLOCK + output)
        pixels = T.min(most, w.pixels - start) if pixel_chunks > 1 else w.pixels
        task = Task(group * outputs + output, rows, group * outputs + outputs, outputs % rows == 0, start, pixels, most)
        sums = None
        if static(offset) != 0:
            base = packed // lanes * lanes
            sums = weight_sums(
                isa, weights, lambda v, tap, k: at(base + v * lanes, tap, k), taps, x.quads, ceil_div(rows, lanes), bits
            )
        epilogue.begin(task)
        with T.serial(0, ceil_div(pixels, vectors * lanes)) as block:
            pixel = T.bind(block * (vectors * lanes))
            acc = accumulators(rows, vectors, lanes, "int32")
            for r, line in enumerate(acc):
                value = T.int32(0) if sums is None else sums[r // lanes][(packed + r) % lanes] * int32(-1 * offset)
                for cell in line:
                    store(cell, 0, fill(value, lanes), lanes)
            with _taps(w, kernel) as (tap, phase, shift), T.serial(0, x.quads) as k:
                plane = (phase * x.groups + group) * x.quads + k
                source = T.bind(plane * x.stride + start + pixel + shift)
                image = [T.bind(_bytes(isa, x.buffer, source + v * lanes)) for v in range(vectors)]
                for r, line in enumerate(acc):
                    word = T.bind(top_bits(spread_word(isa, weights, at(packed + r, tap, k)), bits, lanes * QUAD))
                    for cell, part in zip(line, image, strict=True):
                        store(cell, 0, isa.dot(load(cell, 0, lanes), part, word), lanes)
            for row in range(0, rows, QUAD):
                for v in range(vectors):
                    epilogue.put(task, row, pixel + v * lanes, [load(acc[row + i][v], 0, lanes) for i in range(QUAD)])
        epilogue.end(task)


def depthwise(
    isa: Isa, w: Window, x: Planes, weights: Buffer, channels: int, bits: int, epilogue: Epilogue, tile: Tile
) -> None:
    """Each of ``channels`` alone with its window; raw int8 ``weights`` [channels, kh, kw]."""
    lanes, vectors = isa.lanes, tile.vectors
    most, taps = chunk_pixels(w, tile.chunk), w.kernel[0] * w.kernel[1]
    pixel_chunks = ceil_div(w.pixels, most)
    step = 1 << (8 - bits)

    def weight(channel: Index, tap: Index) -> object:
        value = weights[channel * taps + tap]
        if bits < 8:
            value = (value + T.int8(step // 2)) & T.int8(-step)
        return T.cast(value, "int32")

    @for_each(pixel_chunks * x.quads, channels * taps * w.pixels)
    def _(number: Index) -> None:
        start = T.bind(number // x.quads * most)
        quad = T.bind(number % x.quads)
        pixels = T.min(most, w.pixels - start) if pixel_chunks > 1 else w.pixels
        task = Task(quad * QUAD, QUAD, channels, channels % QUAD == 0, start, pixels, most)
        epilogue.begin(task)
        with T.serial(0, ceil_div(pixels, vectors * lanes)) as block:
            pixel = T.bind(block * (vectors * lanes))
            acc = accumulators(QUAD, vectors, lanes, "int32")
            for line in acc:
                for cell in line:
                    store(cell, 0, fill(T.int32(0), lanes), lanes)
            with _taps(w, w.kernel) as (tap, phase, shift):
                source = T.bind((phase * x.quads + quad) * x.stride + start + pixel + shift)
                for v in range(vectors):
                    word = T.bind(load(x.buffer, source + v * lanes, lanes) ^ fill(T.int32(isa.flip), lanes))
                    for i in range(QUAD):
                        value = (word << fill(T.int32(24 - 8 * i), lanes)) >> fill(T.int32(24), lanes)
                        factor = fill(weight(task.channel(i), tap), lanes)
                        total = load(acc[i][v], 0, lanes) + (value - fill(int32(x.zero_point), lanes)) * factor
                        store(acc[i][v], 0, total, lanes)
            for v in range(vectors):
                epilogue.put(task, 0, pixel + v * lanes, [load(acc[i][v], 0, lanes) for i in range(QUAD)])
        epilogue.end(task)
