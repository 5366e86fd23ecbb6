"""The tiles a product may have, the ones that look best first.

The cost model counts cycles roughly: dot products, loads, ragged edges, what is formed once a task, and threads that
wait. It only orders candidates; measuring decides.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from t3c_compile.backends.tvm.kernels.emit import ceil_div
from t3c_compile.backends.tvm.kernels.gemm import SPARE_ROWS, rows_for
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa
from t3c_compile.backends.tvm.kernels.pixels import chunk_pixels
from t3c_compile.backends.tvm.kernels.tile import Tile
from t3c_compile.backends.tvm.kernels.window import SLACK, Window

_LATENCY = 4  # cycles before a dot product's sum can be added to
_FINISH = 8  # cycles an accumulator takes before and after the reduction
_FIRST_LEVEL = 32 << 10  # bytes of cache
_OPERAND_REGISTERS = 8  # of the vector registers that accumulators leave free
# Candidates may look this much slower than the best looking one.
_WORST, _MOST = 1.3, 32


@dataclass(frozen=True)
class Product(ABC):
    """A product with a tile of its own; ``default`` is what it has untuned."""

    isa: Isa
    default: Tile

    def candidates(self, threads: int) -> list[Tile]:
        """The tiles worth measuring on ``threads`` threads, best looking ones first."""
        costs = {tile: self.cost(tile, threads) for tile in self._tiles() if self.fits(tile)}
        least = min(costs.values())
        ordered = sorted((cost, tile.rows, tile.vectors, tile.chunk, tile) for tile, cost in costs.items())
        return [tile for cost, *_, tile in ordered if cost <= _WORST * least][:_MOST]

    @property
    @abstractmethod
    def multiply_adds(self) -> int: ...

    @abstractmethod
    def fits(self, tile: Tile) -> bool:
        """Whether a kernel with ``tile`` stays inside its buffers."""

    @abstractmethod
    def cost(self, tile: Tile, threads: int) -> float:
        """Cycles, roughly."""

    @abstractmethod
    def _tiles(self) -> Iterator[Tile]: ...

    def _in_registers(self, rows: int, vectors: int) -> bool:
        return rows * vectors + vectors < self.isa.registers + _OPERAND_REGISTERS

    def _step(self, rows: int, vectors: int, slow_loads: float) -> float:
        """Cycles of one word of the reduction; ``slow_loads``: cycles of loads from beyond the first-level cache."""
        return max(rows * vectors, (rows + vectors) / 2 + slow_loads, _LATENCY) + 0.5


@dataclass(frozen=True)
class Rows(Product):
    """Matrix ``[rows, inputs]`` times ``[inputs, columns]``: linear layers."""

    rows: int
    inputs: int
    columns: int

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.inputs * self.columns

    def fits(self, tile: Tile) -> bool:
        return 1 <= tile.rows <= SPARE_ROWS and tile.vectors >= 1 and tile.chunk >= 1

    def cost(self, tile: Tile, threads: int) -> float:
        lanes, depth = self.isa.lanes, ceil_div(self.inputs, QUAD)
        whole, rest = divmod(self.columns, tile.vectors * lanes)
        parts, last = divmod(self.rows, tile.chunk)
        tasks = (parts + (last > 0)) * (whole + (rest > 0))
        cycles = 0.0
        for count, vectors in ((whole, tile.vectors), (min(rest, 1), ceil_div(rest, lanes))):
            if count == 0:
                continue
            rows = tile.rows if vectors == tile.vectors else rows_for(self.isa, vectors)
            if self.rows <= tile.chunk:
                rows = ceil_div(self.rows, ceil_div(self.rows, rows))
            slow = 1.5 * vectors if depth * vectors * lanes * QUAD > _FIRST_LEVEL else 0
            tiles = parts * ceil_div(tile.chunk, rows) + ceil_div(last, rows)
            each = depth * self._step(rows, vectors, slow) + rows * vectors * _FINISH
            sums = (parts + (last > 0)) * depth * max(vectors, _LATENCY)
            cycles += count * (tiles * each + sums)
        return cycles * _waiting(tasks, threads)

    def _tiles(self) -> Iterator[Tile]:
        for vectors in range(1, min(8, ceil_div(self.columns, self.isa.lanes)) + 1):
            for rows in range(1, min(SPARE_ROWS, self.rows) + 1):
                if self._in_registers(rows, vectors):
                    for about in {min(wanted, self.rows) for wanted in (48, 96, 192, self.rows)}:
                        yield Tile(rows, vectors, max(1, round(about / rows)) * rows if about < self.rows else about)


@dataclass(frozen=True)
class Pixels(Product):
    """A convolution's product: ``outputs`` channels a group from ``inputs`` channels and ``taps``."""

    window: Window
    taps: int
    inputs: int
    outputs: int
    groups: int

    @property
    def multiply_adds(self) -> int:
        out = self.window.out
        return out[0] * out[1] * self.groups * self.outputs * self.inputs * self.taps

    def fits(self, tile: Tile) -> bool:
        # Four channels are joined to a word; sums of weights are formed by blocks of 16.
        return tile.rows in (4, 8, 16) and 1 <= tile.vectors * self.isa.lanes <= SLACK and tile.chunk >= 1

    def cost(self, tile: Tile, threads: int) -> float:
        lanes, depth, w = self.isa.lanes, ceil_div(self.inputs, QUAD) * self.taps, self.window
        most = chunk_pixels(w, tile.chunk)
        parts, last = divmod(w.pixels, most)
        outputs = ceil_div(self.outputs, tile.rows)
        tasks = (parts + (last > 0)) * self.groups * outputs
        image = most * self.inputs * w.phases[0] * w.phases[1]
        slow = (2.0 if depth * 64 > _FIRST_LEVEL else 0) + (1.5 * tile.vectors if image > _FIRST_LEVEL else 0)
        blocks = parts * ceil_div(most, tile.vectors * lanes) + ceil_div(last, tile.vectors * lanes)
        each = depth * self._step(tile.rows, tile.vectors, slow) + tile.rows * tile.vectors * _FINISH
        sums = (parts + (last > 0)) * depth * max(ceil_div(tile.rows, lanes), _LATENCY)
        return self.groups * outputs * (blocks * each + sums) * _waiting(tasks, threads)

    def _tiles(self) -> Iterator[Tile]:
        for rows in (4, 8, 16):
            if rows < self.outputs + QUAD:
                for vectors in range(1, 9):
                    if self._in_registers(rows, vectors):
                        yield from _chunked(self.window, rows, vectors, self.isa.lanes)


@dataclass(frozen=True)
class Depthwise(Product):
    """Each of ``channels`` alone with its window."""

    window: Window
    channels: int

    @property
    def multiply_adds(self) -> int:
        w = self.window
        return w.out[0] * w.out[1] * self.channels * w.kernel[0] * w.kernel[1]

    def fits(self, tile: Tile) -> bool:
        return tile.rows == QUAD and 1 <= tile.vectors * self.isa.lanes <= SLACK and tile.chunk >= 1

    def cost(self, tile: Tile, threads: int) -> float:
        w = self.window
        most = chunk_pixels(w, tile.chunk)
        parts, last = divmod(w.pixels, most)
        width = tile.vectors * self.isa.lanes
        blocks = parts * ceil_div(most, width) + ceil_div(last, width)
        # Three operations and a constant a lane and channel; the loop over the window is paid by all vectors.
        each = w.kernel[0] * w.kernel[1] * (4 * QUAD * tile.vectors + 2 * QUAD) + tile.vectors * QUAD * _FINISH
        words = ceil_div(self.channels, QUAD)
        return words * blocks * each * _waiting((parts + (last > 0)) * words, threads)

    def _tiles(self) -> Iterator[Tile]:
        for vectors in range(1, 5):
            yield from _chunked(self.window, QUAD, vectors, self.isa.lanes)


def _waiting(tasks: int, threads: int) -> float:
    """Time for ``tasks`` equal tasks over the time if they could be split freely."""
    return ceil_div(tasks, threads) * threads / tasks


def _chunked(w: Window, rows: int, vectors: int, lanes: int) -> Iterator[Tile]:
    """The tile with chunks of several sizes, no two of which come to the same."""
    width = vectors * lanes
    chunks: dict[int, int] = {}
    for wanted in (128, 256, 512, 1024, 2048, w.pixels):
        chunk = max(1, round(wanted / width)) * width if w.flat and wanted < w.pixels else wanted
        chunks.setdefault(chunk_pixels(w, chunk), chunk)
    yield from (Tile(rows, vectors, chunk) for chunk in chunks.values())
