"""The tiles a product may have, the ones that look best first.

The cost model counts cycles roughly: dot products, loads, ragged edges, what is formed once a task, and threads that
wait. It only orders candidates; measuring decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from t3c_compile.backends.tvm.kernels import amx, gemm_amx
from t3c_compile.backends.tvm.kernels.emit import CHUNK_ROWS, ceil_div
from t3c_compile.backends.tvm.kernels.gemm_vector import whole_rows
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.product import SPARE_ROWS
from t3c_compile.backends.tvm.kernels.tile import Tile

_LATENCY = 4  # cycles before a dot product's sum can be added to
_FINISH = 8  # cycles an accumulator takes before and after the reduction
_FIRST_LEVEL = 32 << 10  # bytes of cache
_OPERAND_REGISTERS = 8  # of the vector registers that accumulators leave free
# Candidates may look this much slower than the best looking one.
_WORST, _MOST = 1.3, 32


@dataclass(frozen=True)
class TiledProduct:
    """``rows x columns`` over ``inputs`` and ``taps`` of a window; columns and inputs are those of one of ``groups``.

    ``default``: the tile it has untuned.
    """

    isa: Isa
    default: Tile
    rows: int
    columns: int
    inputs: int
    taps: int = 1
    groups: int = 1

    @property
    def multiply_adds(self) -> int:
        return self.groups * self.rows * self.columns * self.inputs * self.taps

    def fits(self, tile: Tile) -> bool:
        """Whether a kernel with ``tile`` stays inside its buffers, and inside registers that have numbers."""
        if self.isa.matrices:
            return tile.rows >= 1 and tile.vectors >= 1 and tile.chunk >= 1 and gemm_amx.fits(tile)
        whole = tile.rows == whole_rows(self.isa, tile.rows)
        return whole and 1 <= tile.rows <= SPARE_ROWS and tile.vectors >= 1 and tile.chunk >= 1

    def candidates(self, threads: int) -> list[Tile]:
        """The tiles worth measuring on ``threads`` threads, best looking ones first."""
        costs = {tile: self._cost(tile, threads) for tile in self._tiles()}
        least = min(costs.values())
        ordered = sorted((cost, tile.rows, tile.vectors, tile.chunk, tile) for tile, cost in costs.items())
        return [tile for cost, *_, tile in ordered if cost <= _WORST * least][:_MOST]

    def _tiles(self) -> Iterator[Tile]:
        return self._of_matrices() if self.isa.matrices else self._of_vectors()

    def _of_matrices(self) -> Iterator[Tile]:
        """One to three tile registers high, all of one height."""
        registers = ceil_div(self.rows, amx.ROWS)
        for high in range(1, min(3, registers) + 1):
            height = ceil_div(self.rows, ceil_div(registers, high) * high)
            for vectors in range(1, min(6, ceil_div(self.columns, self.isa.lanes)) + 1):
                for chunk in {min(wanted, self.rows) for wanted in (64, 256, 512, 1024, self.rows)}:
                    tile = Tile(high * height, vectors, chunk)
                    if self.fits(tile):
                        yield tile

    def _of_vectors(self) -> Iterator[Tile]:
        for vectors in range(1, min(8, ceil_div(self.columns, self.isa.lanes)) + 1):
            for rows in range(self.isa.height, whole_rows(self.isa, min(SPARE_ROWS, self.rows)) + 1, self.isa.height):
                if rows * vectors + vectors >= self.isa.registers + _OPERAND_REGISTERS:
                    continue
                # Whole tiles, and tasks of one size.
                for wanted in (CHUNK_ROWS // 2, CHUNK_ROWS, 2 * CHUNK_ROWS, 4 * CHUNK_ROWS, self.rows):
                    if wanted <= self.rows:
                        even = ceil_div(self.rows, max(1, round(self.rows / wanted)))
                        yield Tile(rows, vectors, ceil_div(even, rows) * rows)

    def _cost(self, tile: Tile, threads: int) -> float:
        """Cycles, roughly."""
        if self.isa.matrices:
            return self._matrix_cost(tile, threads)
        lanes, depth = self.isa.lanes, ceil_div(self.inputs, self.isa.word) * self.taps
        whole, rest = divmod(self.columns, tile.vectors * lanes)
        parts, last = divmod(self.rows, tile.chunk)
        cycles = 0.0
        for count, vectors in ((whole, tile.vectors), (min(rest, 1), ceil_div(rest, lanes))):
            if count == 0:
                continue
            rows = tile.rows if vectors == tile.vectors else min(12, self.isa.registers // vectors)
            slow_loads = 1.5 * vectors if depth * vectors * lanes * self.isa.word > _FIRST_LEVEL else 0
            step = max(rows * vectors, (rows + vectors) / 2 + slow_loads, _LATENCY) + 0.5
            tiles = parts * ceil_div(tile.chunk, rows) + ceil_div(last, rows)
            sums = (parts + (last > 0)) * depth * max(vectors, _LATENCY)
            cycles += count * (tiles * (depth * step + rows * vectors * _FINISH) + sums)
        tasks = self.groups * (parts + (last > 0)) * (whole + (rest > 0))
        waiting = ceil_div(tasks, threads) * threads / tasks
        return self.groups * cycles * waiting

    def _matrix_cost(self, tile: Tile, threads: int) -> float:
        high = ceil_div(tile.rows, amx.ROWS)
        panels = ceil_div(self.columns, tile.vectors * self.isa.lanes)
        depth = ceil_div(self.inputs * self.taps, amx.BYTES)
        # Products take a cycle a row; loads two rows a cycle, of activations and of weights that are 16 rows.
        loads = 0.5 * (tile.rows + tile.vectors * amx.ROWS)
        step = max(tile.rows * tile.vectors, loads)
        parts, blocks = ceil_div(self.rows, tile.chunk), ceil_div(self.rows, tile.rows)
        finish = _FINISH * tile.rows * tile.vectors
        tasks = self.groups * parts * min(panels, gemm_amx.spans(panels, parts))
        waiting = ceil_div(tasks, threads) * threads / tasks
        set_up = parts * panels * _LATENCY * high
        return self.groups * (panels * blocks * (max(depth * step, finish) + loads) + set_up) * waiting
