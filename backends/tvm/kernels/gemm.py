"""The int8 row-by-column product every quantized linear layer is made of, on the unit that the processor has for it."""

from collections.abc import Sequence

from t3c_compile.backends.tvm.kernels import gemm_amx, gemm_vector
from t3c_compile.backends.tvm.kernels.emit import Buffer
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.product import Epilogue, Product, Rows
from t3c_compile.backends.tvm.kernels.tile import Tile, Tiles


def multiply(isa: Isa, p: Product, x: Rows, weights: Buffer, epilogue: Epilogue, tile: Tile) -> None:
    """Emit the product; ``epilogue`` gets each vector of ``sum((x - zero_point) * weight)``."""
    (gemm_amx if isa.matrices else gemm_vector).multiply(isa, p, x, weights, epilogue, tile)


def tile_for(isa: Isa, tiles: Tiles, number: int, lead: Sequence[int | str], columns: int, depth: int) -> Tile:
    """The tile of a kernel's product ``number``, of ``lead`` dimensions of rows: the tuned one, else the default."""
    return tiles[number] if tiles else default_tile(isa, lead, columns, depth)


def default_tile(isa: Isa, lead: Sequence[int | str], columns: int, depth: int) -> Tile:
    """The tile of a product that was not tuned, ``depth`` inputs a sum. What is not known of its rows is taken for 1: a
    batch of one sample."""
    if isa.matrices:
        return gemm_amx.default_tile(lead, columns, depth)
    return gemm_vector.default_tile(isa, lead, columns)
